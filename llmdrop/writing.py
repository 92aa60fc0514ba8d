"""What multiple choice does not see: last words of stories, instructions that can be checked, text that repeats itself.

Everything is judged by plain rules, prompt by prompt, so that models can be compared on the same prompts.
"""

import os
import re
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from . import style
from .calibration import SOURCES
from .data import read_split
from .questions import wilson

# instruction -> check of the answer, stripped; what IFEval calls verifiable
INSTRUCTIONS: dict[str, Callable[[str], bool]] = {
    "Answer in lowercase letters only.": lambda text: text == text.lower(),
    "Answer in capital letters only.": lambda text: text == text.upper(),
    "Do not use any commas.": lambda text: "," not in text,
    'Begin your answer with the word "Certainly".': lambda text: text.startswith("Certainly"),
    "Answer with one word.": lambda text: len(text.split()) == 1,
    "Put your whole answer in double quotation marks.": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "Answer with exactly two bullet points, each on a line that begins with * .": lambda text: (
        sum(line.lstrip().startswith("* ") for line in text.splitlines()) == 2
    ),
    'End your answer with the words "I hope this helps".': lambda text: text.rstrip('."!').endswith(
        "I hope this helps"
    ),
}


def last_words(
    n: int, words: int = 40, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> tuple[list[str], list[str]]:
    """(passages without their last word, last words): LAMBADA's protocol on n plots of stories.

    A passage: the fewest whole sentences of a plot, before and with one of them, that have more than `words` words.
    The last word stands in the passage before, has more than three letters, all lowercase: what the story says tells
    it, as in most of LAMBADA. ValueError if there are fewer than n.
    """
    dataset, config, split, text, _ = SOURCES["narrativeqa"]
    rows = read_split(dataset, config, split, data_dir)
    found = []
    for i in np.random.default_rng(seed).permutation(len(rows)):
        passage: list[list[str]] = []
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text(rows[i]).split())):
            passage.append(sentence.split())
            while len(sum(passage[1:], [])) > words:
                del passage[0]
            flat = sum(passage, [])
            last = flat[-1].rstrip(".!?")
            before = {word.strip(".,;:!?\"'()").lower() for word in flat[:-1]}
            if len(flat) > words and len(last) > 3 and last.isalpha() and last.islower() and last in before:
                found.append((" ".join(flat[:-1]), f" {last}"))
    if not 1 <= n <= len(found):
        raise ValueError(f"n={n}; there are {len(found)} passages of more than {words} words with such a last word")
    prompts, targets = zip(*found[:n], strict=True)
    return list(prompts), list(targets)


def instructions(n: int, seed: int = 0, data_dir: str | os.PathLike | None = None) -> tuple[list[str], list[str]]:
    """(questions with an instruction each, instructions): questions of PIQA, INSTRUCTIONS in turn."""
    rows = read_split("baber/piqa", None, "validation", data_dir)
    goals = list(dict.fromkeys(row["goal"].strip() for row in rows if row["goal"].strip().endswith("?")))
    if not 1 <= n <= len(goals):
        raise ValueError(f"n={n}; there are {len(goals)} questions in PIQA")
    asked = [goals[i] for i in np.random.default_rng(seed).permutation(len(goals))[:n]]
    chosen = [list(INSTRUCTIONS)[k % len(INSTRUCTIONS)] for k in range(n)]
    return [f"{goal} {instruction}" for goal, instruction in zip(asked, chosen, strict=True)], chosen


def obeys(text: str, instruction: str) -> bool:
    """Whether an answer does what its instruction asks; an answer without a word does nothing."""
    return bool(re.search(r"\w", text)) and INSTRUCTIONS[instruction](text.strip())


def openings(n: int, words: int = 25, seed: int = 0, data_dir: str | os.PathLike | None = None) -> list[str]:
    """The first words of n news articles, to go on from."""
    rows = read_split("EdinburghNLP/xsum", None, "test", data_dir)
    texts = [" ".join(row["document"].split()[:words]) for row in rows if len(row["document"].split()) > 2 * words]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:n]]


def distinct(text: str, n: int = 2) -> float:
    """Distinct n-grams of words in a text, as a share of all; NaN for a text of fewer words than n."""
    grams = _grams(text, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that stood in the text before; 0 for a text of fewer words than n."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def against(rows: pd.DataFrame, base: str = "Baseline", rounds: int = 2000) -> pd.DataFrame:
    """Mean of `value` per model and measure, and its difference to the base model's, paired by item.

    rows: model, measure, item, value. Returns model, measure, n, value, low, high, lost, lost_low, lost_high (95 %
    intervals of a bootstrap over items; low and high are Wilson's where every value is 0 or 1) and p: how often, were
    the two alike, a mean difference as large would come about by chance (signs of the differences drawn anew,
    two-sided; NaN for the base model).
    """
    random, found = np.random.default_rng(0), []
    for (measure, model), group in rows.groupby(["measure", "model"], sort=False):
        mine = group.set_index("item")["value"]
        theirs = rows[(rows["measure"] == measure) & (rows["model"] == base)].set_index("item")["value"]
        lost = (theirs - mine).to_numpy(float)
        pick = random.integers(len(mine), size=(rounds, len(mine)))
        low, high = np.quantile(mine.to_numpy(float)[pick].mean(1), [0.025, 0.975])
        if mine.isin([0, 1]).all():
            low, high = wilson(mine.sum(), len(mine))  # none right of 48 is not none for sure
        lost_low, lost_high = np.quantile(lost[pick].mean(1), [0.025, 0.975])
        signs = random.choice([-1.0, 1.0], size=(rounds, len(mine)))
        as_large = (np.abs((signs * lost).mean(1)) >= abs(lost.mean()) - 1e-12).sum()
        row = {"model": model, "measure": measure, "n": len(mine), "value": mine.mean(), "low": low, "high": high}
        row |= {"lost": lost.mean(), "lost_low": lost_low, "lost_high": lost_high}
        found.append(row | {"p": float("nan") if model == base else (1 + as_large) / (1 + rounds)})
    return pd.DataFrame(found)


def side_by_side(table: pd.DataFrame, digits: int = 0) -> pd.DataFrame:
    """`against` as a table, one row a model and one column a measure: "31 [22, 41] *" in percent, * where p < 0.05."""
    percent = 100 * table[["value", "low", "high"]]
    cells = [
        f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{' *' * (p < 0.05)}"
        for (value, low, high), p in zip(percent.to_numpy(), table["p"], strict=True)
    ]
    wide = table.assign(cell=cells).pivot(index="model", columns="measure", values="cell")
    return wide.loc[table["model"].unique(), table["measure"].unique()].rename_axis(columns=None).reset_index()


def plot_measures(table: pd.DataFrame, axes, chance: Mapping[str, float]) -> None:
    """One panel a measure: percent against attention layers dropped, plain and refitted, 95 % intervals; the baseline.

    table: as from `against`, models named "Baseline", "Attn-8", "Attn-8 refitted". chance: percent by guessing, where
    a measure has that.
    """
    axes = list(axes)
    for ax in axes[table["measure"].nunique() :]:
        ax.set_axis_off()
    for ax, (measure, rows) in zip(axes, table.groupby("measure", sort=False), strict=False):
        rest = rows[rows["model"] != "Baseline"]
        rest = rest.assign(layers=rest["model"].str.extract(r"-(\d+)")[0].astype(int))
        refitted = rest["model"].str.endswith("refitted")
        lines = {"Dropped": rest[~refitted], "Dropped, refitted": rest[refitted]}
        plot_percent(ax, rows[rows["model"] == "Baseline"].iloc[0], lines, apart=0.6)
        if measure in chance:
            ax.axhline(chance[measure], color="0.5", ls=":", lw=1, label="Guessing")
        ax.set(title=measure, ylim=(-2, 102), xlabel="Dropped layers")


def plot_percent(ax, base: pd.Series, lines: Mapping[str, pd.DataFrame], apart: float, label: str = "Baseline") -> None:
    """Percent against layers, a line a method with 95 % intervals, side by side; the base model's, and its interval.

    base: a row of `against`, lines: rows of it with `layers`, both by name. apart: layers between two methods' markers.
    """
    look = style.METHODS["Baseline"]
    value, low, high = (100 * base[name] for name in ("value", "low", "high"))
    ax.axhline(value, color=look["color"], linestyle=look["linestyle"], lw=0.8, label=label)
    ax.axhspan(low, high, color=look["color"], alpha=0.07, linewidth=0)
    for k, (name, rows) in enumerate(lines.items()):
        x = rows["layers"] + apart * (k - (len(lines) - 1) / 2)
        error = [100 * (rows["value"] - rows["low"]), 100 * (rows["high"] - rows["value"])]
        how = {"fmt": "osv^"[k % 4] + "-", "color": ("#0072B2", "#E69F00", "#009E73", "#CC79A7")[k % 4]}
        ax.errorbar(x, 100 * rows["value"], error, capsize=1.5, ms=3, label=name, **how)
    ax.set_xticks(sorted({n for rows in lines.values() for n in rows["layers"]}))
