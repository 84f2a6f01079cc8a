"""Whether a run is well, by its rows of `metrics.jsonl`: each finding with its numbers and what to do about it.

Rules look at medians over many rows and ask for a shift that counts in practice and is beyond the scatter of the rows,
so that a noisy run is not an ill one. What they take for granted is in the constants below.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

# Training rows whose median stands for the start of a run, and for where it is now; the rows needed before any is
# judged; every how many rows that is done; and the last rows that tell their scatter.
START, NOW, LEAST, EVERY, SCATTER = 10, 20, 40, 10, 120
# Spikes and skipped steps are counted over so many steps.
UNSTEADY_STEPS, UNSTEADY = 200, 3
# Held-out pairs that an accuracy must be of to be judged.
LEAST_PAIRS = 30


@dataclass(frozen=True)
class Finding:
    """What is wrong with a run."""

    name: str
    step: int
    """After which it was first seen."""
    until: int
    """After which it was last seen."""
    what: str
    """With the numbers of the last time."""
    advice: str

    @property
    def steps(self) -> str:
        """When it was seen, in words."""
        return f"step {self.step}" if self.step == self.until else f"steps {self.step} to {self.until}"


@dataclass
class Health:
    """What the rows of a run have shown so far. Pure bookkeeping: reads rows, says what they mean."""

    beta: float
    total_steps: int
    found: dict[str, Finding] = field(default_factory=dict)
    """Every finding so far, by name."""
    step: int = 0
    training: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Columns of the training rows, those of skipped steps left out."""
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    odd_steps: list[tuple[int, str]] = field(default_factory=list)
    """Steps whose loss was a spike, or that were skipped, and which."""
    losses: list[float] = field(default_factory=list)
    """The median loss, each time it was looked at."""

    def see(self, row: Mapping[str, Any]) -> list[Finding]:
        """Take in the next row; what is found for the first time."""
        self.step = row["step"]
        if "eval_loss" in row:
            self.evaluations.append(row)
            return self._judge(OF_EVALUATIONS)
        odd = next((kind for kind in ("spike", "skipped") if row.get(kind)), None)
        if odd:
            self.odd_steps.append((self.step, odd))
        if odd != "skipped":
            for key, value in row.items():
                if isinstance(value, int | float):
                    self.training[key].append(value)
        rows = len(self.training["loss"])
        if rows < LEAST or rows % EVERY:
            return self._judge((unsteady,)) if odd else []
        self.losses.append(self.now("loss"))
        return self._judge(OF_TRAINING)

    def _judge(self, rules: Iterable[Rule]) -> list[Finding]:
        new = []
        for rule in rules:
            told = rule(self)
            if told is None:
                continue
            name = rule.__name__
            first = self.found[name].step if name in self.found else self.step
            finding = Finding(name, first, self.step, *told)
            if name not in self.found:
                new.append(finding)
            self.found[name] = finding
        return new

    def findings(self) -> list[Finding]:
        """All findings so far, in the order of what was seen first."""
        return sorted(self.found.values(), key=lambda finding: finding.step)

    @property
    def judged(self) -> bool:
        """Whether there are rows enough for the rules."""
        return len(self.training["loss"]) >= LEAST

    @property
    def nothing_found(self) -> str:
        """What to say of a run without findings."""
        if not self.judged:
            return f"nothing amiss, but of training fewer than {LEAST} steps are logged, too few to be judged"
        return "nothing amiss"

    # ---- what rules ask ----

    def before(self, key: str) -> float:
        """The median of a column over the first training rows; NaN, of which no rule says anything, without it."""
        return median(self.training[key][:START] or [math.nan])

    def now(self, key: str) -> float:
        """The median of a column over the last training rows."""
        return median(self.training[key][-NOW:] or [math.nan])

    def error(self, key: str) -> float:
        """The standard error of the difference between `now` and `before`, by how the last rows differ from each other.

        A normal distribution's standard deviation is 1.4826 times its median absolute deviation; the difference of two
        draws has sqrt(2) times that; a median's error is 1.2533 times that of a mean.
        """
        rows = self.training[key][-SCATTER:]
        scatter = 1.4826 / math.sqrt(2) * median(abs(b - a) for a, b in pairwise(rows))
        return 1.2533 * scatter * math.sqrt(1 / START + 1 / NOW)

    def risen(self, key: str, least: float) -> bool:
        """Whether a column has risen since the start by `least`, and by more than four standard errors."""
        return self.now(key) - self.before(key) > max(least, 4 * self.error(key))

    def fallen(self, key: str, least: float) -> bool:
        """Likewise fallen."""
        return self.before(key) - self.now(key) > max(least, 4 * self.error(key))

    def change(self, key: str) -> str:
        """A column's medians then and now, in words."""
        return f"from {self.before(key):.3g} to {self.now(key):.3g}"

    @property
    def odds_ratio_share(self) -> float:
        """Share of the odds-ratio term in the gradient with respect to the tokens' log-probs, of the last rows.

        By sums of absolute values, in which that of the NLL is always 1 (loss.odds_ratio_gradient). It is not the share
        in the norm of the weights' gradient, in which what the chosen and the rejected answers pull partly cancels.
        """
        pull = self.beta * self.now("or_gradient")
        return pull / (1 + pull)

    @property
    def half_way(self) -> bool:
        """Whether half of the steps are made: before, much may not be learnt yet."""
        return 2 * self.step >= self.total_steps


def diagnose(rows: Iterable[Mapping[str, Any]], *, beta: float, total_steps: int) -> Health:
    """What the rows of a run show."""
    health = Health(beta, total_steps)
    for row in rows:
        health.see(row)
    return health


Told = tuple[str, str] | None
"""What is the matter, and the advice; None: nothing."""
Rule = Callable[[Health], Told]


# ---- rules on training rows ----


def loss_rises(run: Health) -> Told:
    """The loss is a tenth above its lowest, now and when last looked at."""
    if len(run.losses) < 2:
        return None
    lowest, recent = min(run.before("loss"), *run.losses), min(run.losses[-2:])
    if recent - lowest <= max(0.1 * lowest, 6 * run.error("loss")):
        return None
    return (
        f"the training loss rises: {run.losses[-1]:.3g}, after {lowest:.3g} at its lowest",
        "lower train.learning_rate, or warm up for longer (train.warmup_ratio)",
    )


def both_collapse(run: Health) -> Told:
    """The answers that were preferred become as unlikely as the others: the odds ratio pushes both down."""
    if not (run.fallen("chosen_logps", 0.3) and run.fallen("rejected_logps", 0.3)):
        return None
    rate = "train.learning_rate"
    return (
        f"the log-probs of both answers fall: chosen {run.change('chosen_logps')}, "
        f"rejected {run.change('rejected_logps')}",
        f"lower loss.beta ({run.beta:g}), or {rate}" if run.beta else f"lower {rate}",
    )


def odds_ratio_flat(run: Health) -> Told:
    """The chosen answers are learnt and not what sets them apart."""
    if not (run.beta and run.half_way and run.fallen("nll_loss", 0.05 * run.before("nll_loss"))):
        return None
    if run.risen("log_odds_ratio", 0.1) or run.now("accuracy") >= 0.6:
        return None
    return (
        f"the NLL falls ({run.change('nll_loss')}) and the log odds ratio does not rise "
        f"({run.change('log_odds_ratio')}; accuracy {run.now('accuracy'):.0%})",
        "the pairs may hold too little contrast, or labels at random: look at them with `orpo data`; "
        f"if they are right, raise loss.beta ({run.beta:g})",
    )


def overfits(run: Health) -> Told:
    """Chosen near 0 with rejected near -5, by the authors' experience; and held-out answers are not so likely."""
    chosen, rejected = run.now("chosen_logps"), run.now("rejected_logps")
    if chosen < -0.15 or rejected > -4.5:
        return None
    held_out = ""
    if run.evaluations:
        of_held_out = run.evaluations[-1].get("eval_chosen_logps")
        if of_held_out is None or of_held_out > chosen - 0.3:
            return None
        held_out = f"; held-out chosen ones have {of_held_out:.3g}"
    return (
        f"the training pairs are learnt by heart: log-probs chosen {chosen:.3g}, rejected {rejected:.3g}{held_out}",
        "fewer epochs (train.num_train_epochs), a lower train.learning_rate, or more pairs",
    )


def odds_ratio_negligible(run: Health) -> Told:
    """The preference has no weight in the gradient, though it is not learnt yet."""
    early = 4 * run.step < run.total_steps
    if early or not (run.beta and run.odds_ratio_share < 0.02 and run.now("accuracy") < 0.75):
        return None
    return (
        f"the odds-ratio term is {run.odds_ratio_share:.1%} of the gradient, and accuracy {run.now('accuracy'):.0%}",
        f"raise loss.beta ({run.beta:g}): what is trained is nearly plain SFT",
    )


def odds_ratio_dominant(run: Health) -> Told:
    """The gradient is nearly all preference, and the NLL does not fall."""
    if not run.odds_ratio_share > 0.8 or run.fallen("nll_loss", 0.03 * run.before("nll_loss")):
        return None
    return (
        f"the odds-ratio term is {run.odds_ratio_share:.0%} of the gradient, "
        f"and the NLL does not fall ({run.change('nll_loss')})",
        f"lower loss.beta ({run.beta:g})",
    )


def unsteady(run: Health) -> Told:
    """Several steps within a short time had a loss that stands out, or were skipped."""
    first_taken = next(iter(run.training["step"]), math.inf)  # float16 begins by skipping, to find its loss scale
    odd = [(step, kind) for step, kind in run.odd_steps if step > max(first_taken, run.step - UNSTEADY_STEPS)]
    if len(odd) < UNSTEADY:
        return None
    spikes = sum(kind == "spike" for _, kind in odd)
    return (
        f"unsteady: within {UNSTEADY_STEPS} steps the loss stood out in {spikes} and {len(odd) - spikes} were skipped "
        f"(the last was step {odd[-1][0]:.0f})",
        "lower train.learning_rate or train.max_grad_norm; the rows of those pairs are in metrics.jsonl (indices)",
    )


OF_TRAINING: Sequence[Rule] = (
    loss_rises,
    both_collapse,
    odds_ratio_flat,
    overfits,
    odds_ratio_negligible,
    odds_ratio_dominant,
    unsteady,
)


# ---- rules on evaluations ----


def lopsided_start(run: Health) -> Told:
    """The base prefers one side before anything is learnt."""
    row = run.evaluations[-1]
    accuracy = row.get("eval_accuracy")
    if row["step"] != 0 or accuracy is None or row["eval_pairs"] < LEAST_PAIRS or 0.2 < accuracy < 0.8:
        return None
    return (
        f"accuracy is {accuracy:.0%} before the first step, on {row['eval_pairs']:,} held-out pairs",
        "the base already tells the answers apart, perhaps by length or form: look at them with `orpo data`"
        if accuracy > 0.5
        else "chosen and rejected may be swapped (data.columns): look at them with `orpo data`",
    )


def held_out_worsens(run: Health) -> Told:
    """The held-out loss is a twentieth above its lowest, twice in a row or at the end."""
    losses = [row["eval_loss"] for row in run.evaluations if row["eval_loss"] is not None]
    if len(losses) < 2:
        return None
    lowest, at_end = min(losses), run.step >= run.total_steps
    recent = losses[-1:] if at_end else losses[-2:]
    if min(recent) <= 1.05 * lowest:
        return None
    step = next(row["step"] for row in run.evaluations if row["eval_loss"] == lowest)
    return (
        f"the held-out loss worsens: {losses[-1]:.3g}, after {lowest:.3g} at step {step}",
        "stop earlier (train.max_steps), or lower train.learning_rate" if step else "lower train.learning_rate",
    )


def answers_do_not_end(run: Health) -> Told:
    """The end of the turn is unlikely where held-out chosen answers end."""
    ends = run.evaluations[-1].get("eval_end_logps")
    if ends is None or not run.step or not run.half_way or ends > math.log(0.05):
        return None
    return (
        f"answers are not learnt to end: where held-out chosen ones do, the end of the turn has a probability of "
        f"{math.exp(ends):.1%} (median)",
        "train for longer or at a higher train.learning_rate; see with `orpo data` that answers end as the template "
        "ends a turn; truncated ones (data.overlong) do not teach it",
    )


def forgets(run: Health) -> Told:
    """The prompts have become twice as perplexing as they were to the base."""
    row = run.evaluations[-1]
    first = run.evaluations[0]
    base = row.get("eval_base_prompt_logps", first.get("eval_prompt_logps") if first["step"] == 0 else None)
    now = row.get("eval_prompt_logps")
    if base is None or now is None or base - now <= math.log(2):
        return None
    return (
        f"it forgets: the perplexity of held-out prompts was {math.exp(-base):.3g} to the base and is "
        f"{math.exp(min(-now, 700.0)):.3g}",
        f"lower train.learning_rate or loss.beta ({run.beta:g}), or fewer steps",
    )


OF_EVALUATIONS: Sequence[Rule] = (lopsided_start, held_out_worsens, answers_do_not_end, forgets)
