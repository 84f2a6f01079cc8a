"""What ORPO is said to do, tried: against SFT alone, and against DPO and SimPO after SFT.

    python benchmarks/claims.py [--model MODEL --data PAIRS] [--trl PYTHON] [--betas 0.1,0.25,0.5,1.0] [--seeds 1,2,3]
        [--pairs 320] [--held-out 200] [--epochs 2] [--learning-rate 2e-3] [--keep DIR]

How to make TRL's environment stands at the top of `peers/trl_trainers.py`; without it there is no second stage.

Every run is a full fine-tune in float32 in a process of its own: 16 pairs a step, linear decay after a warm-up over a
tenth of the steps. SFT is `orpo train` with beta 0. A second stage starts at the SFT model of the same seed and takes
the same pairs, epochs and batch again, at a quarter of the learning rate: TRL's DPOTrainer with its defaults (beta
0.1), and its CPOTrainer with SimPO's loss (beta 2, gamma 1, no NLL). That both tools train on the same token ids is
checked. All models are judged by `orpo eval` on the same held-out pairs, whose prompts nobody trained on. The seeds are
those of the order of the pairs. A method's cost is that of all its processes, the evaluation at the end of ours among
it: seconds summed, memory the largest. CPU seconds are of all threads, so that other work on the machine matters less.

Prints a table, and with three betas or more of each statement whether it holds: if its figure is positive with every
seed. The figure's median and range stand behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from common import (
    SFT,
    TRL,
    Learnt,
    Setting,
    Statement,
    Study,
    Task,
    apart,
    judge,
    kept,
    learn_ours,
    machine,
    open_study,
    orpo,
    our_tokens_digest,
    peer_settings,
    run_process,
    spread,
    study_arguments,
)

BASE = "base"
SECOND = {
    "SFT, then DPO": ("dpo", {}),
    "SFT, then SimPO": ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
}
FIGURES = ("accuracy", "chosen_logps", "rejected_logps", "margin")
COST = ("cpu", "wall", "peak_gib")
MICRO = Setting(micro=8, autocast=False)  # of TRL: small pairs, and float32 like ours


def learn_second(study: Study, directory: Path, seed: int, method: str) -> Learnt:
    """A second stage by TRL, from this seed's SFT."""
    trainer, own = SECOND[method]
    sft = study.run(seed, SFT) / "run" / "merged"
    task = Task(study.directory, sft, study.train, study.steps)
    config = {
        "learning_rate": float(study.options.learning_rate) / 4,
        "lr_scheduler_type": "linear",
        "warmup_steps": study.steps // 10,
        "train_sampling_strategy": "random",
        "seed": seed,
    }
    output = directory / "model"
    settings = peer_settings(
        task,
        MICRO,
        trainer=trainer,
        config=config | own,
        lora=False,
        dtype="float32",
        max_length=study.max_length,
        output=str(output),
    )
    process = run_process([study.options.trl, TRL, settings], study.directory)
    told = json.loads(process.output.splitlines()[-1])
    if told["tokens_digest"] != apart(our_tokens_digest, study.recipe):
        raise SystemExit("error: TRL trained on other tokens than we did, so that nothing can be compared")
    return judge(study, output, process)


def learn_all(study: Study, seed: int) -> dict[str, Learnt]:
    """Every method with one seed, by its name."""
    learnt = {BASE: kept(study.directory / BASE, Learnt, lambda directory: judge(study, directory))}
    learnt |= {orpo(beta): learn_ours(study, seed, beta) for beta in ("0", *betas(study))}
    for method in SECOND if study.options.trl else ():
        directory = study.run(seed, method)
        second = kept(directory, Learnt, lambda directory, method=method: learn_second(study, directory, seed, method))
        learnt[method] = after(learnt[SFT], second)
    return learnt


def after(first: Learnt, second: Learnt) -> Learnt:
    """The second stage's model, at the cost of both."""
    return replace(
        second,
        wall=first.wall + second.wall,
        cpu=first.cpu + second.cpu,
        peak_gib=max(first.peak_gib, second.peak_gib),
    )


def betas(study: Study) -> list[str]:
    """As given, the smallest first."""
    return sorted(study.options.betas.split(","), key=float)


def statements(study: Study, seeds: list[Mapping[str, Learnt]]) -> list[Statement]:
    """What is to be seen, as figures that are to be positive."""
    own = [orpo(beta) for beta in betas(study)]
    least, middle, most = own[0], own[len(own) // 2], own[-1]

    def say(text: str, figure: Callable[[Mapping[str, Learnt]], float]) -> Statement:
        return Statement(text, [figure(of) for of in seeds])

    def rising(of: Mapping[str, Learnt], figure: Callable[[Learnt], float]) -> float:
        return min(figure(of[more]) - figure(of[less]) for less, more in pairwise(own))

    said = [
        say("SFT alone raises the rejected answers' log-prob", lambda of: _rejected(of, SFT, BASE)),
        say("and the chosen ones' more", lambda of: of[SFT].margin - of[BASE].margin),
        say("every ORPO has a wider margin than SFT", lambda of: min(of[m].margin - of[SFT].margin for m in own)),
        say("every larger beta has a wider margin", lambda of: rising(of, lambda it: it.margin)),
        say("and a larger log odds ratio", lambda of: rising(of, lambda it: it.log_odds_ratio)),
        say("and less likely chosen answers", lambda of: rising(of, lambda it: -it.chosen_logps)),
        say("every ORPO is more accurate than SFT", lambda of: min(of[m].accuracy - of[SFT].accuracy for m in own)),
        say(f"{least}, raises the chosen answers over the base", lambda of: _chosen(of, least, BASE)),
        say(f"{middle}, lowers the rejected answers below the base", lambda of: -_rejected(of, middle, BASE)),
        say(f"{middle}, lowers the rejected answers below SFT", lambda of: -_rejected(of, middle, SFT)),
        say(f"{most}, lowers the chosen answers below the base", lambda of: -_chosen(of, most, BASE)),
        say(f"{most}, lowers the chosen answers below SFT", lambda of: -_chosen(of, most, SFT)),
    ]
    for method in SECOND if study.options.trl else ():
        said += [
            say(f"{method}: less likely chosen answers than SFT", lambda of, m=method: -_chosen(of, m, SFT)),
            say(
                f"{middle}, keeps the chosen answers likelier than {method}",
                lambda of, m=method: _chosen(of, middle, m),
            ),
            say(f"{middle}, is more accurate than {method}", lambda of, m=method: of[middle].accuracy - of[m].accuracy),
            say(
                f"{middle}, takes less CPU time than {method}, in seconds",
                lambda of, m=method: of[m].cpu - of[middle].cpu,
            ),
        ]
    return said


def _chosen(of: Mapping[str, Learnt], method: str, against: str) -> float:
    return of[method].chosen_logps - of[against].chosen_logps


def _rejected(of: Mapping[str, Learnt], method: str, against: str) -> float:
    return of[method].rejected_logps - of[against].rejected_logps


def main() -> None:
    parser = study_arguments(__doc__)
    parser.add_argument("--trl", metavar="PYTHON", help="the Python of an environment with TRL")
    parser.add_argument("--betas", default="0.1,0.25,0.5,1.0")
    options = parser.parse_args()

    with open_study(options) as study:
        seeds = [learn_all(study, seed) for seed in study.seeds]
        print(f"{machine()}\n{options.pairs} pairs, {study.steps} steps; {options.held_out} held-out pairs; ", end="")
        print(f"seeds {options.seeds}: median (lowest to highest)\n")
        print("| | accuracy | chosen log-prob | rejected log-prob | margin | CPU seconds | wall | peak GiB |")
        print("|---|---|---|---|---|---|---|---|")
        for method in seeds[0]:
            runs = [of[method] for of in seeds]
            learnt = [spread(getattr(run, name) for run in runs) for name in FIGURES]
            cost = [spread(getattr(run, name) for run in runs) if method != BASE else "" for name in COST]
            print(f"| {method} | {' | '.join(learnt + cost)} |")
        if len(betas(study)) > 2:
            print("", *statements(study, seeds), sep="\n")


if __name__ == "__main__":
    main()
