import random

from orpo_cli.data.keys import PromptKeys, SeenKeys


def test_a_key_is_new_once():
    keys = [random.Random(i % 700).randbytes(16) for i in range(1000)]
    seen = SeenKeys()
    assert [seen.add(key) for key in keys] == [i < 700 for i in range(1000)]


def test_whole_prompts_come_in_the_order_of_their_keys_as_far_as_they_fit():
    chance = random.Random(1)
    prompts = [chance.randrange(60) for _ in range(200)]
    names = [chance.randbytes(32) for _ in range(60)]
    keys = PromptKeys()
    for position, prompt in enumerate(prompts):
        keys.add(names[prompt], position)
    assert len(keys) == len(set(prompts))
    for pairs in (0, 1, 2, 17, 199, 200, 1000):
        taken: list[int] = []
        for name in sorted(names):
            of_prompt = [i for i, prompt in enumerate(prompts) if names[prompt] == name]
            if len(taken) + len(of_prompt) <= pairs:
                taken += of_prompt
        assert list(keys.first(pairs)) == sorted(taken)
