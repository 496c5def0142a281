"""Verdicts on claims, computed from paired values over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from leanlight.results.expression import Expression, Reference
from leanlight.results.table_spec import Claim, TableSpec

Verdict = Literal["reproduced", "not_reproduced", "inconclusive", "not_tested"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not_reproduced", "inconclusive", "not_tested")
CONFIDENCE = 0.95
Values = Mapping[Reference, Mapping[int, float]]  # (row, metric) → seed → value


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None as deviation of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's two-sided 95 % interval of the mean of at least 2 values; a point when all are equal."""
    from scipy.stats import t

    mean, std = mean_std(values)
    if std is None:
        raise ValueError("an interval needs at least 2 values")
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - half, mean + half


def smallest_difference(claim: Mapping[str, Any]) -> float | None:
    """Half the width of an inconclusive claim's interval: a distance from the margin above which it would have parted.

    In the units of the claim's expression; None for other verdicts.
    """
    if claim["verdict"] != "inconclusive":
        return None
    low, high = claim["evidence"]["interval"]
    return float(high - low) / 2


def paired(expression: Expression, seeds: Sequence[int], values: Values) -> tuple[dict[int, float], str]:
    """Evaluate `expression` for every seed at which all its rows have values; also say why seeds are left out."""
    found: dict[int, float] = {}
    problems: list[str] = []
    complete: list[int] = []
    for seed in seeds:
        missing = [
            f"{row}/{metric}" for row, metric in expression.references if seed not in values.get((row, metric), {})
        ]
        if missing:
            problems.append(f"seed {seed}: no {', '.join(missing)}")
        else:
            complete.append(seed)
    medians = {ref: median(values[ref][seed] for seed in complete) for ref in expression.references if complete}
    for seed in complete:
        try:
            found[seed] = expression.evaluate({ref: values[ref][seed] for ref in expression.references}, medians)
        except (ArithmeticError, ValueError) as error:
            problems.append(f"seed {seed}: {error}")
    return found, "; ".join(problems)


def judge(claim: Claim, spec: TableSpec, values: Values, *, stale: bool = False) -> dict[str, Any]:
    """Return the claim with its verdict and evidence.

    The expression is evaluated seed by seed, so that what seeds share cancels out. With the 95 % interval of its mean:
    reproduced when all of it lies above the margin, not_reproduced when none of it does, inconclusive otherwise.
    not_tested: too few seeds, or a claim of the paper in a table that is not at the paper's scale.
    """
    by_seed, problem = paired(claim.expr, spec.seeds, values)
    evidence: dict[str, Any] = {"n": len(by_seed), "by_seed": {str(seed): value for seed, value in by_seed.items()}}
    verdict, why = _verdict(claim, spec, list(by_seed.values()), evidence)
    return {
        "id": claim.id,
        "text": claim.text,
        "scope": claim.scope,
        "expr": claim.expr.text,
        "margin": claim.margin,
        "min_seeds": claim.min_seeds,
        "verdict": verdict,
        "counts_for_paper": claim.scope == "paper" and spec.scale == "paper",
        "evidence": {**evidence, "why": "; ".join(part for part in (why, problem) if part), "stale": stale},
    }


def _verdict(claim: Claim, spec: TableSpec, values: list[float], evidence: dict[str, Any]) -> tuple[Verdict, str]:
    """Decide; put mean and interval into `evidence` when they exist."""
    if values:
        evidence["mean"] = mean_std(values)[0]
    if len(values) >= 2:
        evidence["interval"] = list(interval(values))
    if claim.scope == "paper" and spec.scale != "paper":
        return "not_tested", "a claim of the paper, and this table is at reduced scale"
    if len(values) < claim.min_seeds:
        return "not_tested", f"{len(values)} of at least {claim.min_seeds} seeds"
    low, high = evidence["interval"]
    where = f"95 % interval [{low:.4g}, {high:.4g}]"
    if low > claim.margin:
        return "reproduced", f"{where} lies above {claim.margin:g}"
    if high <= claim.margin:
        return "not_reproduced", f"{where} does not exceed {claim.margin:g}"
    return "inconclusive", f"{where} contains {claim.margin:g}"
