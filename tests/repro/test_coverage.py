"""Simulated data with a known truth: intervals hold it, and verdicts are wrong at most one time in twenty.

A limit just below the truth makes "differs" wrong, one just above it "holds": the two are the ends of the interval that
miss. Sizes are the least that claims use.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from llmdrop.repro import statistics
from llmdrop.repro.estimate import Estimate
from llmdrop.repro.paper import verdict
from llmdrop.repro.statistics import (
    counted,
    difference,
    kept,
    loss_beyond_gamma,
    mean_of,
    ratio,
    remaining_loss,
    speed_ratio,
)

RUNS = 250
TEXTS = ["news", "plots", "paragraphs", "code"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


def rows_of(values: dict[str, dict[str, np.ndarray]], metric: str) -> pd.DataFrame:
    """Rows as from `quality`: {text or task: {variant: values}}."""
    parts = []
    for where, of_variants in values.items():
        for variant, column in of_variants.items():
            items = {"item": range(len(column)), "value": column.astype(float), "n": 127}
            parts.append(pd.DataFrame({"variant": variant, "where": where, "metric": metric} | items))
    return pd.concat(parts, ignore_index=True)


def heavy_tailed(random, n: int, mean: float) -> np.ndarray:
    """What a variant loses on n samples: means of 127 tokens with long tails, and samples that differ themselves."""
    of_tokens = random.lognormal(0, 1.5, (n, 127)).mean(axis=1) / np.exp(1.5**2 / 2)
    return mean * of_tokens * random.lognormal(0, 0.3, n) / np.exp(0.3**2 / 2)


def nats(random) -> Estimate:
    values = {}
    for text, lost in zip(TEXTS, (0.3, 0.6, 0.9, 0.2), strict=True):
        whole = random.normal(3, 1, 16)
        values[text] = {"whole": whole, "dropped": whole + heavy_tailed(random, 16, lost)}
    return difference(rows_of(values, "nats"), "dropped", "whole", TEXTS)


def skewed(random) -> Estimate:
    values = {}
    for text in TEXTS:
        whole = random.normal(3, 1, 16)
        values[text] = {"whole": whole, "dropped": whole + random.lognormal(0, 0.5, 16)}
    return difference(rows_of(values, "nats"), "dropped", "whole", TEXTS)


def share_of_the_loss(random) -> Estimate:
    values = {}
    for text in TEXTS:
        whole = random.normal(3, 1, 16)
        lost = heavy_tailed(random, 16, 0.5)
        left = 0.35 * lost * random.lognormal(0, 0.3, 16) / np.exp(0.3**2 / 2)
        values[text] = {"whole": whole, "paper": whole + lost, "ours": whole + left}
    return remaining_loss(rows_of(values, "nats"), "ours", "whole", "paper", TEXTS)


def answers(random, n: int, alike: float) -> dict[str, np.ndarray]:
    """Right or wrong: the baseline 60 of 100, a variant that answers alike, and else 50 of 100."""
    baseline = random.random(n) < 0.6
    other = random.random(n) < 0.5
    return {"baseline": baseline, "variant": np.where(random.random(n) < alike, baseline, other)}


def points(random, n: int = 100, alike: float = 0.7) -> Estimate:
    return difference(rows_of({"piqa": answers(random, n, alike)}, "acc"), "variant", "baseline", "piqa")


def few_points(random) -> Estimate:
    return points(random, 24, 0.8)


def percent_kept(random) -> Estimate:
    tasks = {name: answers(random, 100, 0.7) for name in ("piqa", "openbookqa", "social_iqa")}
    return kept(rows_of(tasks, "acc"), "variant", "baseline", list(tasks))


def clustered(random) -> Estimate:
    cluster = np.repeat(np.arange(16), random.integers(2, 7, 16))
    whole = random.normal(3, 1, len(cluster))
    dropped = whole + 0.2 + random.normal(0, 0.5, 16)[cluster] + random.normal(0, 0.2, len(cluster))
    rows = rows_of({"news": {"whole": whole, "dropped": dropped}}, "nats")
    return difference(rows.assign(cluster=np.tile(cluster, 2)), "dropped", "whole", "news")


def timed(random, seconds: dict[str, float], n: int = 5) -> pd.DataFrame:
    """Rounds as from `timing`: 2 % of noise, and one time in fifteen something else that runs."""
    parts = []
    for variant, mean in seconds.items():
        disturbed = (random.random(n) < 1 / 15) * random.exponential(0.2, n)
        noisy = mean * np.exp(random.normal(0, 0.02, n) + disturbed)
        parts.append(pd.DataFrame({"variant": variant, "round": range(n), "seconds": noisy}))
    return pd.concat(parts, ignore_index=True)


def speed(random) -> Estimate:
    return speed_ratio(timed(random, {"baseline": 1.2, "dropped": 1.0}), "dropped", "baseline")


def seeds(random) -> Estimate:
    return mean_of(random.normal(1, 1, 5), "seeds")


def ratio_of_layers(random) -> Estimate:
    """Importance of attention over that of the MLPs, mean over 30 layers, of which a few have most of it."""
    shared = random.normal(0, 0.4, 30)
    layers = np.exp(random.normal(0, 0.6, (30, 2)) + shared[:, None]) * [0.5, 1]

    def of_means(drawn: list[np.ndarray]) -> float:
        attn, mlp = drawn[0].mean(axis=0)
        return attn / mlp

    return ratio(of_means, [layers], "layers")


def deep_layers(random) -> Estimate:
    """How many of the 8 layers that score lowest on 16 samples are among the last 15; two are as good as equal."""
    deep = np.linspace(0.2, 0.6, 5)
    truth = np.r_[0.61, np.linspace(1, 2, 11), np.linspace(0.1, 0.5, 3), deep, np.linspace(1, 2, 10)]
    samples = truth * random.lognormal(0, 0.2, (16, 30))
    return counted(lambda means: np.sum(means[0].argsort()[:8] >= 15), [samples], "samples")


def gammas(random) -> Estimate:
    values = {}
    for text in TEXTS:
        whole = random.normal(3, 1, 16)
        values[text] = {
            "whole": whole,
            "attn": whole + heavy_tailed(random, 16, 0.4),
            "block": whole + heavy_tailed(random, 16, 1.3),
        }
    rounds = timed(random, {"whole": 1.3, "attn": 1.3 / 1.15, "block": 1.3 / 1.3}, 15)  # those of `full`
    return loss_beyond_gamma(rows_of(values, "nats"), rounds, "attn", "block", "whole", TEXTS)


CASES: dict[str, tuple[Callable, float]] = {
    "nats": (nats, 0.5),
    "skewed nats": (skewed, np.exp(0.125)),
    "share of the loss": (share_of_the_loss, 0.35),
    "points": (points, -0.03),
    "few points": (few_points, -0.02),
    "percent kept": (percent_kept, 95.0),
    "clusters": (clustered, 0.2),
    "speed": (speed, 1.2),
    "seeds": (seeds, 1.0),
    "ratio": (ratio_of_layers, 0.5),
    "count": (deep_layers, 5.0),
    "gamma": (gammas, 1.3 - 0.4 / 15 * 30),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_wrong_at_most_one_time_in_twenty(name):
    simulate, truth = CASES[name]
    random = np.random.default_rng(0)
    estimates = [simulate(random) for _ in range(RUNS)]
    just = 1e-9
    wrongly_holds = np.mean([verdict("above", truth + just, estimate) == "holds" for estimate in estimates])
    wrongly_differs = np.mean([verdict("above", truth - just, estimate) == "differs" for estimate in estimates])
    assert max(wrongly_holds, wrongly_differs) <= 0.05
    assert 1 - wrongly_holds - wrongly_differs >= 0.93
    assert np.nanmedian([estimate.value for estimate in estimates]) == pytest.approx(truth, abs=0.1 * abs(truth) + 0.01)


@pytest.mark.parametrize("truth, wrong", [(0.0, "differs"), (0.0499, "differs"), (0.0501, "holds"), (0.1, "holds")])
def test_equivalence_is_wrong_at_most_one_time_in_twenty(truth, wrong):
    """At the margin neither verdict comes about by chance; at 0 and far out the right one does, mostly."""
    random = np.random.default_rng(1)
    found = []
    at_the_margin = abs(truth - 0.05) < 0.01
    for _ in range(RUNS if at_the_margin else 60):
        values = {}
        for text in TEXTS:
            whole = random.normal(3, 1, 16)
            values[text] = {"whole": whole, "dropped": whole + truth + random.normal(0, 0.06, 16)}
        found.append(verdict("within", 0.05, difference(rows_of(values, "nats"), "dropped", "whole", TEXTS)))
    assert np.mean([one == wrong for one in found]) <= 0.05
    right = "holds" if wrong == "differs" else "differs"
    if not at_the_margin:
        assert np.mean([one == right for one in found]) > 0.9


def test_agreement_on_a_few_questions_is_not_certain():
    """A bootstrap of ten equal answers would say 0 ± 0."""
    same = {"baseline": np.ones(10), "variant": np.ones(10)}
    estimate = difference(rows_of({"piqa": same}, "acc"), "variant", "baseline", "piqa")
    assert estimate.value == 0 and estimate.low < -0.2 and estimate.high > 0.2


def test_a_ratio_is_above_nothing_and_a_correlation_at_most_one():
    few = np.array([[0.1, 1.0], [0.1, 1.0], [4.0, 5.0]])
    estimate = ratio(lambda drawn: drawn[0][:, 0].mean() / drawn[0][:, 1].mean(), [few], "layers")
    assert estimate.value == pytest.approx(4.2 / 7) and 0 < estimate.low < 0.1 and estimate.high > 1
    assert estimate.method == "bootstrap of logarithms"
    assert np.isnan(ratio(lambda drawn: -1.0, [few], "layers").value)
    sure = Estimate(0.9, 0.5, 1.3, 3, "layers").clipped(-1, 1)
    assert (sure.value, sure.low, sure.high) == (0.9, 0.5, 1)


def test_what_is_nearly_always_the_same_number_has_a_narrow_interval():
    scores = np.tile(np.arange(10.0), (40, 1))
    scores[:2, 3] += 15  # layer 4 is before layer 3 where these two are drawn often
    estimate = counted(lambda means: np.sum(means[0].argsort()[:4] >= 4), [scores], "samples")
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 1)
    assert verdict("below", 2, estimate) == "holds" and verdict("above", 1, estimate) == "differs"
