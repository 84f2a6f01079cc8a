"""One small file for each of the well-known preference data sets, with columns and values as their public cards say.

The contents are made up. `orpo data` takes each file as it is, or refuses it with the keys to write; with these it is
taken. What it makes of each is compared, token by token, with texts and ids that are put together here, without the
package: by hand for the template `plain`, by transformers' own `apply_chat_template` where the tokenizer has one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from tests.shared import shared

Turn = dict[str, str]


def system(text: str) -> Turn:
    return {"role": "system", "content": text}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def human(text: str) -> Turn:
    return {"from": "human", "value": text}


def gpt(text: str) -> Turn:
    return {"from": "gpt", "value": text}


@dataclass(frozen=True)
class Pair:
    """What a row must become, and which row it is."""

    row: int
    turns: Sequence[Turn]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Schema:
    """Rows after a card, the pairs that they hold, and how many rows are dropped for which reason.

    `format`: what is recognised. `refused`: only with the keys that the hint gives. `keys`: what the card advises to
    leave out, written as the recipe's own filter.
    """

    rows: list[dict[str, Any]]
    pairs: list[Pair]
    format: str
    dropped: dict[str, int] = field(default_factory=dict)
    refused: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    file: str = "rows.jsonl"


def orca(question: str, **columns: Any) -> dict[str, Any]:
    """A row of distilabel-intel-orca-dpo-pairs."""
    row: dict[str, Any] = {
        "system": "You are an AI assistant.",
        "input": question,
        "chosen": "Four.",
        "rejected": "Five, I think.",
        "generations": ["Four.", "Five, I think."],
        "order": ["chosen", "rejected"],
        "labelling_model": "a-judge",
        "labelling_prompt": [{"content": "Judge.", "role": "system"}, {"content": question, "role": "user"}],
        "raw_labelling_response": "9 3\nThe first is right.",
        "rating": [9.0, 3.0],
        "rationale": "The first is right.",
        "status": "unchanged",
        "original_chosen": "Four.",
        "original_rejected": "Five, I think.",
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    }
    return row | columns


def shp(history: str, first: str, second: str, label: Any) -> dict[str, Any]:
    """A row of SHP: label 1 says that A was preferred, 0 that B was."""
    return {
        "post_id": "t3x",
        "domain": "askbakers_train",
        "upvote_ratio": 0.98,
        "history": history,
        "c_root_id_A": "a1",
        "c_root_id_B": "b2",
        "created_at_utc_A": 1636110000,
        "created_at_utc_B": 1636120000,
        "score_A": 12 if label == 1 else 3,
        "score_B": 3 if label == 1 else 12,
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": label,
        "seconds_difference": 10000.0,
        "score_ratio": 4.0,
    }


def helpsteer(prompt: str, response: str, helpfulness: int | None) -> dict[str, Any]:
    """A row of HelpSteer and HelpSteer2: one answer, and what it is worth by five measures from 0 to 4."""
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": helpfulness,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    }


def preference(strength: int, first: str, second: str, prompt: str = "Name a river.") -> dict[str, Any]:
    """A row of HelpSteer2-preference: from -3, the first is much better, to 3, the second is."""
    return {
        "split": "train",
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": strength,
        "preference_statement": None if strength == 0 else "One answers, the other does not.",
        "preference_elaboration": None,
        "three_most_similar_preferences": [{"statement": None, "elaboration": None, "strength": strength}] * 3,
        "all_preferences_unprocessed": [{"statement": None, "elaboration": None, "strength": strength}] * 4,
    }


def reply(text: str, rank: int | None, *replies: dict[str, Any], role: str = "assistant") -> dict[str, Any]:
    """A message in one of OpenAssistant's trees; of its siblings, the one with the lowest rank is the best."""
    return {
        "message_id": f"id of {text}",
        "parent_id": None,
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "emojis": {"+1": 2},
        "replies": list(replies),
        "labels": {"quality": {"value": 0.75, "count": 4}},
    }


def tree(prompt: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt}


def completion(response: str, overall_score: float) -> dict[str, Any]:
    """One of the four answers in a row of UltraFeedback."""
    return {
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "Fine.", "Type": ["1"]}},
        "custom_system_prompt": "Be helpful.",
        "model": "some-model",
        "principle": "helpfulness",
        "response": response,
        "critique": "It could be better.",
        "fine-grained_score": 4.25,
        "overall_score": overall_score,
    }


HAIKU = "Write a haiku about tea."
FIRST = [user(HAIKU), assistant("Steam climbs, leaf unfolds"), user("Two more lines, please ☕")]
SCHEMAS: dict[str, Schema] = {
    "orpo-dpo-mix-40k": Schema(
        [
            {
                "source": "Airoboros",
                "chosen": [user("Name a prime number."), assistant("Seven.")],
                "rejected": [user("Name a prime number."), assistant("Nine.\n\nOr is it?")],
                "prompt": "Name a prime number.",
                "question": "Name a prime number.",
            },
            {
                "source": "argilla/distilabel-capybara-dpo-7k-binarized",
                "chosen": [*FIRST, assistant("a cup warms cold hands\nmorning begins twice")],
                "rejected": [*FIRST, assistant("Tea is nice.")],
                "prompt": HAIKU,
                "question": HAIKU,
            },
            {
                "source": "toxic-dpo-v0.2",
                "chosen": [user("Do harm."), assistant("Gladly.")],
                "rejected": [user("Do harm."), assistant("No.")],
                "prompt": "Do harm.",
                "question": "Do harm.",
            },
            {
                "source": "prm_dpo_pairs_cleaned",
                "chosen": [user("1 + 1?"), assistant("2")],
                "rejected": [user("1 + 1?"), assistant("2")],
                "prompt": "1 + 1?",
                "question": None,
            },
        ],
        [
            Pair(0, [user("Name a prime number.")], "Seven.", "Nine.\n\nOr is it?"),
            Pair(1, FIRST, "a cup warms cold hands\nmorning begins twice", "Tea is nice."),
        ],
        "prompt",
        {"filtered": 1, "identical": 1},
        keys={"filter": [{"column": "source", "ne": "toxic-dpo-v0.2"}]},
        file="rows.parquet",
    ),
    "UltraFeedback binarized": Schema(
        [
            {
                "prompt": "What is basalt?\n",
                "prompt_id": "5f" * 32,
                "chosen": [user("What is basalt?\n"), assistant("A dark volcanic rock.")],
                "rejected": [user("What is basalt?\n"), assistant("I cannot say.")],
                "messages": [user("What is basalt?\n"), assistant("A dark volcanic rock.")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            },
            {  # scored alike, and not the same: the card keeps such rows
                "prompt": "Say hi.",
                "prompt_id": "6a" * 32,
                "chosen": [user("Say hi."), assistant("Hi!")],
                "rejected": [user("Say hi."), assistant("hi")],
                "messages": [user("Say hi."), assistant("Hi!")],
                "score_chosen": 5.0,
                "score_rejected": 5.0,
            },
            {
                "prompt": "Say nothing.",
                "prompt_id": "7b" * 32,
                "chosen": [user("Say nothing."), assistant("As you wish.")],
                "rejected": [user("Say nothing."), assistant("")],
                "messages": [user("Say nothing."), assistant("As you wish.")],
                "score_chosen": 7.0,
                "score_rejected": 1.0,
            },
        ],
        [
            Pair(0, [user("What is basalt?\n")], "A dark volcanic rock.", "I cannot say."),
            Pair(1, [user("Say hi.")], "Hi!", "hi"),
        ],
        "prompt",
        {"empty": 1},
        file="train_prefs-00000-of-00001.parquet",
    ),
    "UltraFeedback": Schema(
        [
            {
                "source": "sharegpt",
                "instruction": "What floats?",
                "models": ["a", "b", "c", "d"],
                "completions": [
                    completion("Lead.", 2.0),
                    completion("Cork.", 8.5),
                    completion("Cork and ice do.", 8.5),
                    completion("Stones.", 1.5),
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            },
            {
                "source": "evol_instruct",
                "instruction": "What sinks?",
                "models": ["a", "b"],
                "completions": [completion("Lead.", 7.0), completion("Iron.", 7.0)],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            },
        ],
        [Pair(0, [user("What floats?")], "Cork.", "Stones.")],
        "prompt",
        {"filtered": 1},
        refused=True,
    ),
    "distilabel-intel-orca-dpo-pairs": Schema(
        [
            orca("2 + 2?"),
            orca("2 + 2, quickly?", system=""),
            orca("Two and two?", system=None),
            orca("3 + 1?", status="tie", chosen="4", rejected="four"),
            orca("8 / 2?", chosen_score=5.0),
            orca("1 + 3?", status="swapped", chosen="Four is right.", original_chosen="Five, I think."),
            orca("6 - 2?", chosen_score=None, status="unchanged", rating=None),
        ],
        [
            Pair(0, [system("You are an AI assistant."), user("2 + 2?")], "Four.", "Five, I think."),
            Pair(1, [user("2 + 2, quickly?")], "Four.", "Five, I think."),
            Pair(2, [user("Two and two?")], "Four.", "Five, I think."),
            Pair(5, [system("You are an AI assistant."), user("1 + 3?")], "Four is right.", "Five, I think."),
        ],
        "input",
        {"filtered": 3},
        keys={
            "filter": [
                {"column": "status", "ne": "tie"},
                {"column": "chosen_score", "ge": 8},
                {"column": "in_gsm8k_train", "eq": False},
            ]
        },
        file="rows.parquet",
    ),
    "Intel orca_dpo_pairs": Schema(
        [
            {
                "system": "",
                "question": "You will be given a definition.\n\nWhat is a fjord?",
                "chosen": "A fjord is a narrow sea inlet between cliffs.",
                "rejected": " Sure! Here is what a fjord is:\n1. water",
            },
            {
                "system": "You are a helpful assistant, who always provides explanation.",
                "question": "Is ice lighter than water?",
                "chosen": "Yes, it floats.",
                "rejected": "No.",
            },
        ],
        [
            Pair(
                0,
                [user("You will be given a definition.\n\nWhat is a fjord?")],
                "A fjord is a narrow sea inlet between cliffs.",
                " Sure! Here is what a fjord is:\n1. water",
            ),
            Pair(
                1,
                [
                    system("You are a helpful assistant, who always provides explanation."),
                    user("Is ice lighter than water?"),
                ],
                "Yes, it floats.",
                "No.",
            ),
        ],
        "question",
    ),
    "HH-RLHF": Schema(
        [
            {
                "chosen": "\n\nHuman: How do I fold a crane?\n\nAssistant: From paper?\n\nHuman: yes\n\n"
                "Assistant: Begin with a square.\n\nThen fold it twice.",
                "rejected": "\n\nHuman: How do I fold a crane?\n\nAssistant: From paper?\n\nHuman: yes\n\n"
                "Assistant: Human: hands fold it.",
            },
            {
                "chosen": "\n\nHuman: Hello \n\nAssistant: Hello!",
                "rejected": "\n\nHuman: Hello \n\nAssistant:",
            },
            {
                "chosen": "\n\nHuman: Is it late?\n\nAssistant: It is noon.",
                "rejected": "\n\nHuman: Is it early?\n\nAssistant: It is noon, so no.",
            },
        ],
        [
            Pair(
                0,
                [user("How do I fold a crane?"), assistant("From paper?"), user("yes")],
                "Begin with a square.\n\nThen fold it twice.",
                "Human: hands fold it.",
            )
        ],
        "hh",
        {"empty": 1, "diverged": 1},
        file="rows.jsonl.gz",
    ),
    "SHP": Schema(
        [
            shp("Why does bread rise?\n\nMine does not.", "Yeast. Is yours old?", "It is magic.", 1),
            shp("How hot for a pizza?", "Lukewarm.", "As hot as your oven goes.", 0),
            shp("Rye or wheat?", "Rye.", "Wheat.", None),
        ],
        [
            Pair(0, [user("Why does bread rise?\n\nMine does not.")], "Yeast. Is yours old?", "It is magic."),
            Pair(1, [user("How hot for a pizza?")], "As hot as your oven goes.", "Lukewarm."),
        ],
        "judged",
        {"malformed": 1},
    ),
    "stack-exchange-paired": Schema(
        [
            {
                "qid": 8841,
                "question": "How do I reverse a list?\n\n```\nx = [1, 2]\n```",
                "date": "2012/03/04",
                "metadata": ["https://stackoverflow.com/questions/8841", "https://stackoverflow.com"],
                "response_j": "Call `x.reverse()`; it works in place.",
                "response_k": "Why would you?",
            }
        ],
        [
            Pair(
                0,
                [user("How do I reverse a list?\n\n```\nx = [1, 2]\n```")],
                "Call `x.reverse()`; it works in place.",
                "Why would you?",
            )
        ],
        "paired",
        file="rows.parquet",
    ),
    "HelpSteer": Schema(
        [  # up to four answers to a prompt
            helpsteer("Name a metal.", "Wood.", 0),
            helpsteer("Name a metal.", "Iron, which rusts.", 4),
            helpsteer("Name a metal.", "Iron.", 3),
            helpsteer("Name a metal.", "Metal.", 1),
            helpsteer("Name a gas.", "Argon.", 4),
            helpsteer("Name a gas.", "Neon.", 4),
            helpsteer("Name a liquid.", "Water.", None),
            helpsteer("Name a stone.", "Flint.", 4),
            helpsteer("Name a tree.", "Grass.", 0),
            helpsteer("Name a tree.", "Oak.", 2),
        ],
        [
            Pair(0, [user("Name a metal.")], "Iron, which rusts.", "Wood."),
            Pair(4, [user("Name a tree.")], "Oak.", "Grass."),
        ],
        "prompt",
        {"filtered": 2, "malformed": 1},
        refused=True,
        file="train.jsonl.gz",
    ),
    "HelpSteer2": Schema(
        [  # two answers to a prompt, which may have several turns
            helpsteer("c#", "A language by Microsoft.", 3),
            helpsteer("c#", "A note.", 1),
            helpsteer("Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nWho are you?", "You.", 0),
            helpsteer("Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nWho are you?", "A model.", 4),
        ],
        [
            Pair(0, [user("c#")], "A language by Microsoft.", "A note."),
            Pair(1, [user("Hi"), assistant("Hello."), user("Who are you?")], "A model.", "You."),
        ],
        "prompt",
        refused=True,
    ),
    "HelpSteer2-preference": Schema(
        [
            preference(-2, "The Elbe.", "A lake."),
            preference(1, "Water.", "The Rhine, for one."),
            preference(0, "The Oder.", "The Ems."),
            preference(-3, "Hello!", "No.", "Hm\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nSay hello"),
        ],
        [
            Pair(0, [user("Name a river.")], "The Elbe.", "A lake."),
            Pair(1, [user("Name a river.")], "The Rhine, for one.", "Water."),
            Pair(3, [user("Hm"), assistant("Yes?"), user("Say hello")], "Hello!", "No."),
        ],
        "judged",
        {"filtered": 1},
        file="preference.jsonl.gz",
    ),
    "HelpSteer3": Schema(
        [
            {
                "domain": "general",
                "language": "english",
                "context": [user("Hm"), assistant("Yes?"), user("Say hello")],
                "response1": "No.",
                "response2": "Hello!",
                "overall_preference": strength,
                "individual_preference": [
                    {"score": strength, "reasoning": "It does.", "feedback1": "", "feedback2": ""}
                ],
            }
            for strength in (3, 0, -1)
        ],
        [
            Pair(0, [user("Hm"), assistant("Yes?"), user("Say hello")], "Hello!", "No."),
            Pair(2, [user("Hm"), assistant("Yes?"), user("Say hello")], "No.", "Hello!"),
        ],
        "judged",
        {"filtered": 1},
    ),
    "Argilla capybara": Schema(
        [
            {
                "source": "Airoboros",
                "conversation": [
                    {"input": HAIKU, "output": "Steam climbs, leaf unfolds"},
                    {"input": "Two more lines, please ☕", "output": "a cup warms cold hands"},
                ],
                "original_response": "a cup warms cold hands",
                "generation_prompt": ["<|im_start|>user\nTwo more lines", "[INST] Two more lines [/INST]"],
                "raw_generation_responses": [" it is hot", "Tea!"],
                "new_generations": ["it is hot", "Tea!"],
                "prompt": HAIKU,
                "chosen": [*FIRST, assistant("a cup warms cold hands")],
                "rejected": [*FIRST, assistant("it is hot")],
                "rating_chosen": 5,
                "rating_rejected": 2,
                "chosen_model": "original",
                "rejected_model": "a-7b",
            }
        ],
        [Pair(0, FIRST, "a cup warms cold hands", "it is hot")],
        "prompt",
        file="rows.parquet",
    ),
    "OpenAssistant trees": Schema(
        [
            tree(
                reply(
                    "What is a sonnet?",
                    None,
                    reply("A song.", 2),
                    reply("A poem of 14 lines.", 0, reply("Thanks!", None, role="prompter")),
                    reply("A poem.", 1),
                    reply("sonnet sonnet", None),
                    role="prompter",
                )
            ),
            tree(reply("What is a limerick?", None, reply("A poem of five lines.", 0), role="prompter")),
            tree(reply("Nobody answered.", None, role="prompter")),
            tree(reply("Und ein Sonett?", None, reply("Ein Lied", 1), reply("Ein Gedicht", 0), role="prompter")),
        ],
        [
            Pair(0, [user("What is a sonnet?")], "A poem of 14 lines.", "A song."),
            Pair(3, [user("Und ein Sonett?")], "Ein Gedicht", "Ein Lied"),
        ],
        "prompt",
        {"filtered": 1, "malformed": 1},
        refused=True,
        file="oasst_ready.trees.jsonl.gz",
    ),
    "OpenAssistant ranked, the best answer first": Schema(
        [
            {
                "instruction": "And in French?",
                "input": "",
                "output": ["Bonjour.", "Salut, mon vieux.", "Ciao."],
                "history": [["How do I greet someone in German?", "Guten Tag."]],
            },
            {"instruction": "Say no.", "input": "", "output": ["No.", "Yes."], "history": []},
        ],
        [
            Pair(
                0,
                [user("How do I greet someone in German?"), assistant("Guten Tag."), user("And in French?")],
                "Bonjour.",
                "Ciao.",
            ),
            Pair(1, [user("Say no.")], "No.", "Yes."),
        ],
        "alpaca",
        refused=True,
        file="rows.json",
    ),
    "Alpaca": Schema(
        [
            {
                "instruction": "Correct the spelling.",
                "input": "recieve",
                "output": "receive",
                "chosen": "receive",
                "rejected": "recieve is right.",
            },
            {"instruction": "Name a colour.", "input": "", "output": "", "chosen": "Blue.", "rejected": "Seven."},
            {
                "instruction": "Now in capitals.",
                "input": None,
                "chosen": "HALLO",
                "rejected": "hallo",
                "system": "Be brief.",
                "history": [["Translate hello into German.", "hallo"]],
            },
        ],
        [
            Pair(0, [user("Correct the spelling.\n\nrecieve")], "receive", "recieve is right."),
            Pair(1, [user("Name a colour.")], "Blue.", "Seven."),
            Pair(
                2,
                [
                    system("Be brief."),
                    user("Translate hello into German."),
                    assistant("hallo"),
                    user("Now in capitals."),
                ],
                "HALLO",
                "hallo",
            ),
        ],
        "alpaca",
        file="rows.json",
    ),
    "Alpaca, both answers in the output": Schema(
        [{"instruction": "Add.", "input": "1 + 2", "output": ["3", "The sum is 12."]}],
        [Pair(0, [user("Add.\n\n1 + 2")], "3", "The sum is 12.")],
        "alpaca",
        refused=True,
        file="comparison.json",
    ),
    "ShareGPT": Schema(
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    human("Name a bird."),
                    gpt("Wren."),
                    human("More"),
                ],
                "chosen": gpt("Finch."),
                "rejected": gpt("A wren is a small bird.\r\nIt sings."),
            },
            {"conversations": [human("Name a fish.")], "chosen": gpt("Trout."), "rejected": gpt("")},
        ],
        [
            Pair(
                0,
                [system("Be brief."), user("Name a bird."), assistant("Wren."), user("More")],
                "Finch.",
                "A wren is a small bird.\r\nIt sings.",
            )
        ],
        "sharegpt",
        {"empty": 1},
        file="rows.json",
    ),
    "ShareGPT, whole dialogues": Schema(
        [{"chosen": [human("Name a bird."), gpt("Wren.")], "rejected": [human("Name a bird."), gpt("Bird.")]}],
        [Pair(0, [user("Name a bird.")], "Wren.", "Bird.")],
        "messages",
    ),
}
REFUSED = [name for name, schema in SCHEMAS.items() if schema.refused]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# The reference, which knows nothing of the package


@dataclass(frozen=True)
class Reference:
    """A tokenizer as stock transformers loads it, and how it ends a turn.

    `bos`: it begins every text with BOS by itself. `end`: the end of a turn. `template`: it has its own, else the turns
    are joined as `plain` has them.
    """

    path: Path
    end: str
    template: bool = False
    bos: bool = False

    def prompt_and_text(self, turns: Sequence[Turn], answer: str) -> tuple[str, str]:
        if self.template:
            stock = load(self.path)
            prompt = stock.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
            text = stock.apply_chat_template([*turns, assistant(answer)], tokenize=False)
            assert text.startswith(prompt + answer + self.end)
            return prompt, prompt + answer + self.end
        names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
        prompt = "\n\n".join([*(names[turn["role"]] + turn["content"] for turn in turns), "Assistant: "])
        return prompt, prompt + answer + self.end

    def ids(self, turns: Sequence[Turn], answer: str) -> tuple[list[int], list[int]]:
        """The ids of the prompt and of the answer: a token that reaches into the answer is the answer's."""
        prompt, text = self.prompt_and_text(turns, answer)
        encoded = load(self.path)(text, add_special_tokens=self.bos, return_offsets_mapping=True)
        start = next(i for i, (_, end) in enumerate(encoded.offset_mapping) if end > len(prompt))
        return encoded.input_ids[:start], encoded.input_ids[start:]


@cache
def load(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(params=["bytes", "phi-3-mini", "gpt2", "pythia"])
def reference(request: pytest.FixtureRequest, tiny_base: Path) -> Reference:
    match request.param:
        case "bytes":
            return Reference(tiny_base, "</s>", bos=True)
        case "phi-3-mini":
            return Reference(shared("tokenizers/phi-3-mini"), "<|end|>", template=True)
        case name:
            return Reference(shared(f"tokenizers/{name}"), "<|endoftext|>")


# `orpo data` on each


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Path]:
    """`recipe_of(tokenizer, source, **keys)` writes a recipe with this source and these keys of `data`."""

    def write(tokenizer: Path, source: dict[str, Any], **keys: Any) -> Path:
        data = {"train": source, "max_length": 2048, **keys}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": {"name_or_path": str(tokenizer)}, "data": data}), encoding="utf-8")
        return path

    return write


def keys_to_write(error: str) -> dict[str, Any]:
    """The keys that the hint gives beside the path, nothing added."""
    hint = error.partition("hint: ")[2]
    told, path, keys = hint.split("\n", 2)
    assert (told, path) == ("write the source in data.train or data.eval as", "path: <as it is>")
    return yaml.safe_load(keys)


def figures(orpo: Callable[..., tuple[int, str, str]], recipe: Path) -> dict[str, Any]:
    code, out, err = orpo("data", recipe, "--json", "--summary")
    assert code == 0, err
    return json.loads(out)["train"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_tokens_are_exact(name, reference, recipe_of, orpo, tmp_path):
    schema = SCHEMAS[name]
    source: dict[str, Any] = {"path": str(write_rows(tmp_path / schema.file, schema.rows))}
    recipe = recipe_of(reference.path, source, **schema.keys)
    if schema.refused:
        code, out, err = orpo("data", recipe, "--json")
        assert (code, out) == (2, "")
        recipe = recipe_of(reference.path, source | keys_to_write(err))

    code, out, err = orpo("data", recipe, "--json")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    expected = []
    for pair in schema.pairs:
        prompt, chosen = reference.ids(pair.turns, pair.chosen)
        rejected_prompt, rejected = reference.ids(pair.turns, pair.rejected)
        row = {"index": pair.row, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        expected.append(row | ({} if rejected_prompt == prompt else {"rejected_prompt_ids": rejected_prompt}))
    assert found == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_are_recognised_and_what_is_no_pair_is_counted(name, streaming, tiny_base, recipe_of, orpo, tmp_path):
    schema = SCHEMAS[name]
    source: dict[str, Any] = {"path": str(write_rows(tmp_path / schema.file, schema.rows))}
    if schema.refused:
        source |= keys_to_write(orpo("data", recipe_of(tiny_base, source))[2])
    found = figures(orpo, recipe_of(tiny_base, source, **schema.keys, streaming=streaming))
    assert found["sources"][0]["format"] == schema.format
    assert found["dropped"] == schema.dropped
    assert found["pairs"] == len(schema.pairs)
    assert found["rows"] == found["pairs"] + sum(schema.dropped.values())


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses_likewise_and_then_takes_it(name, tiny_base, recipe_of, orpo, tmp_path):
    schema = SCHEMAS[name]
    source: dict[str, Any] = {"path": str(write_rows(tmp_path / schema.file, schema.rows))}
    code, _, err = orpo("check", recipe_of(tiny_base, source, max_length=128))
    assert code == 2
    assert ": no preference pair is recognised in these rows" in err
    code, _, err = orpo("check", recipe_of(tiny_base, source | keys_to_write(err), max_length=128, max_dropped=1.0))
    assert code == 0, err


def test_single_messages_of_openassistant_are_refused_for_their_trees(tiny_base, recipe_of, orpo, tmp_path):
    rows = [reply("What is a sonnet?", None, role="prompter"), reply("A poem.", 0), reply("A song.", 1)]
    for row in rows:
        del row["replies"]
    code, _, err = orpo("data", recipe_of(tiny_base, {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}))
    assert code == 2
    assert "hint: these are single messages: take the file of whole trees that goes with them (.trees.jsonl.gz)" in err


CARD = """\
---
configs:
- config_name: default
  data_files:
  - {split: train_prefs, path: data/train_prefs-*}
  - {split: train_sft, path: data/train_sft-*}
  - {split: test_prefs, path: data/test_prefs-*}
  - {split: test_sft, path: data/test_sft-*}
---
"""


def test_the_splits_of_ultrafeedback_binarized(tiny_base, recipe_of, orpo, tmp_path):
    rows = SCHEMAS["UltraFeedback binarized"].rows
    folder = tmp_path / "ultrafeedback_binarized"
    splits = {"train_prefs": rows, "train_sft": rows[:1], "test_prefs": rows[:2], "test_sft": rows[:1]}
    for split, of_split in splits.items():
        write_rows(folder / "data" / f"{split}-00000-of-00001.parquet", of_split)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    code, out, err = orpo("data", recipe_of(tiny_base, {"path": str(folder)}, eval=str(folder)), "--json", "--summary")
    assert code == 0, err
    found = json.loads(out)
    assert (found["train"]["rows"], found["train"]["pairs"]) == (3, 2)
    assert (found["eval"]["rows"], found["eval"]["pairs"]) == (2, 2)


@pytest.mark.parametrize("name", ["distilabel-intel-orca-dpo-pairs", "orpo-dpo-mix-40k"])
def test_without_the_filter_that_the_card_advises_rows_are_taken_as_they_are(
    name, tiny_base, recipe_of, orpo, tmp_path
):
    schema = SCHEMAS[name]
    found = figures(orpo, recipe_of(tiny_base, {"path": str(write_rows(tmp_path / schema.file, schema.rows))}))
    assert "filtered" not in found["dropped"]
    assert found["pairs"] == len(schema.pairs) + schema.dropped["filtered"]


@pytest.mark.parametrize("name", ["SHP", "HelpSteer2-preference", "HelpSteer3"])
def test_a_mapping_of_ones_own_wins_over_the_verdict(name, tiny_base, recipe_of, orpo, tmp_path):
    schema, names = SCHEMAS[name], {"SHP": ("history", "human_ref_A", "human_ref_B")}
    prompt, first, second = names.get(name, [key for key in schema.rows[0] if key[:3] in ("pro", "con", "res")])
    columns = {"prompt": prompt, "chosen": second, "rejected": first}
    source = {"path": str(write_rows(tmp_path / schema.file, schema.rows)), "columns": columns}
    found = figures(orpo, recipe_of(tiny_base, source))
    assert (found["sources"][0]["format"], found["dropped"], found["pairs"]) == ("prompt", {}, len(schema.rows))
