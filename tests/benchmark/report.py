"""The benchmark's figures: medians and ratios of rounds, and the tables that show them."""

from __future__ import annotations

from statistics import median
from typing import Callable, Dict, NamedTuple

Figures = Dict[str, float]  # the results of one measurement of one program, by key


class Samples:
    """The figures of one measurement, by round and by program."""

    def __init__(self, ours: str = "") -> None:
        """Compare the programs with this one."""
        self.ours = ours
        self.rounds: list[dict[str, Figures]] = []

    def add_round(self, figures: dict[str, Figures] | None = None) -> None:
        """Start a round."""
        self.rounds.append(figures or {})

    def add(self, name: str, figures: Figures) -> None:
        """Add a program's figures to the current round."""
        self.rounds[-1][name] = figures

    def names(self) -> list[str]:
        """Return the programs, in the order of the first round."""
        return list(dict.fromkeys(name for figures in self.rounds for name in figures))

    def median(self, name: str, key: str) -> float | None:
        """Return the median over the rounds, or None if nothing was measured."""
        values = [figures[name][key] for figures in self.rounds if key in figures.get(name, ())]
        return median(values) if values else None

    def ratio(self, name: str, key: str) -> float | None:
        """Return the median of our figure divided by that of the program in the same round."""
        return paired(self, self, self.ours, name, key)

    def summary(self) -> dict[str, Figures]:
        """Return all medians and ratios, by program."""
        result: dict[str, Figures] = {}
        for name in self.names():
            keys = dict.fromkeys(key for figures in self.rounds for key in figures.get(name, ()))
            found = {key: self.median(name, key) for key in keys}
            found.update((f"ours/{key}", self.ratio(name, key)) for key in keys)
            result[name] = {key: value for key, value in found.items() if value is not None}
        return result


def paired(ones: Samples, others: Samples, one: str, other: str, key: str) -> float | None:
    """Return the median over the rounds of one program's figure divided by the other's."""
    ratios = [
        figures[one][key] / max(divisors[other][key], 1e-12)  # a time can be too short for the clock
        for figures, divisors in zip(ones.rounds, others.rounds)
        if key in figures.get(one, ()) and key in divisors.get(other, ())
    ]
    return median(ratios) if ratios else None


class Column(NamedTuple):
    """A column of a table: its title, and the value and the format of each row's cell."""

    title: str
    value: Callable[[str], float | None]
    form: str = ",.0f"


def table(title: str, names: list[str], columns: list[Column]) -> str:
    """Return a Markdown table with aligned columns, or an empty string if no figures exist."""
    rows = []
    for name in names:
        values = [(column.value(name), column.form) for column in columns]
        if any(value is not None for value, _ in values):
            rows.append([name, *("" if value is None else format(value, form) for value, form in values)])
    if not rows:
        return ""
    head = [title, *(column.title for column in columns)]
    widths = [max(map(len, cells)) for cells in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def column(samples: Samples, key: str, title: str, factor: float = 1, form: str = ",.0f") -> Column:
    """Return a column of medians."""

    def value(name: str) -> float | None:
        found = samples.median(name, key)
        return None if found is None else found * factor

    return Column(title, value, form)


def ratio(samples: Samples, key: str, title: str) -> Column:
    """Return a column of ratios."""
    return Column(title, lambda name: samples.ratio(name, key), ",.2f")
