"""Speed and memory of a training run against the bare transformer and, where it is installed, TRL's ORPOTrainer.

    python benchmarks/speed.py --data HH_RLHF --tokenizer DIR [--layers 8] [--pairs 96] [--rounds 3] [--trl PYTHON]

The model is a random Llama of SmolLM2-135M's width (hidden 576, intermediate 1536, 9 heads over 3, vocabulary 49,152)
in bfloat16, with LoRA r 16 on all linear layers, 16 pairs a step of at most 1,024 tokens. All sides run in turn, in
one session; ratios are of medians, with the range over rounds. `--trl` names the Python of an environment that has trl.
The bare transformer is the stock backbone with frozen weights and SDPA, its inputs requiring a gradient: forward and
backward over as many tokens as our flat batches have, one packed micro-batch a call, no head; best of three.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orpo_cli.data.formats import Drop, read_pair, recognise
from orpo_cli.data.sources import open_source
from orpo_cli.recipe import SourceSpec

BATCH = 16
MICRO_TOKENS = 1024
PEER = Path(__file__).parent / "peers" / "trl_orpo.py"


def make_model(directory: Path, layers: int, tokenizer: str) -> None:
    """The bench's random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def make_pairs(path: Path, data: str, tokenizer: str, count: int) -> None:
    """The first usable pairs as strings that are rendered already, so that all sides see one text."""
    rows = open_source([SourceSpec(path=data)])
    form = recognise(rows.heads(64)[0])
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    lines: list[str] = []
    for row in rows.rows():
        try:
            pair = read_pair(row, form)
        except Drop:
            continue
        assert not isinstance(pair.prompt, str)
        prompt = "".join(f"\n\n{m.role.capitalize()}: {m.content}" for m in pair.prompt) + "\n\nAssistant:"
        longest = max(len(tokens(prompt + " " + answer).input_ids) for answer in (pair.chosen, pair.rejected))
        if longest < 1000:
            texts = {"prompt": prompt, "chosen": " " + pair.chosen, "rejected": " " + pair.rejected}
            lines.append(json.dumps(texts) + "\n")
        if len(lines) == count:
            break
    path.write_text("".join(lines))


def ours(model: Path, pairs: Path, scratch: Path, steps: int, settings: list[str]) -> dict:
    """One `orpo train` in a process of its own: seconds of each step, first loss, peak memory, wall time."""
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {model}, chat_template: none}}\n"
        f"data: {{train: {pairs}, shuffle: false}}\n"
        f"train: {{max_steps: {steps}, learning_rate: 1e-4, max_tokens_per_microbatch: {MICRO_TOKENS}}}\n"
        f"output: {{dir: {scratch / 'run'}, merge: false}}\n"
    )
    command = [sys.executable, "-m", "orpo_cli", "train", str(recipe), "--overwrite"]
    started = time.perf_counter()
    subprocess.run([*command, *(a for s in settings for a in ("--set", s))], check=True, capture_output=True)
    wall = time.perf_counter() - started
    rows = [json.loads(line) for line in (scratch / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [row["seconds"] for row in rows],
        "pairs": sum(row["pairs"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "first_loss": rows[0]["loss"],
        "peak_gib": rows[-1]["peak_memory_gib"],
        "wall": wall,
    }


def trl(python: str, model: Path, pairs: Path, scratch: Path, steps: int, micro: int) -> dict:
    """The same by TRL."""
    started = time.perf_counter()
    arguments = [python, str(PEER), str(model), str(pairs), str(micro), str(BATCH), str(steps)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=scratch, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - started}


def bare_transformer(model: Path, tokens: int) -> float:
    """Seconds of the stock backbone's forward and backward over this many tokens; best of three."""
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).base_model.requires_grad_(False)
    calls = [MICRO_TOKENS] * (tokens // MICRO_TOKENS) + [tokens % MICRO_TOKENS]

    def once() -> float:
        started = time.perf_counter()
        for length in filter(None, calls):
            inputs = torch.randn(1, length, 576, dtype=torch.bfloat16, requires_grad=True)
            hidden = backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        return time.perf_counter() - started

    return min(once() for _ in range(3))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl")
    parser.add_argument("--micro", type=int, default=1, help="TRL's micro-batch; 1 is its best on a CPU")
    options = parser.parse_args()
    steps = options.pairs // BATCH

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {options.layers} layers"
    )
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        model, pairs = scratch / "model", scratch / "pairs.jsonl"
        make_model(model, options.layers, options.tokenizer)
        make_pairs(pairs, options.data, options.tokenizer, options.pairs)
        sides: dict[str, list[dict]] = {"orpo, nll all": [], "orpo, nll response": [], "TRL, nll all": []}
        bare: list[float] = []
        for _ in range(options.rounds):
            token = ["loss.nll_tokens=all", "loss.nll_reduction=token"]
            sides["orpo, nll all"].append(ours(model, pairs, scratch, steps, token))
            sides["orpo, nll response"].append(ours(model, pairs, scratch, steps, []))
            bare.append(bare_transformer(model, sides["orpo, nll response"][-1]["tokens"]))
            if options.trl:
                sides["TRL, nll all"].append(trl(options.trl, model, pairs, scratch, steps, options.micro))

    print("\n| | pairs/s over the steps | seconds in all | peak GiB | first loss |\n|---|---|---|---|---|")
    for name, runs in sides.items():
        if runs:
            speeds = [run["pairs"] / sum(run["seconds"]) for run in runs]
            walls, peaks = [run["wall"] for run in runs], [run["peak_gib"] for run in runs]
            print(f"| {name} | {spread(speeds)} | {spread(walls)} | {spread(peaks)} | {runs[0]['first_loss']:.4f} |")
    own = sides["orpo, nll response"]
    times = [sum(run["seconds"]) / seconds for run, seconds in zip(own, bare, strict=True)]
    print(f"\nan epoch takes {spread(times)} times the bare transformer's forward and backward ({spread(bare)} s)")
    if options.trl:
        pairs_of = zip(sides["orpo, nll all"], sides["TRL, nll all"], strict=True)
        ratios = [sum(peer["seconds"]) / sum(mine["seconds"]) for mine, peer in pairs_of]
        pairs_of = zip(sides["orpo, nll all"], sides["TRL, nll all"], strict=True)
        memory = [mine["peak_gib"] / peer["peak_gib"] for mine, peer in pairs_of]
        print(f"TRL takes {spread(ratios)} times as long; we take {spread(memory)} of its memory")


if __name__ == "__main__":
    main()
