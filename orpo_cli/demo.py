"""`orpo demo`: the whole way on a tiny base model and preference pairs that are made on the spot, with no network.

The demo's world has four rankings: animals by size, months, letters, numbers. The base model reads true statements
about them, and dialogues whose answers are right about as often as wrong. So it knows what is true and has no
preference for saying it. A few hundred pairs then teach it to prefer the right answer, judged on couples of things
that no training pair compares. A question names two things and has exactly one right answer, so that `check_answer`
can judge whatever the model says.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_cli.errors import InputError
from orpo_cli.init import RECIPES

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES = ("base", "pairs.jsonl", "recipe.yaml", "run")
SEED = 1
PAIRS = 400
# What the base reads: enough to know the rankings and to copy a name out of a question, in about a minute on one core.
DOCUMENTS = 60_000
DIALOGUE_SHARE = 0.6
# Of the dialogues' answers. Below a half, since what the statements teach leaks into the dialogues.
RIGHT_SHARE = 0.45
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


# ---- the demo's world ----


@dataclass(frozen=True)
class Ranking:
    """Things in an order, and the sentences about which of two stands before the other."""

    things: tuple[str, ...]
    question: str
    answer: str
    statement: str
    listing: str

    def first(self, couple: Sequence[str]) -> str:
        """The one of the two that the ranking has first."""
        return min(couple, key=self.things.index)


def in_order(names: str) -> tuple[str, ...]:
    """The names of a line."""
    return tuple(names.split())


RANKINGS = (
    Ranking(
        in_order("whale rhino bull horse cow bear lion pig wolf goat fox cat duck rat frog mouse bee ant flea"),
        question="Which is bigger, the {} or the {}?",
        answer="The {} is bigger.",
        statement="Of the {} and the {}, the {} is bigger.",
        listing="From big to small: {}.",
    ),
    Ranking(
        in_order("January February March April May June July August September October November December"),
        question="Which month comes first, {} or {}?",
        answer="{} comes first.",
        statement="Of {} and {}, {} comes first.",
        listing="Months in order: {}.",
    ),
    Ranking(
        tuple("abcdefghijklmnopqrstuvwxyz"),
        question="Which letter comes first, {} or {}?",
        answer="{} comes first.",
        statement="Of {} and {}, {} comes first.",
        listing="Letters in order: {}.",
    ),
    Ranking(
        tuple(str(number) for number in range(30, 0, -1)),
        question="Which is more, {} or {}?",
        answer="{} is more.",
        statement="Of {} and {}, {} is more.",
        listing="Numbers from the top: {}.",
    ),
)
NAMES = ("Anna", "Ben", "Clara", "Dan", "Eva", "Finn", "Greta", "Hugo")
PLACES = ("in the house", "by the river", "on the hill", "at the market", "near the old mill", "in the garden")


def ask(rng: random.Random) -> str:
    """A question that compares two things of a random ranking, in random order."""
    ranking = rng.choice(RANKINGS)
    return ranking.question.format(*rng.sample(ranking.things, 2))


def answers(prompt: str) -> tuple[str, str]:
    """The right and the wrong answer to a question of `ask`; ValueError for any other."""
    for ranking in RANKINGS:
        match = re.fullmatch(re.escape(ranking.question).replace(r"\{\}", r"(\w+)"), prompt)
        if match and set(match.groups()) <= set(ranking.things):
            right = ranking.first(match.groups())
            wrong = match[2] if right == match[1] else match[1]
            return ranking.answer.format(right), ranking.answer.format(wrong)
    raise ValueError(f"not a question of the demo: {prompt!r}")


def check_answer(prompt: str, answer: str) -> bool:
    """Whether `answer` is the right one, to the letter; ValueError if `prompt` is no question of the demo."""
    return answer.strip() == answers(prompt)[0]


def make_pairs(path: Path, count: int, seed: int) -> None:
    """Write `count` lines of `{"prompt", "chosen", "rejected"}`, no two of which compare the same two things.

    ValueError if there are not that many couples (there are 997).
    """
    if count > sum(len(r.things) * (len(r.things) - 1) // 2 for r in RANKINGS):
        raise ValueError(f"the demo's world has no {count} couples to compare")
    rng = random.Random(seed)
    prompts: dict[tuple[str, str], str] = {}  # both orders of a couple have the same answers
    while len(prompts) < count:
        prompt = ask(rng)
        prompts.setdefault(answers(prompt), prompt)
    rows = [{"prompt": prompts[key], "chosen": key[0], "rejected": key[1]} for key in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- the base model ----


def documents(count: int, seed: int) -> Iterator[str]:
    """What the base reads: true statements, and dialogues that answer rightly about as often as not."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < DIALOGUE_SHARE:
            prompt = ask(rng)
            right, wrong = answers(prompt)
            yield as_plain(prompt, right if rng.random() < RIGHT_SHARE else wrong)
        else:
            yield statement(rng)


def statement(rng: random.Random) -> str:
    """A true sentence, as a book would have it: no question, no speaker."""
    ranking = rng.choice(RANKINGS)
    kind = rng.random()
    if kind < 0.1:
        return f"{rng.choice(NAMES)} met {rng.choice(NAMES)} {rng.choice(PLACES)}, and they went home together."
    if kind < 0.35:
        return ranking.listing.format(", ".join(sorted(rng.sample(ranking.things, 5), key=ranking.things.index)))
    couple = rng.sample(ranking.things, 2)
    return ranking.statement.format(*couple, ranking.first(couple))


def as_plain(prompt: str, answer: str = "") -> str:
    """A question, and its answer if there is one, in the template `plain`."""
    return f"User: {prompt}\n\nAssistant: {answer}".rstrip()


def make_base(directory: Path, seed: int, count: int = DOCUMENTS) -> None:
    """Train a tokenizer and a tiny Llama on `count` documents; write both, as stock transformers does.

    The same seed gives the same bytes on the same machine, whatever the number of threads.
    """
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.logging.disable_progress_bar()  # it would count the one file that is written
    texts = list(documents(count, seed))
    tokenizer = train_tokenizer(texts[:5000])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        # Every width divides by 64, the block of NF4, so that the base can be held in 4 bits.
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one gains a third where it is idle, and loses far more where it is not
    try:
        train_base(model, token_rows(tokenizer, texts, batch_size=8, length=128))
    finally:
        torch.set_num_threads(threads)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer that puts BOS in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, length: int
) -> torch.Tensor:  # (S, B, T)
    """The documents end to end, each with BOS and EOS, cut into S batches of B rows of T tokens."""
    import torch

    stream = [token for ids in tokenizer(list(texts)).input_ids for token in (*ids, tokenizer.eos_token_id)]
    steps = len(stream) // (batch_size * length)
    return torch.tensor(stream[: steps * batch_size * length]).view(steps, batch_size, length)


def train_base(model: PreTrainedModel, batches: torch.Tensor) -> None:  # (S, B, T)
    """One pass over the batches, in their order."""
    import torch
    from rich.progress import track

    from orpo_cli.terminal import console

    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=len(batches), pct_start=0.1)
    model.train()
    for ids in track(list(batches), "base", console=console, disable=not console.is_terminal):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


# ---- what the models say ----


def sample_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answer to each question, by stock `generate` on one left-padded batch."""
    import torch

    inputs = tokenizer([as_plain(prompt) for prompt in prompts], padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False
        )
    replies = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def answers_of(directory: Path, prompts: Sequence[str]) -> list[str]:
    """The answers of a model that stock transformers loads from a directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    return sample_answers(model, AutoTokenizer.from_pretrained(directory), prompts)


def accepted_share(prompts: Sequence[str], replies: Sequence[str]) -> float:
    """The share of the answers that `check_answer` accepts."""
    return sum(map(check_answer, prompts, replies)) / len(prompts)


def answer_table(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    """Questions with both models' answers, ticked or crossed."""
    from rich.table import Table
    from rich.text import Text

    def judged(prompt: str, reply: str) -> Text:
        is_right = check_answer(prompt, reply)
        return Text("✓ " if is_right else "✗ ", style="green" if is_right else "red") + Text(reply, style="default")

    table = Table(title="held-out questions", title_justify="left", box=None, pad_edge=False)
    for heading in ("question", "base", "after ORPO"):
        table.add_column(heading)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        table.add_row(prompt, judged(prompt, old), judged(prompt, new))
    return table


# ---- the verb ----


def demo(directory: Path, *, overwrite: bool = False) -> dict[str, tuple[float, float]]:
    """Make base, pairs and recipe in `directory`, then train, evaluate, merge, and print answers before and after.

    Returns held-out `accuracy` and the share of `accepted` free answers, each before and after. Raises InputError if
    the directory holds a demo and `overwrite` does not allow to replace it.
    """
    from orpo_cli.terminal import say

    claim(directory, overwrite=overwrite)
    started = time.monotonic()
    say("a tiny base model, trained on statements and on dialogues that answer at random (about a minute) ...")
    make_base(directory / "base", SEED)
    say(f"  {directory / 'base'}, after {time.monotonic() - started:.0f} s")
    make_pairs(directory / "pairs.jsonl", PAIRS, SEED)
    say(f"{PAIRS} preference pairs: {directory / 'pairs.jsonl'}")
    write_recipe(directory)
    say(f"the recipe: {directory / 'recipe.yaml'}")
    result = run_recipe(directory)
    say(f"all of it in {time.monotonic() - started:.0f} s")
    return result


def claim(directory: Path, *, overwrite: bool) -> None:
    """Make the directory ready for a demo, without touching files that are not the demo's."""
    there = [name for name in FILES if (directory / name).exists()]
    if there and not overwrite:
        raise InputError(f"{directory} already holds {', '.join(there)}", "give --overwrite, or another directory")
    for name in there:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory} cannot be made: {error.strerror}", "name another directory") from error


def write_recipe(directory: Path) -> None:
    """Write the demo's recipe with the paths of this demo."""

    def quoted(match: re.Match[str]) -> str:
        # A JSON string is a YAML string, whatever the directory is called.
        return json.dumps(str(directory / match[1]), ensure_ascii=False)

    text = (RECIPES / "demo.yaml").read_text(encoding="utf-8")
    text = re.sub(rf"orpo-demo/({'|'.join(map(re.escape, FILES))})", quoted, text)
    (directory / "recipe.yaml").write_text(text, encoding="utf-8")


def run_recipe(directory: Path) -> dict[str, tuple[float, float]]:
    """What a user does with a recipe: `orpo train`, `orpo eval`, `orpo merge`; then ask base and merged model."""
    from rich.console import Console

    from orpo_cli.evaluate import evaluate_target
    from orpo_cli.merge import merge_target
    from orpo_cli.metrics import read_metrics
    from orpo_cli.recipe import load_recipe
    from orpo_cli.terminal import say
    from orpo_cli.train import run

    run_directory = directory / "run"
    say(f"\norpo train {directory / 'recipe.yaml'}")
    run.train(load_recipe(directory / "recipe.yaml"), run.Start(command=tuple(sys.argv)))
    say(f"\norpo eval {run_directory}")
    figures = evaluate_target(str(run_directory), data=None, recipe_file=None, output=None)
    say(f"\norpo merge {run_directory}")
    merged = merge_target(str(run_directory), output=None, base=None, dtype="auto")

    rows = read_lines(directory / "pairs.jsonl")
    prompts = [rows[pair["index"]]["prompt"] for pair in read_lines(run_directory / "eval.pairs.jsonl")]
    before, after = answers_of(directory / "base", prompts), answers_of(merged, prompts)
    accepted = accepted_share(prompts, before), accepted_share(prompts, after)
    at_start = next(row["eval_accuracy"] for row in read_metrics(run_directory / "metrics.jsonl") if row["step"] == 0)
    console = Console(highlight=False)
    console.print()
    shown = slice(0, None, len(prompts) // 10)
    console.print(answer_table(prompts[shown], before[shown], after[shown]))
    console.print()
    console.print(f"pairs ranked rightly      {at_start:6.1%} -> {figures['accuracy']:6.1%}   (held-out accuracy)")
    console.print(f"free answers accepted     {accepted[0]:6.1%} -> {accepted[1]:6.1%}   ({len(prompts)} questions)")
    return {"accuracy": (at_start, figures["accuracy"]), "accepted": accepted}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
