"""What multiple choice does not see: last words of stories, instructions that can be checked, text that repeats itself.

Everything is judged by plain rules, prompt by prompt, so that models can be compared on the same prompts.
"""

import os
import re
from collections.abc import Callable
from itertools import chain, cycle, islice
from math import isnan, nan

import numpy as np

from ..data.mirror import read_split
from ..data.texts import SOURCES
from .questions import draw, sentences

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
    plots = SOURCES["narrativeqa"].documents(data_dir)
    prompts = []
    targets = []
    for plot in draw(plots, np.random.default_rng(seed)):
        passage: list[list[str]] = []  # words, sentence by sentence
        for sentence in sentences(plot):
            passage.append(sentence.split())
            while sum(map(len, passage[1:])) > words:
                del passage[0]
            *before, last = chain.from_iterable(passage)
            last = last.rstrip(".!?")
            known = {word.strip(".,;:!?\"'()").lower() for word in before}
            if len(before) >= words and len(last) > 3 and last.isalpha() and last.islower() and last in known:
                prompts.append(" ".join(before))
                targets.append(f" {last}")
    if not 1 <= n <= len(prompts):
        raise ValueError(f"n={n}; there are {len(prompts)} passages of more than {words} words with such a last word")
    return prompts[:n], targets[:n]


def instructions(n: int, seed: int = 0, data_dir: str | os.PathLike | None = None) -> tuple[list[str], list[str]]:
    """(questions with an instruction each, instructions): questions of PIQA, INSTRUCTIONS in turn."""
    rows = read_split("baber/piqa", None, "validation", data_dir)
    goals = dict.fromkeys(row["goal"].strip() for row in rows if row["goal"].strip().endswith("?"))
    asked = draw(list(goals), np.random.default_rng(seed), n, "questions in PIQA")
    chosen = list(islice(cycle(INSTRUCTIONS), n))
    return [f"{goal} {instruction}" for goal, instruction in zip(asked, chosen, strict=True)], chosen


def obeys(text: str, instruction: str) -> bool:
    """Whether an answer does what its instruction asks; an answer without a word does nothing."""
    return bool(re.search(r"\w", text)) and INSTRUCTIONS[instruction](text.strip())


def openings(n: int, words: int = 25, seed: int = 0, data_dir: str | os.PathLike | None = None) -> list[str]:
    """The first words of n news articles, to go on from. ValueError if there are fewer."""
    articles = [row["document"].split() for row in read_split("EdinburghNLP/xsum", None, "test", data_dir)]
    texts = [" ".join(article[:words]) for article in articles if len(article) > 2 * words]
    return draw(texts, np.random.default_rng(seed), n, f"articles of more than {2 * words} words")


def distinct(text: str, n: int = 2) -> float:
    """Distinct n-grams of words in a text, as a share of all; NaN for a text of fewer words than n."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else nan


def repeated(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that stood in the text before; 0 for a text of fewer words than n."""
    share = distinct(text, n)
    return 0.0 if isnan(share) else 1 - share
