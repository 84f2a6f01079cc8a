"""`orpo data` against counts made a second time, from the raw files, by programs that know only one shape each."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from orpo_cli import inspect
from orpo_cli.data.dataset import load_pairs
from orpo_cli.errors import DataError
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import Recipe
from tests.shared import hh_dialogues, shared

WIDE = 1_000_000


@pytest.fixture
def recipe_of(tiny_base):
    """`recipe_of(file, eval=...)`: plain template, a token a byte, BOS and EOS around it."""

    def make(train, *, model: dict | None = None, **data) -> Recipe:
        section = {"train": str(train), "max_length": WIDE, "max_dropped": 1.0, **data}
        base = {"name_or_path": str(tiny_base), "chat_template": "plain", **(model or {})}
        return Recipe.model_validate({"model": base, "data": section})

    return make


def summary_of(recipe: Recipe) -> dict:
    return inspect.summarise(inspect.open_data(recipe))


# Raw rows -> (turns of the prompt, chosen, rejected), or a reason


def raw_instructions():
    for row in json.loads(shared("data/instruction-preference.json").read_text()):
        question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
        yield [("User", question)], row["chosen"], row["rejected"]


def raw_hh():
    for chosen, rejected in hh_dialogues():
        names = [[who for who, _ in side[-2:]] for side in (chosen, rejected)]
        if chosen[:-1] != rejected[:-1] or names != [["Human", "Assistant"]] * 2:
            yield "diverged"
        else:
            prompt = [("User" if who == "Human" else who, said) for who, said in chosen[:-1]]
            yield prompt, chosen[-1][1], rejected[-1][1]


def raw_sharegpt():
    names = {"human": "User", "gpt": "Assistant", "system": "System"}
    for row in json.loads(shared("data/sharegpt-dpo-en.json").read_text()):
        prompt = [(names[turn["from"]], turn["value"]) for turn in row["conversations"]]
        yield prompt, row["chosen"]["value"], row["rejected"]["value"]


RAW = {
    "data/instruction-preference.json": raw_instructions,
    "data/hh-rlhf-harmless-test.jsonl.gz": raw_hh,
    "data/sharegpt-dpo-en.json": raw_sharegpt,
}


def reason_of(raw) -> str:
    if raw == "diverged":
        return raw
    prompt, chosen, rejected = raw
    if not prompt[-1][1].strip() or not chosen.strip() or not rejected.strip():
        return "empty"
    return "identical" if chosen == rejected else ""


def rendered(prompt) -> str:
    """The prompt in the plain template, up to where the answer begins."""
    turns = [said if who == "System" else f"{who}: {said}" for who, said in prompt]
    return "\n\n".join([*turns, "Assistant: "])


def size(text: str) -> int:
    return len(text.encode())


def nearest_rank(values: list[int], share: int) -> int:
    return sorted(values)[math.ceil(share * len(values) / 100) - 1]


def naive_similarity(chosen: str, rejected: str) -> float:
    sides = [[*answer.encode(), -1] for answer in (chosen, rejected)]
    first, second = (Counter(itertools.pairwise(side)) for side in sides)
    return 2 * (first & second).total() / (first.total() + second.total())


def is_odd(text: str) -> bool:
    marks = {0xAD, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF, 0xFFFD, *range(0x202A, 0x202F), *range(0x2060, 0x206A)}
    return any(
        (unicodedata.category(c) in ("Cc", "Co", "Zl", "Zp") and c not in "\t\n\r") or ord(c) in marks for c in text
    ) or any(sign in text for sign in ("â€", "Ã©", "Â "))


@pytest.mark.parametrize("file", RAW)
@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_figures_of_the_real_files_are_those_of_brute_force(recipe_of, file, streaming):
    found = summary_of(recipe_of(shared(file), streaming=streaming))["train"]
    raw = list(RAW[file]())
    reasons = [reason_of(row) for row in raw]
    pairs = [row for row, reason in zip(raw, reasons, strict=True) if not reason]
    assert found["rows"] == len(raw)
    assert found["pairs"] == len(pairs)
    assert found["dropped"] == Counter(filter(None, reasons))
    first = {reason: reasons.index(reason) for reason in found["dropped"]}
    assert all(f"row {first[reason]}" in example for reason, example in found["dropped_examples"].items())

    prompts = [1 + size(rendered(prompt)) for prompt, _, _ in pairs]  # BOS
    answers = {"chosen": [size(row[1]) + 1 for row in pairs], "rejected": [size(row[2]) + 1 for row in pairs]}  # EOS
    whole = [
        prompt + max(sides) for prompt, *sides in zip(prompts, answers["chosen"], answers["rejected"], strict=True)
    ]
    for name, values in {"prompt": prompts, **answers, "pair": whole}.items():
        expected = {f"p{share}": nearest_rank(values, share) for share in (50, 90, 95, 99)}
        expected |= {"max": max(values), "mean": pytest.approx(sum(values) / len(values))}
        assert found["tokens"][name] == expected

    longer = Counter((a > b) - (a < b) for a, b in zip(answers["chosen"], answers["rejected"], strict=True))
    bias = found["length_bias"]
    assert (bias["chosen_longer"], bias["rejected_longer"], bias["equal"]) == (longer[1], longer[-1], longer[0])
    assert bias["share_ci95"][0] < bias["share"] < bias["share_ci95"][1]

    keys = [(rendered(prompt), chosen, rejected) for prompt, chosen, rejected in pairs]
    assert found["duplicates"]["pairs"] == len(keys) - len(set(keys))
    assert found["duplicates"]["prompts"] == len(keys) - len({prompt for prompt, _, _ in keys})
    assert found["duplicates"]["swapped"] == sum((p, r, c) in set(keys) for p, c, r in keys)
    assert found["alike"]["pairs"] == sum(naive_similarity(c, r) >= inspect.ALIKE for _, c, r in pairs)
    last = [prompt[-1][1].strip() for prompt, _, _ in pairs]
    assert found["repeats_prompt"]["pairs"] == sum(
        len(question) >= 16 and (c.lstrip().startswith(question) or r.lstrip().startswith(question))
        for question, (_, c, r) in zip(last, pairs, strict=True)
    )
    texts = [[*(said for _, said in prompt), chosen, rejected] for prompt, chosen, rejected in pairs]
    assert found["odd_unicode"]["pairs"] == sum(any(map(is_odd, row)) for row in texts)
    looks = re.compile(r"<\|[^\s<>|]+\|?>|</?s>|<pad>|<(start|end)_of_\w+>|<[^\s<>|]+\|>")
    assert found["special_tokens"]["pairs"] == sum(any(map(looks.search, row)) for row in texts)


def test_what_is_known_of_the_real_files_is_found(recipe_of):
    dropped = {file: summary_of(recipe_of(shared(file)))["train"]["dropped"] for file in RAW}
    assert dropped["data/instruction-preference.json"]["identical"] == 6
    hh = dropped["data/hh-rlhf-harmless-test.jsonl.gz"]
    assert (hh["empty"], hh["diverged"]) == (4, 5)


# Made data, where everything is planted


def row(i: int, **changes) -> dict:
    return {"prompt": f"What is the number {i}?", "chosen": f"It is {i}.", "rejected": f"Nobody knows {i}.", **changes}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_a_planted_overlap_is_found(recipe_of, tmp_path, streaming):
    train = [row(i) for i in range(40)]
    held_out = [row(7), row(9, chosen="Nine."), row(9, chosen="IX."), row(100), row(7)]
    summary = summary_of(
        recipe_of(
            write(tmp_path / "train.jsonl", train),
            eval=write(tmp_path / "eval.jsonl", held_out),
            streaming=streaming,
        )
    )
    overlap = summary["overlap"]
    assert (overlap["prompts"], overlap["pairs"]) == (4, 2)
    assert ["row 0 " in overlap["examples"][0]["row"], "row 7 " in overlap["examples"][0]["what"]] == [True, True]
    assert any("4 of 5 held-out pairs have a prompt that is trained on" in warning for warning in summary["warnings"])
    assert summary["eval"]["duplicates"]["pairs"] == 1
    assert summary["train"]["duplicates"]["pairs"] == 0


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_held_out_pairs_of_the_training_data_are_counted_apart(recipe_of, tmp_path, streaming):
    rows = [row(i) for i in range(30)] + [row(3), row(4, chosen=" "), row(5)]
    recipe = recipe_of(
        write(tmp_path / "train.jsonl", rows), eval={"holdout": 6}, deduplicate=True, streaming=streaming
    )
    summary = summary_of(recipe)
    train, held_out = summary["train"], summary["eval"]
    assert (train["rows"], train["pairs"], train["dropped"]) == (33, 24, {"duplicate": 2, "empty": 1})
    assert (train["held_out"], held_out["rows"], held_out["pairs"], held_out["dropped"]) == (6, 33, 6, {})
    assert (summary["overlap"]["prompts"], summary["overlap"]["pairs"]) == (0, 0)
    assert sum(train["overlong"]["drop"].values()) == 24
    data = inspect.open_data(recipe)
    indices = {name: [pair.index for pair in inspect.kept_pairs(pairs)] for name, pairs in data.sets().items()}
    assert sorted(indices["train"] + indices["eval"]) == list(range(30))
    assert indices["train"] == sorted(indices["train"])
    with pytest.raises(DataError, match=r"row 31 is no pair of this set.*empty"):
        inspect.pair_at(data.training, 31)
    for elsewhere in (indices["eval"][0], 30):
        with pytest.raises(DataError, match="no pair of this set"):
            inspect.pair_at(data.training, elsewhere)
    for outside in (33, -1):
        with pytest.raises(DataError, match="there is no row"):
            inspect.pair_at(data.training, outside)
    assert inspect.pair_at(data.held_out, indices["eval"][2]).index == indices["eval"][2]


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt", "truncate_response", "error"])
@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("limits", [{"max_length": 70}, {"max_length": 90, "max_prompt_length": 70}])
def test_what_each_policy_would_do_is_what_it_does(recipe_of, tmp_path, overlong, streaming, limits):
    rows = [row(i, prompt="Why? " * (i % 13 + 1), chosen=f"Since {i} " * (i % 7 + 1)) for i in range(91)]
    path = write(tmp_path / "train.jsonl", rows)
    limits = {**limits, "streaming": streaming}
    summary = summary_of(recipe_of(path, overlong=overlong, **limits))["train"]
    for policy in ("drop", "truncate_prompt", "truncate_response"):
        recipe = recipe_of(path, overlong=policy, **limits)
        pairs, _ = load_pairs(recipe.data, pair_tokenizer(recipe, load_text_side(recipe)), recipe.train)
        expected = {"whole": pairs.pairs - pairs.truncated, "truncated": pairs.truncated, "dropped": 91 - pairs.pairs}
        assert summary["overlong"][policy] == expected
        if policy == overlong:
            assert (summary["pairs"], summary["truncated"]) == (pairs.pairs, pairs.truncated)
            assert summary["dropped"] == pairs.dropped
    # Only a prompt that is not to be cut can leave no room for its answers.
    assert (summary["overlong"]["truncate_response"]["dropped"] > 0) == ("max_prompt_length" not in limits)
    sizes = [size(f"User: {r['prompt']}\n\nAssistant: ") + 1 for r in rows]
    lengths = [at + max(size(r["chosen"]), size(r["rejected"])) + 1 for at, r in zip(sizes, rows, strict=True)]
    assert summary["tokens"]["pair"]["p90"] == nearest_rank(lengths, 90)  # of all, before any is cut or dropped


def test_findings_have_their_first_examples_and_warnings_say_what_to_do(recipe_of, tmp_path):
    long = "It is a long answer with many words in it, and it ends in the number "
    rows = [row(i) for i in range(20)]
    rows += [row(20, chosen="It is.", rejected="No."), row(20, chosen="No.", rejected="It is.")]  # contradicting
    rows += [row(22, chosen=f"{long}1.", rejected=f"{long}2."), row(23, chosen=f"{long}3.", rejected=f"{long}4.")]
    rows += [row(24, chosen="What is the number 24? It is 24.")]
    rows += [row(25, rejected="Nobody knows.<|im_end|>"), row(26, prompt="What is </s> in HTML, and <|im_end|>?")]
    rows += [
        row(27, chosen="caf\u00c3\u00a9"),
        row(28, chosen="It\u200b is\x07 so."),
        row(29, chosen="می\u200cخواهم 👩\u200d🚀"),
    ]
    templated = [{"role": "assistant", "content": "<|im_start|>assistant\nIt is."}]
    rows += [row(30, chosen=templated, rejected=[{"role": "assistant", "content": "No."}])]
    summary = summary_of(recipe_of(write(tmp_path / "train.jsonl", rows)))
    found = summary["train"]
    assert (found["templated"]["pairs"], found["templated"]["examples"][0]["what"]) == (1, "<|im_start|>")
    assert (found["duplicates"]["swapped"], found["duplicates"]["prompts"]) == (2, 1)
    [swapped] = found["duplicates"]["swapped_examples"]
    assert "row 20 " in swapped["row"]
    assert "row 21 " in swapped["what"]
    assert found["alike"]["pairs"] == 2
    assert "1." in found["alike"]["examples"][0]["what"]
    assert (found["repeats_prompt"]["pairs"], found["repeats_prompt"]["examples"][0]["what"]) == (1, "chosen")
    names = {"<|im_end|>": 2, "</s>": 1, "<|im_start|>": 1}
    assert (found["special_tokens"]["pairs"], found["special_tokens"]["names"]) == (3, names)
    assert (found["odd_unicode"]["pairs"], set(found["odd_unicode"]["names"])) == (
        2,
        {"UTF-8 misread", "invisible characters", "control characters"},
    )
    said = "\n".join(summary["warnings"])
    for advice in (
        "judges disagree",
        "loss.beta: 0",
        "begins with its prompt",
        "templated already",
        "stay text",
        "odd characters",
        "shorter answer",
    ):
        assert advice in said
    assert "held-out" not in said


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"max_length": 64}, "truncate_prompt keeps the answers"),
        ({"max_length": 64, "overlong": "error"}, "stops at the first"),
        ({"max_length": 64, "overlong": "truncate_response"}, "teach no end"),
        ({"max_dropped": 0.05}, "refuses (data.max_dropped: 0.05)"),
        ({"strict": True}, "first malformed row"),
        ({}, "data.deduplicate: true"),
        ({}, "context of the model 128 tokens"),
    ],
)
def test_warnings_of_the_recipe(recipe_of, tmp_path, changes, advice):
    rows = [row(i) for i in range(8)] + [row(1), row(2), row(8, chosen=5)]
    rows += [row(11 + i, prompt="What is the number of it, " * 3) for i in range(2)]
    recipe = recipe_of(write(tmp_path / "train.jsonl", rows), **changes)
    warnings = summary_of(recipe)["warnings"]
    assert any(advice in warning for warning in warnings), warnings


@pytest.mark.parametrize(
    ("name", "templated", "advice"),
    [
        ("Llama-3.1-8B", False, None),
        ("Llama-3.1-8B-Instruct", True, "'Instruct' in its name"),
        ("gemma-2-2b-it", False, "'it' in its name"),
        ("edit-model", False, None),
        ("Qwen3-8B", True, "brings a chat template"),
        ("Qwen3-8B-Base", True, None),
    ],
)
def test_an_instruct_model_is_warned_of(recipe_of, tiny_base, tmp_path, name, templated, advice):
    base = tmp_path / name
    shutil.copytree(tiny_base, base)
    if templated:
        (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    recipe = recipe_of(
        write(tmp_path / "t.jsonl", [row(i) for i in range(4)]), model={"name_or_path": str(base)}, max_length=100
    )
    warnings = [warning for warning in summary_of(recipe)["warnings"] if "ORPO teaches a base model" in warning]
    assert len(warnings) == (advice is not None)
    assert all(advice in warning for warning in warnings)


# Pairs for programs


@pytest.mark.parametrize("tokenizer", ["gpt2", "phi-3-mini"])
def test_ids_are_those_of_the_whole_text_parted_at_its_prompt(recipe_of, tmp_path, tokenizer):
    model = {"name_or_path": str(shared(f"tokenizers/{tokenizer}")), "chat_template": "none"}
    stock = AutoTokenizer.from_pretrained(model["name_or_path"])
    rows = [row(i, chosen=" It is.", rejected=f" {i}") for i in range(9)]
    rows += [row(9, prompt="The beginning", chosen="s of it", rejected=" of it")]  # a token across the boundary
    data = inspect.open_data(recipe_of(write(tmp_path / "train.jsonl", rows), model=model))
    for pair, raw in zip(inspect.kept_pairs(data.training), rows, strict=True):
        given = inspect.pair_object(pair)
        for side in ("chosen", "rejected"):
            encoded = stock(raw["prompt"] + raw[side], return_offsets_mapping=True, add_special_tokens=False)
            is_response = [end > len(raw["prompt"]) for _, end in encoded["offset_mapping"]]
            answer = [i for i, inside in zip(encoded["input_ids"], is_response, strict=True) if inside]
            assert given[f"{side}_ids"] == [*answer, stock.eos_token_id]
            before = given["prompt_ids"] if side == "chosen" else given.get("rejected_prompt_ids", given["prompt_ids"])
            assert [*before, *given[f"{side}_ids"]] == [*encoded["input_ids"], stock.eos_token_id]
        assert list(given)[:4] == ["index", "prompt_ids", "chosen_ids", "rejected_ids"]


ODD_TEXT = "naïve ✓ 世界 \U0001f469\u200d\U0001f52c é\ufffd<0x41> a\n\tb"


@pytest.mark.parametrize("tokenizer", ["tiny", "gpt2", "pythia", "phi-3-mini"])
def test_the_texts_of_tokens_are_those_of_the_data_byte_by_byte(tiny_base, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tiny_base if tokenizer == "tiny" else shared(f"tokenizers/{tokenizer}"))
    ids = loaded(f"x {ODD_TEXT}", add_special_tokens=False)["input_ids"]
    texts = inspect.token_texts(loaded, ids)
    assert len(texts) == len(ids)
    if tokenizer == "tiny":  # a token a byte
        assert texts[: len("x na")] == ["x", " ", "n", "a"]
        assert texts[4:7] == ["<0xC3>", "<0xAF>", "v"]
    again = re.sub(rb"<0x([0-9A-F]{2})>", lambda match: bytes.fromhex(match[1].decode()), "".join(texts).encode())
    assert again.decode().lstrip() == f"x {ODD_TEXT}".replace("<0x41>", "A")


def test_a_pair_is_shown_without_a_character_that_it_has_not(tiny_recipe, tmp_path, orpo):
    path = write(tmp_path / "train.jsonl", [row(0, chosen="Ça va ✓")])
    _, out, _ = orpo("data", tiny_recipe(data={"train": path, "eval": None}))
    assert "<0xC3><0x87>a va <0xE2><0x9C><0x93>" in out
    assert "\ufffd" not in out
