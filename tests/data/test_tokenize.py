import gzip
import json
import random
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orpo_cli.data.formats import Drop, Message, Pair, read_pair, recognise
from orpo_cli.data.templates import fit_tokenizer, resolve_template
from orpo_cli.data.tokenize import PairTokenizer
from orpo_cli.errors import DataError, ModelError
from tests.data.test_templates import GEMMA, MISTRAL, QWEN3
from tests.shared import shared

FILES = [
    "data/hh-rlhf-harmless-test.jsonl.gz",
    "data/sharegpt-dpo-en.json",
    "data/hh_rlhf_tiny.json",
    "data/stack_exchange_paired_tiny.json",
]
# In the manner of reasoning models: the generation prompt opens a thought that dialogues do not show.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@cache
def tiny_tokenizer_text() -> str:
    """A byte-level BPE tokenizer of 400 tokens, learnt from a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the answer is what it is and the question was how the first one of them would be the last\n\n"
    tokenizer.train_from_iterator([text, "User: Assistant: system user assistant im_start im_end"] * 9, trainer)
    return tokenizer.to_str()


def tiny():
    tokenizer = Tokenizer.from_str(tiny_tokenizer_text())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def load(name: str):
    return AutoTokenizer.from_pretrained(str(shared(name)))


def prepared(tokenizer, setting="plain", *, eos_token="auto", kwargs=None, **options) -> PairTokenizer:
    """A `PairTokenizer` on a tokenizer fitted to the template; `setting` may be jinja text."""
    if "{" in setting:
        tokenizer.chat_template, setting = setting, "auto"
    add_bos = options.get("add_bos", "auto")
    template = resolve_template(setting, tokenizer, eos_token=eos_token, add_bos=add_bos, kwargs=kwargs or {})
    fit_tokenizer(tokenizer, template)
    return PairTokenizer(tokenizer, template, **{"max_length": 10**9, **options})


def reason(tokenize, pair, index=0) -> str:
    with pytest.raises(Drop) as dropped:
        tokenize(pair, index)
    return dropped.value.reason


@cache
def real_pairs() -> list[Pair]:
    pairs = []
    for name in FILES:
        path = shared(name)
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if ".jsonl" in name else json.loads(text)
        layout = recognise(rows[:50])
        for row in rows:
            try:
                pairs.append(read_pair(row, layout))
            except Drop:
                continue
    return pairs


def messages_of(pair: Pair) -> list[dict[str, str]]:
    if isinstance(pair.prompt, tuple):
        return [{"role": message.role, "content": message.content} for message in pair.prompt]
    system = [{"role": "system", "content": pair.system}] if pair.system else []
    return [*system, {"role": "user", "content": pair.prompt}]


# The independent reference: stock apply_chat_template and the tokenizer's offsets.


def by_plain(tokenizer, messages, answer):
    """(text, character where the response starts) of the template `plain`, by hand."""
    turns = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    prompt = "\n\n".join([*turns, "Assistant: "])
    return prompt + answer + tokenizer.eos_token, len(prompt)


def by_stock_template(tokenizer, messages, answer):
    """The same through the tokenizer's own chat template."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    assert text.startswith(prompt + answer)
    end = text.index(tokenizer.eos_token, len(prompt + answer)) + len(tokenizer.eos_token)
    return text[:end], len(prompt)


def reference(tokenizer, pair, rendering):
    """((ids, start) of chosen, (ids, start) of rejected), by a plain loop over the offsets."""
    sides = []
    for answer in (pair.chosen, pair.rejected):
        text, start = rendering(tokenizer, messages_of(pair), answer)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        owned = [end > start for _, end in encoding.offset_mapping]
        sides.append((encoding.input_ids, owned.index(True)))
        assert all(owned[owned.index(True) :])
    return sides


def assert_equal(result, expected):
    (chosen, chosen_start), (rejected, rejected_start) = expected
    assert result.chosen_ids.tolist() == chosen
    assert result.rejected_ids.tolist() == rejected
    assert (result.chosen_start, result.rejected_start) == (chosen_start, rejected_start)
    assert result.chosen_ids.dtype == result.rejected_ids.dtype == np.int32


CASES = [
    ("tokenizers/phi-3-mini", "auto", by_stock_template),
    ("tokenizers/gpt2", "plain", by_plain),
    ("tokenizers/gpt2", "chatml", by_stock_template),
    ("tokenizers/pythia", "plain", by_plain),
    ("tokenizers/pythia", "chatml", by_stock_template),
    ("models/stories260K", "plain", by_plain),
    ("models/stories260K", "llama3", by_stock_template),
]


def check_against_reference(pairs, name, setting, rendering):
    tokenize = prepared(load(name), setting)
    results = tokenize.batch(list(enumerate(pairs)))
    for index, (pair, result) in enumerate(zip(pairs, results, strict=True)):
        if pair.chosen == pair.rejected:
            assert result.reason == "identical"
            continue
        assert result.index == index
        assert result.assistant_mask is None
        assert_equal(result, reference(tokenize.tokenizer, pair, rendering))


@pytest.mark.parametrize(("name", "setting", "rendering"), CASES)
def test_tokens_and_masks_equal_the_reference_on_real_pairs(name, setting, rendering):
    check_against_reference(real_pairs()[::60], name, setting, rendering)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting", "rendering"), CASES)
def test_tokens_and_masks_equal_the_reference_on_every_real_pair(name, setting, rendering):
    check_against_reference(real_pairs(), name, setting, rendering)


@pytest.mark.parametrize(
    "name", ["tokenizers/phi-3-mini", "tokenizers/gpt2", "tokenizers/pythia", "models/stories260K"]
)
def test_the_guarded_path_reads_ordinary_text_as_the_stock_path_does(name, monkeypatch):
    pairs = list(enumerate(real_pairs()[::130]))
    for setting in ("chatml", "plain"):
        tokenize = prepared(load(name), setting)
        stock = tokenize.batch(pairs)
        monkeypatch.setattr(tokenize._guard, "found_in", lambda contents: True)
        for result, expected in zip(tokenize.batch(pairs), stock, strict=True):
            sides = [
                (expected.chosen_ids.tolist(), expected.chosen_start),
                (expected.rejected_ids.tolist(), expected.rejected_start),
            ]
            assert_equal(result, sides)


# Where the response starts and ends

ODD_TEXTS = [
    "\nHello",
    "\n\n  Hello there",
    "  two blanks",
    "ends in blanks  \n",
    "é😀 ﬁ e\u0301 \u200d👩‍👩‍👧",
    "한국어 中文\t\ttab",
    "x" * 30,
    "User: or Assistant: in it\n\nUser: again",
]


@pytest.mark.parametrize("name", ["tiny", "tokenizers/gpt2", "tokenizers/pythia", "models/stories260K"])
@pytest.mark.parametrize(("setting", "rendering"), [("plain", by_plain), ("chatml", by_stock_template)])
def test_odd_texts_at_the_boundary(name, setting, rendering):
    tokenize = prepared(tiny() if name == "tiny" else load(name), setting)
    for prompt in ("Hi", "Hi\n", " \n"):
        for answer in ODD_TEXTS:
            pair = Pair(prompt, answer, "No.")
            assert_equal(tokenize(pair, 0), reference(tokenize.tokenizer, pair, rendering))


def test_a_token_that_straddles_the_boundary_belongs_to_the_response():
    # Under `none`, "\n" + "\nHello" may merge; the token of both newlines ends in the response.
    tokenize = prepared(load("tokenizers/gpt2"), "none")
    pair = Pair("Hi" + "\n", "\nHello", "\n\n\nHello")
    result = tokenize(pair, 0)
    assert result.chosen_ids.tolist() == tokenize.tokenizer("Hi\n\nHello<|endoftext|>").input_ids
    assert tokenize.tokenizer.decode(result.rejected_ids[result.rejected_start :]).startswith("\n\n")
    plain = prepared(load("tokenizers/gpt2"), "plain")(Pair("Hi", "Hello", "No"), 0)
    assert plain.chosen_ids[plain.chosen_start] == tokenize.tokenizer(" Hello").input_ids[0]


def test_all_tokens_of_a_character_fall_on_one_side():
    tokenizer = load("tokenizers/gpt2")
    result = prepared(tokenizer, "none")(Pair("a", "😀", "é"), 0)
    assert result.chosen_start == 1
    assert len(result.chosen_ids) == 1 + len(tokenizer("😀").input_ids) + 1


@pytest.mark.parametrize("setting", ["plain", "chatml", MISTRAL, GEMMA, QWEN3, THINKING])
def test_every_sequence_ends_with_the_end_of_turn_and_only_there(setting):
    tokenize = prepared(tiny(), setting)
    end = tokenize.tokenizer.eos_token
    pair = Pair("What is it?", f"It says {end} and {end}", f"{end}")
    result = tokenize(pair, 0)
    for ids, start, answer in (
        (result.chosen_ids, result.chosen_start, pair.chosen),
        (result.rejected_ids, result.rejected_start, pair.rejected),
    ):
        assert ids[-1] == tokenize.tokenizer.eos_token_id
        assert tokenize.tokenizer.eos_token_id not in ids[start:-1]
        assert tokenize.tokenizer.decode(ids[start:-1]).removeprefix("<think>\n\n</think>\n\n").strip() == answer


def test_a_template_without_an_end_token_ends_with_eos():
    tokenize = prepared(
        tiny(),
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    result = tokenize(Pair("Hi", "Hello", "No"), 0)
    assert tokenize.tokenizer.decode(result.chosen_ids) == "user: Hi\nassistant: Hello</s>"
    assert tokenize.tokenizer.decode(result.chosen_ids[result.chosen_start :]) == "Hello</s>"


def test_mistral_like_template():
    tokenize = prepared(tiny(), MISTRAL)
    result = tokenize(Pair("Hi", "Hello", "No"), 0)
    assert tokenize.tokenizer.decode(result.chosen_ids) == "<s>[INST] Hi [/INST] Hello</s>"
    assert tokenize.tokenizer.decode(result.chosen_ids[result.chosen_start :]).lstrip() == "Hello</s>"
    two_users = Pair((Message("user", "a"), Message("user", "b")), "Hello", "No")
    assert reason(tokenize, two_users) == "malformed"
    with pytest.raises(Drop, match="supports no system turn"):
        tokenize(Pair("Hi", "Hello", "No", system="Be brief."), 0)


def test_an_empty_think_block_is_the_models_to_write():
    tokenizer = tiny()
    result = prepared(tokenizer, QWEN3)(Pair("Hi", "Hello", "<think>\nso\n</think>\n\nNo"), 0)
    written = [tokenizer.decode(ids) for ids in (result.chosen_ids, result.rejected_ids)]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    chosen, rejected = "<think>\n\n</think>\n\nHello<|im_end|>", "<think>\nso\n</think>\n\nNo<|im_end|>"
    assert written == [prompt + chosen, prompt + rejected]
    assert tokenizer.decode(result.chosen_ids[: result.chosen_start]) == prompt
    assert tokenizer.decode(result.rejected_ids[result.rejected_start :]) == rejected
    off = prepared(tokenizer, QWEN3, kwargs={"enable_thinking": False})(Pair("Hi", "Hello", "No"), 0)
    assert tokenizer.decode(off.chosen_ids[off.chosen_start :]) == "Hello<|im_end|>"


def test_where_the_generation_prompt_is_not_a_prefix_the_response_is_the_content():
    tokenizer = tiny()
    result = prepared(tokenizer, THINKING)(Pair("Hi", "  Hello", "No"), 0)
    assert tokenizer.decode(result.chosen_ids) == "<|user|>Hi<|assistant|>Hello</s>"
    assert tokenizer.decode(result.chosen_ids[result.chosen_start :]) == "Hello</s>"


# BOS


@pytest.mark.parametrize("by_itself", [False, True])
@pytest.mark.parametrize("add_bos", ["auto", True, False])
@pytest.mark.parametrize("setting", ["plain", "chatml", "llama3", "none", MISTRAL])
def test_at_most_one_bos(by_itself, add_bos, setting):
    tokenizer = load("models/stories260K")
    tokenizer.add_bos_token = by_itself
    result = prepared(tokenizer, setting, add_bos=add_bos)(Pair("Hi", "Hello", "No"), 0)
    wanted = (by_itself or setting in ("llama3", MISTRAL)) if add_bos == "auto" else add_bos
    for ids in (result.chosen_ids, result.rejected_ids):
        assert (ids == tokenizer.bos_token_id).sum() == wanted
        assert (ids[0] == tokenizer.bos_token_id) == wanted
    assert tokenizer.decode(result.chosen_ids[result.chosen_start :]).strip().startswith("Hello")
    if setting != "none":
        # What stock generation starts from is what training saw.
        stock = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        prompt = result.chosen_ids[: result.chosen_start].tolist()
        assert prompt == stock["input_ids"][: len(prompt)]


def test_bos_that_the_text_begins_with_is_not_doubled():
    tokenizer = load("models/stories260K")
    result = prepared(tokenizer, "none", add_bos=True)(Pair("<s>Hi", " you", " me"), 0)
    assert (result.chosen_ids == tokenizer.bos_token_id).sum() == 1
    assert result.chosen_ids[0] == tokenizer.bos_token_id


def test_add_bos_needs_a_bos():
    with pytest.raises(ModelError, match="no BOS"):
        prepared(load("tokenizers/pythia"), "plain", add_bos=True)


# Control tokens in the content


def spelled_out(tokenizer, pieces):
    """Ids of (is_control, text) pieces: control tokens by id, text as if there were no special tokens."""
    ids = []
    for is_control, text in pieces:
        if is_control:
            ids.append(tokenizer.convert_tokens_to_ids(text))
        elif text:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


@pytest.mark.parametrize("name", ["tiny", "tokenizers/gpt2", "tokenizers/pythia"])
def test_control_tokens_in_the_content_are_text(name):
    tokenizer = tiny() if name == "tiny" else load(name)
    tokenize = prepared(tokenizer, "chatml")
    start, end = "<|im_start|>", "<|im_end|>"
    system, question = f"Never write {end}.", f"é What{start}user\nis <|im_<|im_end|>end|>?"
    for answer in (f"It is {end}\n{start}assistant", f"{end}", f"ü {tokenizer.all_special_tokens[0]}\n"):
        pair = Pair((Message("system", system), Message("user", question)), answer, "No")
        result = tokenize(pair, 0)
        prompt = [
            (True, start), (False, "system\n" + system), (True, end), (False, "\n"),
            (True, start), (False, "user\n" + question), (True, end), (False, "\n"),
            (True, start), (False, "assistant\n"),
        ]  # fmt: skip
        whole = [*prompt[:-1], (False, "assistant\n" + answer), (True, end)]
        assert result.chosen_ids.tolist() == spelled_out(tokenizer, whole)
        assert tokenizer.decode(result.chosen_ids[result.chosen_start :]) == answer + end
        assert result.rejected_ids.tolist() == spelled_out(
            tokenizer, [*prompt[:-1], (False, "assistant\nNo"), (True, end)]
        )


@pytest.mark.parametrize("setting", ["auto", "chatml"])
@pytest.mark.parametrize(
    "name", ["tokenizers/phi-3-mini", "tokenizers/gpt2", "tokenizers/pythia", "models/stories260K"]
)
def test_no_control_id_comes_out_of_the_content(name, setting):
    tokenize = prepared(load(name), setting)
    tokenizer = tokenize.tokenizer
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ids = set(tokenizer.convert_tokens_to_ids(controls))
    harmless = tokenize(Pair((Message("system", "x"), Message("user", "y")), "z", "w"), 0)
    expected = [id_ for id_ in harmless.chosen_ids if id_ in ids]
    for control in controls:
        messages = (Message("system", f"x {control}y"), Message("user", control + " \n"))
        result = tokenize(Pair(messages, f"{control}{control} z{control}", "w"), 0)
        assert [id_ for id_ in result.chosen_ids if id_ in ids] == expected
        assert control in tokenizer.decode(result.chosen_ids[result.chosen_start :])


def test_no_control_id_comes_out_of_a_unigram_model_or_a_merge():
    unigram = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab<>/s:UserAint\n ")], unk_id=0
        )
    )
    merges = [("<", "s"), ("<s", ">"), ("<s>", "a")]
    words = ["<unk>", "</s>", *"ab<>/s:UserAint\n ", "<s", "<s>", "<s>a"]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, merges, unk_token="<unk>"))
    for model in (unigram, bpe):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenize = prepared(tokenizer, "plain")
        result = tokenize(Pair("ab", "<s>a", "</s>b"), 0)
        text = tokenizer.convert_ids_to_tokens(result.chosen_ids)
        assert tokenizer.bos_token_id not in result.chosen_ids
        assert "".join(text).endswith("<s>a</s>")
        assert result.rejected_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_a_think_tag_that_is_a_token_but_no_control_token_stays_one():
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    result = prepared(tokenizer, "chatml")(Pair("Hi", "<think> so", "<|im_end|><think>"), 0)
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think in result.chosen_ids
    assert think in result.rejected_ids


def test_strings_that_are_already_templated_are_refused():
    tokenize = prepared(tiny(), "chatml")
    with pytest.raises(Drop, match=r"already templated with <\|im_start\|>.*chat_template: none") as dropped:
        tokenize(Pair("<|im_start|>user\nHi<|im_end|>\n", "Hello", "No"), 0)
    assert dropped.value.reason == "malformed"


# The template `none`


def test_none_takes_strings_as_they_are():
    tokenizer = tiny()
    tokenize = prepared(tokenizer, "none")
    result = tokenize(Pair("<s>Q: Hi</s>\nA:", " Hello", " No</s>"), 0)
    assert result.chosen_ids.tolist() == tokenizer("<s>Q: Hi</s>\nA: Hello</s>", add_special_tokens=False).input_ids
    assert result.rejected_ids.tolist() == tokenizer("<s>Q: Hi</s>\nA: No</s>", add_special_tokens=False).input_ids
    assert tokenizer.decode(result.chosen_ids[result.chosen_start :]) == " Hello</s>"


@pytest.mark.parametrize("pair", [Pair((Message("user", "Hi"),), "a", "b"), Pair("Hi", "a", "b", system="s")])
def test_none_needs_strings(pair):
    with pytest.raises(DataError, match="row 7") as error:
        prepared(tiny(), "none")(pair, 7)
    assert "chat_template" in error.value.hint


def test_a_response_needs_something_before_it():
    tokenizer = tiny()
    assert reason(prepared(tokenizer, "none"), Pair("", "a", "b")) == "empty"
    assert prepared(tokenizer, "none", add_bos=True)(Pair("", "a", "b"), 0).chosen_start == 1


# The assistant mask


DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "What is it?"),
    Message("assistant", " It is a\n"),
    Message("user", "And then?"),
    Message("assistant", "User: of\n\n"),
    Message("user", "Why?"),
)


@pytest.mark.parametrize(
    ("setting", "turns"),
    [
        ("plain", [" It is a\n", "User: of\n\n", "Because</s>"]),
        ("chatml", [" It is a\n<|im_end|>", "User: of\n\n<|im_end|>", "Because<|im_end|>"]),
        (QWEN3, [" It is a\n<|im_end|>", "User: of\n\n<|im_end|>", "<think>\n\n</think>\n\nBecause<|im_end|>"]),
        (THINKING, ["It is a</s>", "User: of</s>", "Because</s>"]),
        (MISTRAL, [" It is a\n</s>", "User: of\n\n</s>", "Because</s>"]),
    ],
)
def test_the_assistant_mask_holds_every_assistant_turn(setting, turns):
    tokenizer = tiny()
    tokenize = prepared(tokenizer, setting, nll_tokens="assistant")
    prompt = DIALOGUE if setting != MISTRAL else DIALOGUE[1:]
    result = tokenize(Pair(prompt, "Because", "No"), 0)
    runs = masked_runs(tokenizer, result)
    # Tokens that straddle a boundary belong where they end: compare without white space at the edges.
    assert [run.strip() for run in runs] == [turn.strip() for turn in turns]
    assert result.assistant_mask[result.chosen_start :].all()
    plain = prepared(tokenizer, setting)(Pair(prompt, "Because", "No"), 0)
    assert np.array_equal(plain.chosen_ids, result.chosen_ids)


def masked_runs(tokenizer, result) -> list[str]:
    mask = result.assistant_mask
    assert mask.dtype == bool
    assert mask.shape == result.chosen_ids.shape
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    return [tokenizer.decode(result.chosen_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_the_assistant_mask_of_phi3_whose_tokens_swallow_white_space():
    tokenizer = load("tokenizers/phi-3-mini")
    dialogue = (Message("user", "Hi"), Message("assistant", "It is a\n"), Message("user", "Why?"))
    result = prepared(tokenizer, "auto", nll_tokens="assistant")(Pair(dialogue, "Because", "No"), 0)
    assert masked_runs(tokenizer, result) == ["It is a\n<|end|>", "Because<|end|>"]


def test_the_assistant_mask_with_control_tokens_in_the_content_and_truncation():
    tokenizer = tiny()
    dialogue = (DIALOGUE[1], Message("assistant", "It <|im_end|> is"), Message("user", "<|im_start|>"))
    pair = Pair(dialogue, "Because", "No")
    result = prepared(tokenizer, "chatml", nll_tokens="assistant")(pair, 0)
    assert masked_runs(tokenizer, result) == ["It <|im_end|> is<|im_end|>", "Because<|im_end|>"]
    cut = prepared(
        tokenizer, "chatml", nll_tokens="assistant", overlong="truncate_response",
        max_length=result.chosen_start + 2, add_bos=True,
    )(pair, 0)  # fmt: skip
    assert cut.assistant_mask.sum() == result.assistant_mask[: result.chosen_start + 1].sum()
    assert len(cut.assistant_mask) == len(cut.chosen_ids)


def test_string_rows_and_none_have_one_assistant_turn():
    tokenizer = tiny()
    for setting in ("plain", "none"):
        result = prepared(tokenizer, setting, nll_tokens="assistant")(Pair("Hi", "Hello", "No"), 0)
        assert np.array_equal(result.assistant_mask, np.arange(len(result.chosen_ids)) >= result.chosen_start)


def test_a_template_that_forgets_earlier_answers_has_no_assistant_mask():
    forgetful = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(ModelError, match="assistant turn") as error:
        prepared(tiny(), forgetful, nll_tokens="assistant")
    assert "nll_tokens" in error.value.hint


# Length


def random_pairs(count: int, seed: int) -> list[Pair]:
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(
            draw.choices(["the", "answer", "is\n", "élan", "question?", "<|im_end|>"], k=draw.randint(1, longest))
        )

    pairs = []
    for _ in range(count):
        turns = [Message(("user", "assistant")[i % 2], text(12)) for i in range(draw.choice([1, 3, 5]))]
        system = [Message("system", text(4))] if draw.random() < 0.5 else []
        prompt = (*system, *turns) if draw.random() < 0.8 else text(30)
        pairs.append(Pair(prompt, text(14), text(14)))
    return pairs


def suffixes(pair: Pair) -> list[Pair]:
    """The pair with its prompt shortened from the front, whole exchanges at a time, the system turn kept."""
    if isinstance(pair.prompt, str):
        return [pair]
    system = [m for m in pair.prompt if m.role == "system"]
    turns = [m for m in pair.prompt if m.role != "system"]
    return [replace(pair, prompt=(*system, *turns[i:])) for i in range(0, len(turns), 2)]


def brute_force(whole, pair, overlong, max_length, max_prompt_length, min_response_tokens, add_bos):
    """((ids, start), (ids, start)) after truncation, or a reason to drop, from untruncated tokens alone."""
    limit = max_prompt_length or 10**9
    for shorter in suffixes(pair):
        full = whole(shorter, 0)
        sides = [(full.chosen_ids.tolist(), full.chosen_start), (full.rejected_ids.tolist(), full.rejected_start)]
        lengths, starts = [len(ids) for ids, _ in sides], [start for _, start in sides]
        fits = max(starts) <= limit and (overlong == "truncate_response" or max(lengths) <= max_length)
        if fits:
            break
    keep = int(add_bos)
    removed = 0
    while not fits:  # one token at a time, from the left but for BOS
        removed += 1
        sides = [(ids[:keep] + ids[keep + 1 :], start - 1) for ids, start in sides]
        if min(start for _, start in sides) < 1:
            return "overlong"
        longest, prompt = max(len(ids) for ids, _ in sides), max(start for _, start in sides)
        fits = prompt <= limit and (overlong == "truncate_response" or longest <= max_length)
    if overlong == "truncate_response":
        if any(max_length - start < min_response_tokens for _, start in sides):
            return "overlong"
        sides = [(ids[:max_length], start) for ids, start in sides]
    return "identical" if sides[0] == sides[1] else sides


@pytest.mark.parametrize("setting", ["plain", "chatml"])
@pytest.mark.parametrize("overlong", ["truncate_prompt", "truncate_response"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_truncation_equals_brute_force(setting, overlong, add_bos):
    tokenizer = tiny()
    whole = prepared(tokenizer, setting, add_bos=add_bos)
    draw = random.Random(0)
    outcomes = set()
    for index, pair in enumerate(random_pairs(40, seed=1)):
        try:
            whole(pair, 0)
        except Drop:
            continue
        for _ in range(5):
            policy = {
                "max_length": draw.randint(8, 160),
                "max_prompt_length": draw.choice([None, draw.randint(3, 80)]),
                "min_response_tokens": 1,
            }
            tokenize = PairTokenizer(tokenizer, whole.template, overlong=overlong, add_bos=add_bos, **policy)
            expected = brute_force(whole, pair, overlong, add_bos=add_bos, **policy)
            fitted = tokenize.fit(pair, whole.under("drop", limited=False)(pair, index))
            if isinstance(expected, str):
                assert isinstance(fitted, Drop)
                assert fitted.reason == expected
                assert reason(tokenize, pair) == expected
                outcomes.add(expected)
                continue
            result = tokenize(pair, index)
            assert_equal(result, expected)
            assert_equal(fitted, expected)
            assert fitted.truncated == result.truncated
            assert max(len(result.chosen_ids), len(result.rejected_ids)) <= policy["max_length"]
            assert min(result.chosen_start, result.rejected_start) >= 1
            full = whole(pair, 0)
            tokens = len(full.chosen_ids) + len(full.rejected_ids)
            assert result.truncated == (len(result.chosen_ids) + len(result.rejected_ids) < tokens)
            outcomes.add(result.truncated)
    assert {"overlong", True, False} <= outcomes


def test_drop_and_error_at_the_limits():
    tokenizer = tiny()
    pair = Pair("What is it?", "the answer", "the last question of them")
    whole = prepared(tokenizer, "plain")(pair, 0)
    longest, prompt = len(whole.rejected_ids), whole.rejected_start
    for limits, fits in (
        ({"max_length": longest}, True),
        ({"max_length": longest - 1}, False),
        ({"max_prompt_length": prompt}, True),
        ({"max_prompt_length": prompt - 1}, False),
    ):
        drop, error = prepared(tokenizer, **limits), prepared(tokenizer, overlong="error", **limits)
        if fits:
            assert np.array_equal(drop(pair, 3).rejected_ids, error(pair, 3).rejected_ids)
            continue
        assert reason(drop, pair) == "overlong"
        with pytest.raises(DataError, match=re.escape("row 3")) as raised:
            error(pair, 3)
        assert "overlong" in raised.value.hint


def test_truncation_never_cuts_a_response_for_the_prompt():
    # Prompt 100, answers 1000 and 900, limit 1024: each keeps all that the prompt leaves, not 24 tokens.
    tokenizer = load("tokenizers/gpt2")
    pair = Pair(" a" * 100, " b" * 1000, " c" * 900)
    result = prepared(tokenizer, "none", max_length=1024, overlong="truncate_response")(pair, 0)
    assert (len(result.chosen_ids), len(result.rejected_ids)) == (1024, 1001)
    assert result.chosen_ids[-1] != tokenizer.eos_token_id
    assert result.rejected_ids[-1] == tokenizer.eos_token_id
    result = prepared(tokenizer, "none", max_length=1024, overlong="truncate_prompt")(pair, 0)
    assert (result.chosen_start, result.rejected_start) == (23, 23)
    assert len(result.chosen_ids) == 1024


def test_too_few_response_tokens_are_empty():
    tokenizer = tiny()
    pair = Pair("What?", "abc def ghi", "x")
    count = len(prepared(tokenizer)(pair, 0).rejected_ids) - prepared(tokenizer)(pair, 0).rejected_start - 1
    assert prepared(tokenizer, min_response_tokens=count)(pair, 0)
    assert reason(prepared(tokenizer, min_response_tokens=count + 1), pair) == "empty"
    for setting in ("plain", "chatml", QWEN3):
        assert reason(prepared(tokenizer, setting), Pair("What?", "", "x")) == "empty"


def test_a_truncated_response_keeps_its_least():
    tokenizer = tiny()
    pair = Pair("What?", "the answer is what it is", "the answer is how it was")
    start = prepared(tokenizer)(pair, 0).chosen_start
    for room, expected in ((1, "overlong"), (2, "identical")):
        options = {"max_length": start + room, "min_response_tokens": 2, "overlong": "truncate_response"}
        assert reason(prepared(tokenizer, **options), pair) == expected


def test_identical_tokens_are_dropped():
    assert reason(prepared(tiny(), THINKING), Pair("What?", "same", " same ")) == "identical"


# Many rows at once


def test_batch_gives_each_row_its_result_in_order():
    tokenize = prepared(tiny(), "chatml", max_length=60)
    rows = [(3 * i, pair) for i, pair in enumerate(random_pairs(60, seed=2))]
    results = tokenize.batch(rows)
    assert {type(result).__name__ for result in results} == {"TokenizedPair", "Drop"}
    for (index, pair), result in zip(rows, results, strict=True):
        if isinstance(result, Drop):
            assert reason(tokenize, pair, index) == result.reason
            continue
        alone = tokenize(pair, index)
        assert result.index == index
        assert np.array_equal(result.chosen_ids, alone.chosen_ids)
        assert np.array_equal(result.rejected_ids, alone.rejected_ids)
        assert (result.chosen_start, result.rejected_start) == (alone.chosen_start, alone.rejected_start)
    assert tokenize.batch([]) == []


def test_the_tokenizers_own_truncation_and_padding_play_no_part():
    tokenizer = tiny()
    pair = Pair("What is it?", "the answer is what it is", "No")
    expected = prepared(tokenizer)(pair, 0)
    tokenizer("the answer is what it is", truncation=True, max_length=3, padding="max_length")
    assert np.array_equal(prepared(tokenizer)(pair, 0).chosen_ids, expected.chosen_ids)


@pytest.mark.parametrize(("name", "setting"), [("tokenizers/phi-3-mini", "auto"), ("tokenizers/gpt2", "chatml")])
def test_a_saved_and_reloaded_tokenizer_gives_the_same_tokens(tmp_path, name, setting):
    tokenizer = load(name)
    before = prepared(tokenizer, setting)
    tokenizer.save_pretrained(tmp_path)
    after = prepared(AutoTokenizer.from_pretrained(tmp_path), "auto")
    for pair in random_pairs(9, seed=3):
        expected, result = before(pair, 0), after(pair, 0)
        assert np.array_equal(result.chosen_ids, expected.chosen_ids)
        assert np.array_equal(result.rejected_ids, expected.rejected_ids)
        assert (result.chosen_start, result.rejected_start) == (expected.chosen_start, expected.rejected_start)


@pytest.mark.parametrize("overlong", ["truncate_prompt", "truncate_response"])
def test_what_no_policy_could_keep_is_not_looked_at(overlong, monkeypatch):
    """A long row gives the same tokens whether the part of it that goes is cut off before or after tokenising."""
    turns = [Message(role, f"{i} " + "é" * i) for i in range(60) for role in ("user", "assistant")]
    for pair in (
        Pair("q" * 900 + "?", "answer", "reply"),
        Pair("Q", "a" * 900, "b" * 20),
        Pair((Message("system", "s"), *turns, Message("user", "?")), "a" * 30, "b"),
    ):
        monkeypatch.setattr("orpo_cli.data.tokenize._LONGEST_TOKEN", 4)
        [early] = prepared(tiny(), "chatml", max_length=64, overlong=overlong).batch([(0, pair)])
        monkeypatch.setattr("orpo_cli.data.tokenize._LONGEST_TOKEN", 10**6)
        [late] = prepared(tiny(), "chatml", max_length=64, overlong=overlong).batch([(0, pair)])
        if isinstance(late, Drop):
            assert isinstance(early, Drop)
            assert early.reason == late.reason == "overlong"
        else:
            assert early.chosen_ids.tolist() == late.chosen_ids.tolist()
            assert early.rejected_ids.tolist() == late.rejected_ids.tolist()
            assert early.chosen_start == late.chosen_start
