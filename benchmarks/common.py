"""What the benchmarks share: a model, pairs, the sides as processes of their own, and how figures are printed.

Every side, ours and the peers', is a command, and what it costs is taken from outside: wall time from the start of the
process to its exit, and the peak of its resident memory as the kernel counts it, imports and all. Each command gets an
empty Hugging Face cache, so that none finds its data prepared, and no GPU. A peer is a Python with that tool installed;
how to make one stands at the top of its script in `peers/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
TRL = HERE / "peers" / "trl_trainers.py"
LLAMAFACTORY = HERE / "peers" / "llamafactory_orpo.py"

BATCH = 16
MAX_LENGTH = 1024
HIDDEN, VOCABULARY = 576, 49_152
RECIPE = """\
model: {{name_or_path: {model}, chat_template: none}}
lora: {{r: 16, alpha: 32, dropout: 0.0, target_modules: all-linear}}
data: {{train: {pairs}, shuffle: false, max_length: {max_length}}}
loss: {{beta: 0.1, nll_tokens: {nll_tokens}, nll_reduction: {nll_reduction}}}
train: {{max_steps: {steps}, batch_size: {batch}, learning_rate: 1e-4, lr_scheduler_type: constant, warmup_ratio: 0}}
output: {{merge: false}}
"""


# ---- what a benchmark works on ----


def arguments(description: str | None, *, repeated: bool = True) -> argparse.ArgumentParser:
    """The options of a benchmark against peers; with `repeated` those of one that takes times."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs, HH-RLHF for instance")
    parser.add_argument("--tokenizer", required=True, help="a directory; at most 32,768 tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trl", metavar="PYTHON", help="the Python of an environment with TRL")
    if repeated:
        parser.add_argument("--pairs", type=int, default=96)
        parser.add_argument("--rounds", type=int, default=3)
    return parser


def make_model(
    directory: Path, layers: int, tokenizer: str, vocabulary: int = VOCABULARY, dtype: str = "bfloat16"
) -> None:
    """A random Llama of SmolLM2-135M's width, and a tokenizer without BOS, which TRL alone would add."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.bos_token = None
    tokens.save_pretrained(directory)


def make_pairs(path: Path, data: str, tokenizer: str, count: int) -> None:
    """The first usable pairs of `data` as finished texts, so that all sides see the same.

    Usable: they fit into MAX_LENGTH, and a prompt and its answer give the same tokens apart as together, since
    LLaMA-Factory tokenises them apart.
    """
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)

    def ids(text: str) -> list[int]:
        return tokens(text, add_special_tokens=False).input_ids

    def fits(prompt: str, answer: str) -> bool:
        both = ids(prompt + answer)
        return len(both) < MAX_LENGTH and both == ids(prompt) + ids(answer)

    usable = (t for t in texts(data) if fits(t["prompt"], t["chosen"]) and fits(t["prompt"], t["rejected"]))
    write_pairs(path, itertools.islice(usable, count), count)


def cut_pairs(path: Path, data: str, count: int, prompt_words: int, answer_words: int) -> None:
    """Pairs of a given shape, cut from the running text of `data`; their lengths vary by a quarter either way."""
    words = itertools.cycle(word for t in texts(data) for word in (t["prompt"] + t["chosen"]).split())

    def cut(length: int, number: int) -> str:
        return " ".join(itertools.islice(words, round(length * (0.75, 1.25, 0.9, 1.1)[number % 4])))

    pairs = (
        {
            "prompt": cut(prompt_words, i),
            "chosen": " " + cut(answer_words, i),
            "rejected": " " + cut(answer_words, i + 1),
        }
        for i in range(count)
    )
    write_pairs(path, pairs, count)


def texts(data: str) -> Iterator[dict[str, str]]:
    """Prompt, chosen and rejected of each row that is a pair, as finished texts."""
    from orpo_cli.data.formats import Drop, read_pair, recognise
    from orpo_cli.data.sources import open_source
    from orpo_cli.recipe import SourceSpec

    rows = open_source([SourceSpec(path=data)])
    form = recognise(rows.heads(64)[0])
    for row in rows.rows():
        try:
            pair = read_pair(row, form)
        except Drop:
            continue
        turns = [pair.prompt] if isinstance(pair.prompt, str) else [f"{m.role}: {m.content}" for m in pair.prompt]
        prompt = "".join(f"\n\n{turn}" for turn in turns) + "\n\nassistant:"
        yield {"prompt": prompt, "chosen": f" {pair.chosen}", "rejected": f" {pair.rejected}"}


def write_pairs(path: Path, pairs: Iterable[dict[str, str]], count: int) -> None:
    """Write pairs as JSON lines. Ends the benchmark if there are fewer than `count`."""
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    if len(lines) < count:
        raise SystemExit(f"error: the data has only {len(lines)} usable pairs\nhint: lower --pairs")
    path.write_text("".join(lines))


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a fresh process.

    This process must stay small: a child inherits its peak of memory, and a benchmark's own torch and model would be
    taken for the side's.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- a side ----


class RunFailedError(Exception):
    """A side ended with an error; its last words."""


@dataclass(frozen=True)
class Process:
    """What a command cost, seen from outside."""

    output: str
    wall: float  # seconds
    cpu: float  # seconds of all its threads: tells more than `wall` where the machine has other work
    peak_gib: float


def run_process(command: Sequence[str | Path], scratch: Path) -> Process:
    """Run a command to its end in an empty directory. Raises RunFailedError if it fails."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        output, errors = Path(directory, "stdout"), Path(directory, "stderr")
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(Path(directory, "cache")),
            "HF_HUB_OFFLINE": "1",
        }
        with output.open("w") as out, errors.open("w") as err:
            started = time.perf_counter()
            process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, cwd=directory, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            last = errors.read_text().strip().splitlines()[-3:]
            raise RunFailedError(f"{Path(command[1]).name} ended with {process.returncode}: " + " / ".join(last))
        peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        return Process(output.read_text(), wall, usage.ru_utime + usage.ru_stime, peak)


@dataclass(frozen=True)
class Task:
    """What all sides are given."""

    scratch: Path
    model: Path
    pairs: Path
    steps: int
    batch: int = BATCH


@dataclass(frozen=True)
class Trained:
    """A training run of one side."""

    pairs: int
    seconds: list[float]  # of each optimizer step
    first_loss: float
    tokens_digest: str  # stands for the token ids it trained on, prompt and answers, in order
    wall: float  # seconds, from the start of the process to its exit
    cpu: float  # seconds of all its threads
    peak_gib: float  # of the whole process
    flat_tokens: int = 0  # ours: tokens computed, a prompt once for both its answers

    @property
    def pairs_per_second(self) -> float:
        """Over the optimizer steps alone."""
        return self.pairs / sum(self.seconds)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation by one side."""

    pairs: int
    seconds: float  # of the evaluation alone: pairs are tokenised, the model is loaded
    loss: float
    accuracy: float
    wall: float
    peak_gib: float

    @property
    def pairs_per_second(self) -> float:
        """Of the evaluation alone."""
        return self.pairs / self.seconds


@dataclass(frozen=True)
class Setting:
    """What is a peer's to choose.

    The default is the fastest on a CPU (no padding, small logits) with the tools' own arithmetic, which is autocast:
    adapters compute in bfloat16, the loss in float32. Without it adapters compute in float32 and TRL's loss in
    bfloat16.
    """

    micro: int = 1  # pairs of a micro-batch
    checkpointing: bool = False  # backward computes activations again
    autocast: bool = True

    def __str__(self) -> str:
        return f"micro-batch {self.micro}, checkpointing {_on(self.checkpointing)}, autocast {_on(self.autocast)}"


def _on(value: bool) -> str:
    return "on" if value else "off"


MICRO = (1, 2, 4, 8)
SETTINGS = [
    Setting(micro, checkpointing, autocast)
    for checkpointing, autocast in ((False, True), (True, True), (False, False))
    for micro in MICRO
]

LIKE_TRL = ("all", "token")
LIKE_LLAMAFACTORY = ("response", "pair")
"""`nll_tokens` and `nll_reduction` under which our loss is the peer's."""


def write_recipe(task: Task, nll: tuple[str, str]) -> Path:
    """Our recipe for the task."""
    path = task.scratch / "recipe.yaml"
    texts = {"model": json.dumps(str(task.model)), "pairs": json.dumps(str(task.pairs))}
    sizes = {"steps": task.steps, "batch": task.batch, "max_length": MAX_LENGTH}
    path.write_text(RECIPE.format(**texts, **sizes, nll_tokens=nll[0], nll_reduction=nll[1]))
    return path


def train_ours(task: Task, nll: tuple[str, str], overrides: Iterable[str] = ()) -> Trained:
    """One `orpo train`, with the recipe's defaults for everything that is ours to choose."""
    recipe, run = write_recipe(task, nll), task.scratch / "run"
    command = [sys.executable, "-m", "orpo_cli", "train", recipe, "--output-dir", run, "--overwrite"]
    process = run_process([*command, *(a for s in overrides for a in ("--set", s))], task.scratch)
    rows = [row for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    return Trained(
        pairs=sum(row["pairs"] for row in rows),
        seconds=[row["seconds"] for row in rows],
        first_loss=rows[0]["loss"],
        tokens_digest=apart(our_tokens_digest, recipe),
        wall=process.wall,
        cpu=process.cpu,
        peak_gib=process.peak_gib,
        flat_tokens=sum(row["tokens"] for row in rows),
    )


def our_tokens_digest(recipe_file: Path) -> str:
    """What `Trained.tokens_digest` is of our side."""
    from peers.watch import tokens_digest

    from orpo_cli.data.dataset import load_pairs
    from orpo_cli.model.build import load_text_side, pair_tokenizer
    from orpo_cli.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    pairs, _ = load_pairs(recipe.data, pair_tokenizer(recipe, load_text_side(recipe)), recipe.train)
    return tokens_digest(
        (p.chosen_ids.tolist(), p.chosen_start, p.rejected_ids.tolist(), p.rejected_start)
        for p in pairs.in_source_order()
    )


def train_peer(task: Task, python: str, script: Path, setting: Setting, **more: Any) -> Trained:
    """The same by a peer; `more` as its script says."""
    process = run_process([python, script, peer_settings(task, setting, **more)], task.scratch)
    told = json.loads(process.output.splitlines()[-1])
    cost = {"wall": process.wall, "cpu": process.cpu, "peak_gib": process.peak_gib}
    return Trained(**told, pairs=task.batch * task.steps, **cost)


def peer_settings(task: Task, setting: Setting, **more: Any) -> str:
    """What a peer's script is told."""
    settings = {
        "model": str(task.model),
        "pairs": str(task.pairs),
        "max_length": MAX_LENGTH,
        "batch": task.batch,
        "steps": task.steps,
        "micro": min(setting.micro, task.batch),
        "checkpointing": setting.checkpointing,
        "autocast": setting.autocast,
    }
    return json.dumps(settings | more)


def same_tokens(ours: Trained, peer: Trained) -> None:
    """Stop the benchmark if the two did not train on the same token ids."""
    if ours.tokens_digest != peer.tokens_digest:
        raise SystemExit("error: the peer trained on other tokens than we did, so that nothing can be compared")


# ---- a peer's best setting ----


def sweep(name: str, run: Callable[[Setting], Trained | Evaluated], settings: Iterable[Setting]) -> Setting:
    """Try the settings, print a table, return the fastest."""
    print(f"\n{name}:\n\n| micro-batch | checkpointing | autocast | pairs/s | peak GiB |\n|---|---|---|---|---|")
    speeds: dict[Setting, float] = {}
    peak = 0.0
    for setting in settings:
        cells = f"{setting.micro} | {_on(setting.checkpointing)} | {_on(setting.autocast)}"
        if setting.micro == MICRO[0]:
            peak = 0.0
        if 2 * peak > memory_gib():  # twice the pairs, up to twice the memory
            print(f"| {cells} | might not fit | |", flush=True)
            continue
        try:
            result = run(setting)
        except RunFailedError as error:
            print(f"| {cells} | {error} | |", flush=True)
            continue
        speeds[setting], peak = result.pairs_per_second, result.peak_gib
        print(f"| {cells} | {speeds[setting]:.2f} | {peak:.2f} |", flush=True)
    if not speeds:
        raise SystemExit(f"error: {name} runs with no setting")
    return max(speeds, key=lambda setting: speeds[setting])


# ---- what is learnt, and not only what it costs ----

STUDY_RECIPE = """\
model: {{name_or_path: {model}, chat_template: none}}
lora: null
data: {{train: {train}, eval: {held_out}, max_length: {max_length}}}
train: {{learning_rate: {rate}, lr_scheduler_type: linear, num_train_epochs: {epochs}, eval_on_start: false}}
"""


@dataclass(frozen=True)
class Study:
    """A small base, and the pairs that all are trained on and judged by."""

    directory: Path
    options: argparse.Namespace
    max_length: int

    @property
    def base(self) -> Path:
        """The base, with a tokenizer without BOS, which TRL alone would add."""
        return self.directory / "base"

    @property
    def train(self) -> Path:
        """Pairs to train on, as finished texts."""
        return self.directory / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Pairs to be judged by; none has a prompt of the others."""
        return self.directory / "held_out.jsonl"

    @property
    def recipe(self) -> Path:
        """A full fine-tune; `train.batch_size` is the default, BATCH."""
        return self.directory / "recipe.yaml"

    def run(self, seed: int, name: str) -> Path:
        """Where a run lies."""
        return self.directory / f"seed {seed}" / name

    @property
    def seeds(self) -> list[int]:
        """Of the order of the pairs; the base is the same."""
        return [int(seed) for seed in self.options.seeds.split(",")]

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.options.epochs * self.options.pairs // BATCH


@dataclass(frozen=True)
class Learnt:
    """What a model makes of the held-out pairs, as `orpo eval` says it, and what it cost to get there."""

    accuracy: float
    chosen_logps: float
    rejected_logps: float
    log_odds_ratio: float
    wall: float = 0.0  # seconds of the processes that trained it
    cpu: float = 0.0  # likewise, of all their threads
    peak_gib: float = 0.0  # of the largest of them

    @classmethod
    def read(cls, figures: dict[str, Any], process: Process | None = None) -> Learnt:
        """From `eval.json`, and the process that trained the model."""
        names = ("accuracy", "chosen_logps", "rejected_logps", "log_odds_ratio")
        cost = {name: getattr(process, name) for name in ("wall", "cpu", "peak_gib")} if process else {}
        return cls(**{name: figures[name] for name in names}, **cost)

    @property
    def margin(self) -> float:
        """How much likelier a token of the chosen answer is: the difference of the mean log-probs, in nats."""
        return self.chosen_logps - self.rejected_logps


Result = TypeVar("Result", Learnt, Trained)


def study_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of what is learnt."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a small base in float32")
    parser.add_argument("--data", help="preference pairs; without these two, those that `orpo demo` makes")
    parser.add_argument("--pairs", type=int, default=320, help="to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", default="2e-3")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs there, and go on with those it has")
    return parser


@contextmanager
def open_study(options: argparse.Namespace) -> Iterator[Study]:
    """The study of these options, in a directory that is gone afterwards, or in `--keep`.

    Ends the benchmark if that holds one of other options.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = (options.keep or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        shape = {k: v for k, v in vars(options).items() if k in STUDY_SHAPE}
        settings = directory / "study.json"
        if not settings.exists():
            apart(make_study, directory, options)
            settings.write_text(json.dumps(shape))
        elif json.loads(settings.read_text()) != shape:
            raise SystemExit(f"error: {directory} holds runs of other options\nhint: name another with --keep")
        yield Study(directory, options, context_tokens(directory / "base"))


STUDY_SHAPE = ("model", "data", "pairs", "held_out", "epochs", "learning_rate")


def make_study(directory: Path, options: argparse.Namespace) -> None:
    """Write base, pairs and recipe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orpo_cli import demo

    model, data = options.model, options.data
    if model is None or data is None:
        model, data = directory / "demo", str(directory / "pairs.jsonl")
        demo.make_base(model, seed=0)
        demo.make_pairs(Path(data), count=options.pairs + options.held_out, seed=0)
    study = Study(directory, options, context_tokens(Path(model)))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(study.base)
    tokens = AutoTokenizer.from_pretrained(model)
    tokens.bos_token = None
    tokens.save_pretrained(study.base)

    def ids(text: str) -> list[int]:
        return tokens(text, add_special_tokens=False).input_ids

    def fits(pair: dict[str, str]) -> bool:
        both = [ids(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        prompt = ids(pair["prompt"])
        return all(len(text) < study.max_length and text[: len(prompt)] == prompt for text in both)

    prompts: set[str] = set()
    usable = (t for t in texts(data) if fits(t) and not (t["prompt"] in prompts or prompts.add(t["prompt"])))
    write_pairs(study.train, itertools.islice(usable, options.pairs), options.pairs)
    write_pairs(study.held_out, itertools.islice(usable, options.held_out), options.held_out)
    paths = {"model": study.base, "train": study.train, "held_out": study.held_out}
    study.recipe.write_text(
        STUDY_RECIPE.format(
            **{name: json.dumps(str(path)) for name, path in paths.items()},
            max_length=study.max_length,
            rate=options.learning_rate,
            epochs=options.epochs,
        )
    )


def context_tokens(model: Path) -> int:
    """The longest text that a study takes of this model."""
    return min(MAX_LENGTH, json.loads((model / "config.json").read_text())["max_position_embeddings"])


def kept(directory: Path, kind: type[Result], work: Callable[[Path], Result]) -> Result:
    """What came of the work in this directory: by an earlier call if there was one."""
    record = directory / "learnt.json"
    if not record.exists():
        directory.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asdict(work(directory))))
    return kind(**json.loads(record.read_text()))


def judge(study: Study, model: Path, process: Process | None = None) -> Learnt:
    """What `orpo eval` says of any model, and what the process that trained it cost."""
    command = [sys.executable, "-m", "orpo_cli", "eval", model, "--data", study.held_out, "--recipe", study.recipe]
    return Learnt.read(json.loads(run_process(command, study.directory).output), process)


def learn_ours(study: Study, seed: int, beta: str) -> Learnt:
    """One `orpo train`, which evaluates at its end; the model is `run/merged` of its directory."""

    def learn(directory: Path) -> Learnt:
        run = directory / "run"
        command = [sys.executable, "-m", "orpo_cli", "train", study.recipe, "--output-dir", run, "--overwrite"]
        process = run_process([*command, "--set", f"train.seed={seed}", "--set", f"loss.beta={beta}"], study.directory)
        return Learnt.read(json.loads((run / "eval.json").read_text()), process)

    return kept(study.run(seed, orpo(beta)), Learnt, learn)


SFT = "SFT (beta 0)"


def orpo(beta: str) -> str:
    """What a run of ours is called."""
    return f"ORPO, beta {beta}" if float(beta) else SFT


# ---- printing ----


def memory_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def machine() -> str:
    """The machine, and the threads and torch of ours, as one line."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {memory_gib():.1f} GiB; {apart(threads)}"


def threads() -> str:
    """How torch computes here."""
    import torch

    return f"{torch.get_num_threads()} threads, torch {torch.__version__}"


def spread(values: Iterable[float]) -> str:
    """Median and range, as text."""
    values = list(values)
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(peer: Sequence[Any], ours: Sequence[Any], of: Callable[[Any], float]) -> str:
    """Peer over ours, round by round: median and range."""
    return spread(of(p) / of(o) for p, o in zip(peer, ours, strict=True))


@dataclass(frozen=True)
class Statement:
    """A claim that holds where a figure is positive."""

    text: str
    figures: Sequence[float]  # one for each seed or round

    def __str__(self) -> str:
        true = sum(figure > 0 for figure in self.figures)
        verdict = "holds" if true == len(self.figures) else "does not hold"
        return f"- {verdict} ({true} of {len(self.figures)}): {self.text}: {spread(self.figures)}"
