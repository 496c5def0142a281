"""The one list of selection rules, readable without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from leanlight.contracts.errors import UserError, nearest


@dataclass(frozen=True)
class RuleInfo:
    """One rule.

    Args:
        name: for ``leanlight select --rule``.
        target: import path of its class.
        needs: what the features must hold; a test compares it with the class.
        help: one line, with its source.
    """

    name: str
    target: str
    needs: tuple[str, ...]
    help: str


_SHELF, _ADQ = "lit_modules.selection", "lit_modules.adq"
_DYNAMICS = ("train_probability", "train_margin", "train_error")

RULES: dict[str, RuleInfo] = {
    info.name: info
    for info in (
        RuleInfo("full", f"{_SHELF}.Full", (), "every item"),
        RuleInfo("random", f"{_SHELF}.Random", (), "items of each class at random"),
        RuleInfo("herding", f"{_SHELF}.Herding", ("embedding",), "keep the mean of the class (Welling 2009)"),
        RuleInfo("k_center", f"{_SHELF}.KCenter", ("embedding",), "farthest first (Sener & Savarese 2018)"),
        RuleInfo("graph_cut", f"{_SHELF}.GraphCut", ("embedding", "logits"), "central items, one pass of graph cut"),
        RuleInfo("facility_location", f"{_SHELF}.FacilityLocation", ("embedding", "logits"), "cover the class"),
        RuleInfo("craig", f"{_SHELF}.Craig", ("embedding", "logits"), "cover gradients, weighted (Mirzasoleiman 2020)"),
        RuleInfo("forgetting", f"{_SHELF}.Forgetting", ("train_margin",), "most often forgotten (Toneva 2019)"),
        RuleInfo("el2n", f"{_SHELF}.EL2N", ("train_error",), "largest error norm (Paul 2021)"),
        RuleInfo("entropy", f"{_SHELF}.Entropy", ("logits",), "most uncertain predictions"),
        RuleInfo("least_confidence", f"{_SHELF}.LeastConfidence", ("logits",), "least probable predictions"),
        RuleInfo("margin", f"{_SHELF}.Margin", ("logits",), "nearest two most probable classes"),
        RuleInfo("cal", f"{_SHELF}.CAL", ("embedding", "logits"), "unlike their neighbours (Margatina 2021)"),
        RuleInfo("moderate", f"{_SHELF}.Moderate", ("embedding",), "median distance from the mean (Xia 2023)"),
        RuleInfo("grad_match", f"{_SHELF}.GradMatch", ("embedding", "logits"), "mean gradient (Killamsetty 2021)"),
        RuleInfo("glister", f"{_SHELF}.Glister", ("embedding", "logits"), "gradient after a step (Killamsetty 2021)"),
        RuleInfo("d2", f"{_SHELF}.D2", ("embedding", "train_error"), "hard, and spread out (Maharana 2024)"),
        RuleInfo("dual", f"{_SHELF}.DUAL", ("train_probability",), "hard and undecided, drawn (arXiv:2502.06905)"),
        RuleInfo("ccs", f"{_SHELF}.CCS", ("train_margin",), "strata of the margin, hardest left out (Zheng 2023)"),
        RuleInfo("dq", f"{_ADQ}.DQ", ("embedding", "logits"), "bins of graph cut, drawn from evenly (Zhou 2023)"),
        RuleInfo(
            "adq",
            f"{_ADQ}.ADQ",
            ("embedding", "logits", "texture", "views"),
            "bins drawn from by texture and diversity (Li 2025)",
        ),
    )
}


def rule(name: str) -> RuleInfo:
    """A rule by name; UserError with the nearest name otherwise."""
    if name not in RULES:
        raise UserError(f"rule: {name!r} is none{nearest(name, RULES)}; `leanlight select --list` names them")
    return RULES[name]
