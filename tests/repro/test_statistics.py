"""Estimates and their intervals, from items made up so that the answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llmdrop.repro import statistics
from llmdrop.repro.estimate import NORMAL_QUANTILE, Estimate, exact


def rows_of(variant: str, where: str, metric: str, values, n=1) -> pd.DataFrame:
    """Rows as from `quality`: a variant's values on a task or text, item by item."""
    rows = {"variant": variant, "where": where, "metric": metric, "item": range(len(values)), "value": values, "n": n}
    return pd.DataFrame(rows)


def losses(n: int = 40) -> pd.DataFrame:
    """Three models on two texts: samples differ much, models by 0.2 and 0.1 nats on each."""
    random = np.random.default_rng(0)
    parts = []
    for text in ("news", "code"):
        whole = random.normal(3, 1, n)
        noise = random.normal(0, 0.02, n)
        parts.append(rows_of("whole", text, "nats", whole, n=100))
        parts.append(rows_of("cosine", text, "nats", whole + 0.2 + noise, n=100))
        parts.append(rows_of("better", text, "nats", whole + 0.1 - noise, n=100))
    return pd.concat(parts, ignore_index=True)


def stderr(estimate: Estimate) -> float:
    """The standard error of a normal distribution with an interval as wide."""
    return (estimate.high - estimate.low) / (2 * NORMAL_QUANTILE)


def test_columns_have_the_interval():
    assert Estimate(2.0, 1.0, 4.0).columns("lost") == {"lost": 2.0, "lost_low": 1.0, "lost_high": 4.0}


def test_headline_takes_one_metric_of_each():
    parts = [rows_of("a", "piqa", metric, [1, 0]) for metric in ("acc", "choice", "acc_norm")]
    parts += [
        rows_of("a", "boolq", "acc", [1, 0]),
        rows_of("a", "news", "nats", [3.0]),
        rows_of("a", "f", "match", [1]),
    ]
    shown = statistics.headline(pd.concat(parts, ignore_index=True)).groupby("where")["metric"].unique()
    assert {where: list(metrics) for where, metrics in shown.items()} == {
        "piqa": ["acc_norm"],
        "boolq": ["acc"],
        "news": ["nats"],
        "f": ["match"],
    }
    wikitext = rows_of("a", "wikitext", "word_perplexity", [20.0])
    with pytest.raises(ValueError, match="wikitext is measured by word_perplexity.*Leave it out"):
        statistics.headline(pd.concat([*parts, wikitext]))


def test_items_are_in_order_and_of_what_was_measured():
    rows = rows_of("a", "piqa", "acc", [1, 0, 1]).sample(frac=1, random_state=1)
    assert statistics.items(rows, "a", "piqa")["value"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="'b' was not measured on 'piqa'; measured: a"):
        statistics.items(rows, "b", "piqa")


def test_difference_is_paired():
    rows = losses()
    paired = statistics.difference(rows, "cosine", "whole", "news")
    assert paired.low < 0.2 < paired.high and stderr(paired) < 0.01  # though samples differ by 1 nat
    both = statistics.difference(rows, "cosine", "whole", ["news", "code"])
    each = [statistics.difference(rows, "cosine", "whole", text).value for text in ("news", "code")]
    assert both.value == pytest.approx(np.mean(each)) and stderr(both) < stderr(paired)
    one = rows[rows["item"] == 0]
    alone = statistics.difference(one, "cosine", "whole", "news")
    assert np.isfinite(alone.value) and np.isnan([alone.low, alone.high]).all()


def test_differences_of_several_pairs():
    pairs = [("cosine", "whole"), ("better", "whole")]
    mean = statistics.differences(losses(), pairs, ["news", "code"])
    assert mean.value == pytest.approx(0.15, abs=1e-9)  # the noise of the two is opposite
    assert mean.low == pytest.approx(0.15, abs=1e-9) and mean.n == 80 and mean.over == "samples"
    largest = statistics.differences(losses(), pairs, ["news", "code"], reduce=np.max)
    assert largest == statistics.difference(losses(), "cosine", "whole", ["news", "code"])


def test_the_interval_of_a_mean_is_students():
    rows = losses()
    values = statistics.items(rows, "cosine", "news")["value"] - statistics.items(rows, "whole", "news")["value"]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    estimate = statistics.difference(rows, "cosine", "whole", "news")
    assert [estimate.low, estimate.high] == pytest.approx(list(expected), abs=0.001)
    assert (estimate.n, estimate.over, estimate.method) == (40, "samples", "paired bootstrap")
    three = statistics.mean_of([1.0, 2.0, 6.0], "seeds")
    expected = stats.ttest_1samp([1.0, 2.0, 6.0], 0).confidence_interval(0.95)
    assert three.low < 0.9 * expected.low < 1 and three.high > expected.high > 6  # not between the extremes of three
    assert (three.n, three.over) == (3, "seeds")


def test_the_interval_does_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    rows = losses()
    at_once = statistics.difference(rows, "cosine", "whole", "news")
    monkeypatch.setattr(statistics, "DRAWS_AT_A_TIME", 400)
    again = statistics.difference(rows, "cosine", "whole", "news")
    assert [again.low, again.high] == pytest.approx([at_once.low, at_once.high], rel=1e-12)


def test_other_metrics_and_other_items():
    rows = pd.concat([rows_of("a", "piqa", "acc", [1, 0]), rows_of("a", "piqa", "choice", [-0.5, -1.5])])
    rows = pd.concat([rows, rows_of("b", "piqa", "acc", [1, 1]), rows_of("b", "piqa", "choice", [-0.25, -0.75])])
    assert statistics.difference(rows, "b", "a", "piqa").value == 0.5
    assert statistics.difference(rows, "b", "a", "piqa", "choice").value == 0.5
    with pytest.raises(ValueError, match="'b' was not measured on 'piqa' by 'nats'"):
        statistics.difference(rows, "b", "a", "piqa", "nats")
    fewer = pd.concat([rows_of("a", "piqa", "acc", [1, 0]), rows_of("b", "piqa", "acc", [1])])
    with pytest.raises(ValueError, match="a, b were measured on other items of 'piqa'"):
        statistics.difference(fewer, "a", "b", "piqa")


def test_clusters_are_drawn_whole():
    """Sentences of one document lose alike: forty sentences of four documents are four."""
    cluster = np.repeat([0, 1, 2, 3], 10)
    lost = np.array([0.1, 0.2, 0.3, 0.4])[cluster]
    whole = np.random.default_rng(0).normal(3, 1, 40)
    rows = pd.concat([rows_of("whole", "news", "nats", whole), rows_of("cosine", "news", "nats", whole + lost)])
    by_item = statistics.difference(rows, "cosine", "whole", "news")
    by_cluster = statistics.difference(rows.assign(cluster=np.tile(cluster, 2)), "cosine", "whole", "news")
    assert by_cluster.value == pytest.approx(by_item.value) == pytest.approx(0.25)
    assert stderr(by_cluster) > 4 * stderr(by_item)


def right_or_wrong() -> pd.DataFrame:
    """Two tasks of 40 questions: the whole model has 30 of each right, the dropped one 24 of them."""
    whole = np.arange(40) < 30
    parts = []
    for task in ("piqa", "openbookqa"):
        parts.append(rows_of("whole", task, "acc", whole.astype(int)))
        parts.append(rows_of("dropped", task, "acc", (np.arange(40) < 24).astype(int)))
    return pd.concat(parts, ignore_index=True)


def test_kept():
    rows = right_or_wrong()
    plain = statistics.kept(rows, "dropped", "whole", ["piqa", "openbookqa"])
    assert plain.value == pytest.approx(80) and plain.low < 80 < plain.high < 100
    assert (plain.n, plain.over) == (80, "questions")
    nothing = statistics.kept(rows.assign(value=0), "dropped", "whole", ["piqa"])
    assert np.isnan([nothing.value, nothing.low]).all()  # the whole model knows nothing
    assert statistics.above_unread(rows, "whole", "piqa", 0.5).value == pytest.approx(50)


def test_mcnemar():
    rows = right_or_wrong()
    assert statistics.mcnemar(rows, "dropped", "whole", "piqa") == pytest.approx(2 / 2**6)  # six, all of one side
    assert statistics.mcnemar(rows, "dropped", "whole", ["piqa", "openbookqa"]) == pytest.approx(2 / 2**12)
    assert statistics.mcnemar(rows, "whole", "whole", "piqa") == 1


def test_combined():
    rows = losses()
    names = ["whole", "better", "cosine"]
    largest = statistics.combined(
        lambda means: max(np.mean([m[k] - m[0] for m in means]) for k in (1, 2)), rows, names, ["news", "code"]
    )
    assert largest.value == pytest.approx(statistics.difference(rows, "cosine", "whole", ["news", "code"]).value)
    assert largest.low < 0.2 < largest.high


def rounds_of(seconds: dict[str, list[float]]) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"variant": name, "round": range(len(times)), "seconds": times}) for name, times in seconds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_speed_ratio():
    rounds = rounds_of({"Baseline": [2.0, 4.0, 8.0, 2.0], "Attn-8": [1.0, 2.1, 3.9, 1.0]})
    ratio = statistics.speed_ratio(rounds, "Attn-8", "Baseline")
    assert ratio.value == pytest.approx(2.0, abs=0.02) and 1.8 < ratio.low < 2 < ratio.high < 2.2
    assert (ratio.n, ratio.over) == (4, "rounds")
    assert statistics.speed_ratio(rounds, "Baseline", "Attn-8").value == pytest.approx(1 / ratio.value)
    with pytest.raises(ValueError, match="'MLP-8' has no seconds of every round; timed: Baseline, Attn-8"):
        statistics.speed_ratio(rounds, "MLP-8", "Baseline")
    out_of_memory = rounds_of({"Baseline": [2.0, 2.0], "Attn-8": [1.0, np.nan]})
    with pytest.raises(ValueError, match="'Attn-8' has no seconds of every round"):
        statistics.speed_ratio(out_of_memory, "Attn-8", "Baseline")


def test_loss_beyond_gamma():
    rows = right_or_wrong()
    more = rows[rows["variant"] == "dropped"].assign(variant="other")
    more.loc[more["item"] < 3, "value"] = 0
    rows = pd.concat([rows, more], ignore_index=True)
    both = ["piqa", "openbookqa"]
    rounds = rounds_of({"whole": [1.5] * 5, "dropped": [1.0] * 5, "other": [1.2] * 5})
    beyond = statistics.loss_beyond_gamma(rows, rounds, "dropped", "other", "whole", both)
    assert beyond.value == pytest.approx(22.5 - 15 / 50 * 25)
    assert beyond.low < beyond.value < beyond.high and beyond.over == "questions and rounds"
    slower = rounds_of({"whole": [1.5] * 5, "dropped": [1.6] * 5, "other": [1.2] * 5})
    undefined = statistics.loss_beyond_gamma(rows, slower, "dropped", "other", "whole", ["piqa"])
    assert np.isnan([undefined.value, undefined.low]).all()
    hardly_faster = rounds_of({"whole": [1.5] * 5, "dropped": [1.0] * 5, "other": [1.49, 1.51, 1.5, 1.48, 1.52]})
    steady = statistics.loss_beyond_gamma(rows, hardly_faster, "dropped", "other", "whole", both)
    assert steady.value == pytest.approx(22.5, abs=0.2)
    assert steady.high - steady.low == pytest.approx(beyond.high - beyond.low, rel=0.5)
    of_texts = losses()
    rounds = rounds_of({"whole": [1.5] * 5, "cosine": [1.0] * 5, "better": [1.2] * 5})
    beyond = statistics.loss_beyond_gamma(of_texts, rounds, "better", "cosine", "whole", ["news", "code"])
    assert beyond.value == pytest.approx(0.2 - 0.1 / 25 * 50, abs=0.01) and beyond.over == "samples and rounds"


def test_gamma():
    assert statistics.gamma(75.1, 73.3, 1.43) == pytest.approx(1.8 / 43)


@pytest.mark.parametrize("speedup", [1.0, 1 + 1e-12, 0.89, np.nan])
def test_gamma_is_undefined_without_a_speedup(speedup):
    """At 0.89 x it was -0.16 once: low, as if that were good."""
    assert np.isnan(statistics.gamma(62.0, 60.2, speedup))


def test_exact_has_no_spread_and_units_change():
    assert exact(3) == Estimate(3, 3, 3, None, "exact")
    share = Estimate(-0.1, -0.2, 0.1, 40, "questions", "paired bootstrap")
    assert share.times(-100) == Estimate(10, -10, 20, 40, "questions", "paired bootstrap")


def test_remaining_loss():
    rows = losses()
    left = statistics.remaining_loss(rows, "better", "whole", "cosine", ["news", "code"])
    assert left.low < left.value < left.high and left.value == pytest.approx(0.5, abs=0.05)
    same = statistics.remaining_loss(rows, "cosine", "whole", "cosine", ["news", "code"])
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    nothing = statistics.remaining_loss(rows, "whole", "whole", "cosine", ["news"])
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_wilson():
    assert statistics.wilson(0, 10).low == 0 and statistics.wilson(10, 10).high == 1
    none = statistics.wilson(0, 48)
    assert none.value == 0 < none.high < 0.1
    half = statistics.wilson(50, 100)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_shares():
    rows = pd.DataFrame({"variant": ["a", "a", "b", "b"], "tokens": 512, "right": [1, 0, 1, 1]})
    table = statistics.shares(rows, "variant", "tokens")
    assert table[["variant", "n_right", "n", "value"]].values.tolist() == [["a", 1, 2, 50], ["b", 2, 2, 100]]
    summed = statistics.shares(pd.DataFrame({"variant": ["a"], "right": [12], "n": [48]}), "variant")
    interval = statistics.wilson(12, 48)
    assert summed[["value", "low", "high"]].values.tolist() == [[25, 100 * interval.low, 100 * interval.high]]


def test_context_table():
    def part(task, variant, tokens, values, shots=np.nan):
        rows = {"task": task, "variant": variant, "tokens": tokens, "item": range(len(values)), "right": values}
        return pd.DataFrame(rows | {"shots": shots})

    rows = pd.concat(
        [
            part("kinds", "Baseline", 900, [1, 1, 1, 0], 2),
            part("kinds", "Baseline", 300, [1, 1, 0, 0], 1),
            part("kinds", "MLP-8", 300, [0, 0, 0, 0], 1),
            part("kinds", "MLP-8", 900, [1, 0, 0, 0], 2),
            part("retrieval", "Baseline", 512, [1, 1, 1, 1]),
            part("retrieval", "MLP-8", 512, [0, 0, 0, 1]),
            part("retrieval", "Baseline", 4096, [0, 0, 0, 0]),  # of one only: no column compares it
        ]
    )
    table = statistics.context_table(rows, {"kinds": 12.5, "retrieval": 6.25}).set_index("method")
    assert list(table.index) == ["Baseline", "MLP-8", "Guessing"]
    intervals = [f"{column}{end}" for column in ("avg", "found") for end in ("", "_low", "_high")]
    assert list(table) == ["1: 0.3k", "2: 0.9k", *intervals]
    assert table.loc["Baseline", ["1: 0.3k", "2: 0.9k", "avg", "found"]].tolist() == [50, 75, 62.5, 100]
    assert table.loc["MLP-8", ["1: 0.3k", "2: 0.9k", "avg", "found"]].tolist() == [0, 25, 12.5, 25]
    assert table.loc["Guessing", ["1: 0.3k", "avg", "found"]].tolist() == [12.5, 12.5, 6.25]
    average = statistics.mean_of([100, 100, 50, 0], "questions")
    assert table.loc["Baseline", ["avg_low", "avg_high"]].tolist() == pytest.approx([average.low, average.high])
    assert table.loc["Baseline", "found_low"] < 60  # all of four found is not all for sure


def answers(n: int = 48) -> pd.DataFrame:
    """Two measures of three models: one answers as the Baseline does, one is wrong on half of what that knows."""
    right = np.arange(n) % 4 < 3
    parts = []
    for model, values in {"Baseline": right, "same": right, "worse": right & (np.arange(n) % 2 == 0)}.items():
        parts.append(pd.DataFrame({"model": model, "measure": "facts", "item": range(n), "value": values.astype(int)}))
        repeated = np.linspace(0, 1, n) / 3 + 0.2 * (model == "worse")
        parts.append(pd.DataFrame({"model": model, "measure": "repeated", "item": range(n), "value": repeated}))
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=0).sort_values(["measure", "model"])


def test_against_is_paired():
    table = statistics.against(answers()).set_index(["measure", "model"])
    worse = table.loc[("facts", "worse")]
    assert worse["value"] == 0.5 and worse["lost"] == 0.25 and worse["n"] == 48
    interval = statistics.wilson(24, 48)
    assert (worse["low"], worse["high"]) == (interval.low, interval.high)
    assert 0.1 < worse["lost_low"] < 0.25 < worse["lost_high"] < 0.4 and worse["p"] < 0.01
    same = table.loc[("facts", "same")]
    assert (same["lost"], same["lost_low"], same["lost_high"], same["p"]) == (0, 0, 0, 1)
    assert np.isnan(table.loc[("facts", "Baseline"), "p"])
    shifted = table.loc[("repeated", "worse")]  # no answers right or wrong: a bootstrap's interval, and paired exactly
    assert shifted["low"] < shifted["value"] < shifted["high"]
    assert shifted[["lost", "lost_low", "lost_high"]].tolist() == pytest.approx([-0.2] * 3)


def test_p_counts_signs():
    rows = pd.DataFrame({"model": ["Baseline"] * 5 + ["a"] * 5, "measure": "m", "item": [*range(5)] * 2})
    rows["value"] = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    table = statistics.against(rows).set_index("model")
    assert table.loc["a", "p"] == pytest.approx(2 / 2**5)  # all five of one sign, either way


def test_against_of_shares_stays_between_none_and_all():
    values = [1.0, 1.0, 0.9, 0.2, 0.0, 0.1]
    models = ["Baseline"] * 3 + ["a"] * 3
    rows = pd.DataFrame({"model": models, "measure": "new", "item": [0, 1, 2] * 2, "value": values})
    table = statistics.against(rows).set_index("model")
    assert table.loc["Baseline", "high"] == 1 and table.loc["a", "low"] == 0
    unlimited = statistics.against(rows.assign(value=10 * rows["value"])).set_index("model")
    assert unlimited.loc["Baseline", "high"] > 10 and unlimited.loc["a", "low"] < 0


def test_against_of_one_item_knows_no_spread():
    rows = pd.DataFrame({"model": ["Baseline", "a"], "measure": "m", "item": 0, "value": [1, 0]})
    row = statistics.against(rows).set_index("model").loc["a"]
    assert row["lost"] == 1 and np.isnan(row[["lost_low", "lost_high", "p"]].astype(float)).all()


def test_side_by_side():
    shown = statistics.side_by_side(statistics.against(answers())).set_index("model")
    interval = statistics.wilson(24, 48)
    assert list(shown) == ["facts", "repeated"]
    assert shown.loc["worse", "facts"] == f"50 [{100 * interval.low:.0f}, {100 * interval.high:.0f}] *"
    assert not shown.loc["same", "facts"].endswith("*")
