"""What figures of a sample say of the whole: intervals, tests of significance, control of length. Float64, numpy alone.

Shapes: C columns of figures, N pairs, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000
_FLIPS = 9999
# Sign flips that are drawn at once; bounds memory, not the result.
_FLIPS_AT_ONCE = 256
_Z95 = 1.959963984540054
# A numeric column with more values than this is cut into quarters.
_FEW_VALUES = 10


def bootstrap(columns: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (C,) of columns (C, N) and the ends of their bootstrap 95 % intervals, pairs resampled."""
    low, high = interval(resampled_means(columns, seed), columns.shape[1])
    return columns.mean(1), low, high


def resampled_means(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means (R, C) of columns (C, N) over N pairs drawn with replacement, R times.

    The draws depend on seed and N alone: columns of the same pairs are resampled together, also in two calls.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    count = columns.shape[1]
    resampled = np.empty((_RESAMPLES, len(columns)))
    for r in range(_RESAMPLES):
        weights = np.bincount(generator.integers(0, count, count), minlength=count)
        resampled[r] = columns @ weights / count
    return resampled


def interval(resampled: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends (C,) of 95 % intervals from a statistic (R, C) of resamples of `count` pairs.

    Percentiles, a little farther out than 2.5 and 97.5: a resample's spread is that of a sample by sqrt((N - 1) / N)
    too narrow, and knows nothing of the t distribution. Expanded percentile interval, Hesterberg 2015
    (arXiv 1411.5279), section 4.
    """
    tail = 100 * _expanded_tail(count)
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return low, high


def _expanded_tail(count: int) -> float:
    """Phi(-sqrt(N / (N - 1)) t), t the 97.5 % quantile of Student's t with N - 1 degrees of freedom."""
    degrees = max(count - 1, 1)
    z = _Z95
    # Cornish-Fisher expansion of t (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return 0.5 * math.erfc(t * math.sqrt(1 + 1 / degrees) / math.sqrt(2))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, score interval); `trials` > 0."""
    z = _Z95
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding would put an end beyond a share of 0 or 1


# ---- is a difference more than chance? ----


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of so many pairs better and so many worse, ties left out, if both were equally likely.

    The exact binomial test; of two models' right and wrong answers it is McNemar's exact test.
    """
    count, fewer = better + worse, min(better, worse)
    logs = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(log - count * math.log(2)) for log in logs))


def sign_flip_test(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two-sided p (C,) of the mean of paired differences (C, N), if each were as likely to have the other sign.

    A permutation test of 9,999 random flips, counting the observed one. NaN where a difference is not finite.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    observed = np.abs(differences.sum(1))
    as_large = np.ones(len(differences))
    for start in range(0, _FLIPS, _FLIPS_AT_ONCE):
        rows = min(_FLIPS_AT_ONCE, _FLIPS - start)
        signs = 1.0 - 2.0 * generator.integers(0, 2, (rows, differences.shape[1]), dtype=np.int8)
        with np.errstate(invalid="ignore"):
            flipped = np.abs(signs @ differences.T)
            as_large += (flipped >= observed * (1 - 1e-12)).sum(0)
    return np.where(np.isfinite(observed), as_large / (_FLIPS + 1), np.nan)


# ---- length ----


def length_controlled_accuracy(correct: np.ndarray, longer: np.ndarray) -> tuple[float, float, float]:
    """Accuracy expected of a pair whose answers are equally long, and the ends of its 95 % interval.

    Fits P(correct) = sigmoid(a + b * d), d how many tokens the chosen answer is longer, in standard deviations, by
    Newton's method with a slight ridge (so that separable data has a fit); the accuracy is sigmoid(a). As in
    length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), "longer" cannot pass for "better". The
    interval is that of a, mapped. Its standard error is the larger of the sandwich estimate, right also where the curve
    is not quite the true one, and that of the curve, which does not vanish where all pairs are right.
    """
    spread = longer.std()
    design = np.stack([np.ones_like(longer), longer / spread if spread > 0 else np.zeros_like(longer)])
    weights = np.zeros(2)
    for _ in range(50):
        p = _sigmoid(weights @ design)
        gradient = design @ (correct - p) - 1e-2 * weights
        hessian = (design * (p * (1 - p))) @ design.T + 1e-2 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    influence = np.linalg.solve(hessian, design * (correct - p))[0]
    error = _Z95 * math.sqrt(max(influence @ influence, np.linalg.inv(hessian)[0, 0]))
    value, low, high = _sigmoid(weights[0] + np.array([0.0, -error, error]))
    return float(value), float(low), float(high)


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0.0, -x))


# ---- groups ----


def groups(values: Sequence[Any]) -> dict[str, np.ndarray]:
    """The places (n,) of each value of a column of length N, by its text; `null` for what is missing.

    Numbers of more than ten values are cut into quarters with as many pairs as their ties allow, named by the least
    and the largest number in them.
    """
    numbers = [value for value in values if _is_number(value)]
    if len(set(numbers)) > _FEW_VALUES and len(numbers) == sum(value is not None for value in values):
        edges = np.quantile(numbers, [0.25, 0.5, 0.75])
        keys: list[Any] = [None if value is None else int(np.searchsorted(edges, value)) for value in values]
        within: dict[int, list[float]] = {}
        for key, value in zip(keys, values, strict=True):
            if key is not None:
                within.setdefault(key, []).append(value)
        names = {key: f"{min(of):g} to {max(of):g}" for key, of in within.items()}
    else:
        keys = list(values)
        names = {}
    found: dict[str, list[int]] = {}
    for place in sorted(range(len(keys)), key=lambda i: _order(keys[i])):
        key = keys[place]
        found.setdefault(names[key] if key is not None and names else _name(key), []).append(place)
    return {name: np.array(sorted(places)) for name, places in found.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _order(key: Any) -> tuple[bool, bool, float, str]:
    """Numbers by size, then texts by the alphabet, then what is missing."""
    return key is None, not _is_number(key), key if _is_number(key) else 0.0, str(key)


def _name(key: Any) -> str:
    return "null" if key is None else str(key).lower() if isinstance(key, bool) else str(key)
