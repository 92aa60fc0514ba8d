"""A number with its interval: what `statistics` makes, and what a claim is recorded with."""

from dataclasses import dataclass
from math import exp, nan

NORMAL_QUANTILE = 1.959964  # 97.5 % of a standard normal distribution lie below


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where it is not known.

    n, over: how many of what the interval is over ("questions", "samples", "rounds", "seeds", ...; see
    `llmdrop.repro.paper.INTERVALS`), "exact" for what has no spread. method: how it was made, for people.
    """

    value: float
    low: float
    high: float
    n: int | None = None
    over: str = ""
    method: str = ""

    def columns(self, name: str) -> dict[str, float]:
        """As columns of a table: the number by this name, its interval as <name>_low and <name>_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def times(self, factor: float) -> "Estimate":
        """In another unit: 100 makes percent of shares."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.value, low, high, self.n, self.over, self.method)

    def exp(self) -> "Estimate":
        """Of what was estimated in logarithms: a ratio, whose interval stays above 0."""
        method = f"{self.method} of logarithms"
        return Estimate(exp(self.value), exp(self.low), exp(self.high), self.n, self.over, method)

    def clipped(self, least: float, most: float) -> "Estimate":
        """With the interval cut to the values that are possible."""
        return Estimate(self.value, max(self.low, least), min(self.high, most), self.n, self.over, self.method)


UNKNOWN = Estimate(nan, nan, nan)


def exact(value: float) -> Estimate:
    """What follows from printed numbers, shapes or counts alone: it has no spread."""
    return Estimate(float(value), float(value), float(value), None, "exact")
