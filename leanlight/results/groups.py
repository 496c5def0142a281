"""Rows of a table that may be compared: those of one setting, and the best of them where it stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leanlight.results.claims import interval
from leanlight.results.format import show_setting

Row = Mapping[str, Any]


def group_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what every row sets, e.g. ``ipc=10``, in order of first appearance; the name is empty for a single group.

    What only some rows set, such as the time steps of spiking networks, is what a table compares and parts no groups.
    """
    keys = parting_keys(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(show_setting({key: row["setting"][key] for key in keys}), []).append(row)
    return groups


def parting_keys(rows: Sequence[Row]) -> list[str]:
    """Keys of the setting that part rows into groups: all rows have them, and not all the same; none if all differ."""
    keys = [key for key in rows[0]["setting"] if all(key in row["setting"] for row in rows)] if rows else []
    values = {key: [str(row["setting"][key]) for row in rows] for key in keys}
    keys = [key for key in keys if len(set(values[key])) > 1]
    together = set(zip(*(values[key] for key in keys), strict=True))
    return keys if len(together) < len(rows) else []


def shared_setting(rows: Sequence[Row]) -> dict[str, Any]:
    """What all of several rows set alike; it is said once."""
    first = rows[0]["setting"] if len(rows) > 1 else {}
    return {key: value for key, value in first.items() if all(row["setting"].get(key) == value for row in rows)}


def best_row(rows: Sequence[Row], metric: str, higher: bool) -> str | None:
    """Name of the row whose 95 % interval lies on the better side of every other row's; None where none does."""
    ends = {
        row["name"]: interval(list(row["metrics"][metric]["by_seed"].values()))
        for row in rows
        if metric in row["metrics"] and row["metrics"][metric]["n"] > 1
    }
    if len(ends) < 2:
        return None
    near, far = (0, 1) if higher else (1, 0)  # of an interval, the end towards worse values and that towards better
    sign = 1 if higher else -1
    best = max(ends, key=lambda name: sign * ends[name][near])
    if all(sign * ends[best][near] > sign * end[far] for name, end in ends.items() if name != best):
        return str(best)
    return None
