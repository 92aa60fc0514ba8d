"""Questions whose answers can be checked: school arithmetic, labels and facts out of a context.

Prompts come out of packaged data (or a mirror), the same for every model and plan; answers are judged by plain rules,
and what is measured keeps its uncertainty.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from . import style
from .calibration import SOURCES
from .data import read_split
from .generation import answers
from .results import Store

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
FORMAT = rf"[Tt]he (?:final )?answer is:? *[$€£]? *({NUMBER})"
SHOTS = (  # in the format that an answer is to follow; not from ASDiv
    ("There were 15 trees. After some were planted there are 21 trees. How many were planted?", "21 - 15 = 6", 6),
    ("Leah had 32 chocolates and her sister had 42. How many do they have in total?", "32 + 42 = 74", 74),
    ("Jason had 20 lollipops. He gave Denny some. Now he has 12. How many did he give?", "20 - 12 = 8", 8),
    ("If there are 3 cars and 2 more cars arrive, how many cars are there?", "3 + 2 = 5", 5),
)
METAMATH = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{}

### Response: Let's think step by step."""
# kinds of text, each with the source (a key of `llmdrop.calibration.SOURCES`) that has nothing else
KINDS = {"news": "xsum", "law": "multilexsum", "story": "narrativeqa", "code": "stdlib", "math": "asdiv"}
KINDS |= {"history": "quac", "questions": "questions", "dialogue": "dialogue"}
NAMES = """Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nick Olga Paul Quinn Rosa Sam Tina Uma
Victor Wendy Xavier Yara Zoe Albert Bella Carlos Diana Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Oscar
Peter Rachel Simon Teresa Ursula Vera Walter Yvonne Adam Betty Charles Donna Edward Frances Gary Hannah Isaac Jane Kurt
Linda Mark Nancy Owen""".split()
WORDS = """river window garden bottle orange silver doctor camera island pencil forest dragon butter winter guitar
mountain rabbit ticket engine castle mirror planet cotton hammer pepper basket candle monkey bridge letter tiger lemon
rocket pillow desert finger coffee police market kitchen summer flower ladder wallet carpet cheese jacket button tunnel
magnet needle violin saddle turtle walnut anchor ribbon helmet cactus parrot insect copper velvet""".split()


# ---- arithmetic


def arithmetic(
    n: int | None, seed: int = 0, data_dir: str | os.PathLike | None = None, largest: float = 20
) -> list[tuple[str, float]]:
    """(question, answer) of n (None: all) easy problems of ASDiv, in an order shuffled by seed.

    Easy: the text holds two numbers, in digits, neither above `largest`, and the answer is their sum or difference.
    ValueError if there are fewer than n.
    """
    found = []
    for row in read_split("EleutherAI/asdiv", None, "validation", data_dir):
        question = " ".join(f"{row['body']} {row['question']}".split())
        given = [float(value.replace(",", "")) for value in re.findall(rf"(?<![\w.-]){NUMBER}(?!\w)", question)]
        answer = number(row["answer"].split(" (")[0])
        if len(given) == 2 and max(given) <= largest and answer in (sum(given), abs(given[0] - given[1])):
            found.append((question, answer))
    found = list(dict.fromkeys(found))
    n = len(found) if n is None else n
    if not 1 <= n <= len(found):
        raise ValueError(f"n={n}; there are {len(found)} such problems in ASDiv with numbers up to {largest}")
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:n]]


def arithmetic_prompt(question: str, style: str = "shots") -> str:
    """The question after SHOTS, or ("metamath") in the instruction that MetaMath's models were tuned with."""
    if style == "metamath":
        return METAMATH.format(question)
    if style != "shots":
        raise ValueError(f"prompt {style!r}; there are shots and metamath")
    worked = [f"Question: {asked}\nAnswer: {how}. The answer is {answer}.\n\n" for asked, how, answer in SHOTS]
    return f"{''.join(worked)}Question: {question}\nAnswer:"


def solve(
    store: Store, model, tokenizer, plans: Mapping, problems: Sequence[tuple[str, float]], max_new_tokens: int = 20,
    prompt: str = "shots", **how
) -> pd.DataFrame:  # fmt: skip
    """Every plan's written answer to every problem, and what it is worth.

    prompt: as in `arithmetic_prompt`; after worked examples an answer is one line. how: further settings of
    `generation.answers`. Returns plan, item, question, expected, answer, and, each 0 or 1: right, format (the asked
    one), unparsable (no number in it: then it is wrong).
    """
    prompts, stop = [arithmetic_prompt(question, prompt) for question, _ in problems], ["\n"] * (prompt == "shots")
    rows = answers(store, model, tokenizer, plans, prompts, max_new_tokens, stop, name="arithmetic", **how)
    rows["question"], rows["expected"] = zip(*(problems[k] for k in rows["item"]), strict=True)
    rows["right"] = [int(right(*pair)) for pair in zip(rows["answer"], rows["expected"], strict=True)]
    rows["format"] = rows["answer"].map(follows).astype(int)
    return rows.assign(unparsable=rows["answer"].map(number).isna().astype(int))


def gsm8k(data_dir: str | os.PathLike | None = None) -> tuple[str, float]:
    """The first question of GSM8K's test split, that of the paper's Table 10, and its answer."""
    row = read_split("openai/gsm8k", "main", "test", data_dir)[0]
    return row["question"], number(row["answer"])


def number(text: str) -> float | None:
    """The number that an answer gives: the one after "the answer is", or "####", else its last; None without any."""
    found = re.findall(FORMAT, text) or re.findall(rf"#### *[$]? *({NUMBER})", text) or re.findall(NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def right(text: str, answer: float) -> bool:
    """Whether the text gives this number. A text without any number is a wrong answer."""
    given = number(text)
    return given is not None and abs(given - answer) < 1e-6


def follows(text: str) -> bool:
    """Whether the text ends in the asked format: "The answer is N." (or GSM8K's own "#### N")."""
    return re.search(rf"(?:{FORMAT}|#### *[$]? *{NUMBER})[^\d\n]{{0,12}}\s*$", text) is not None


# ---- out of a context


def labelled(
    what: str, n_queries: int, shots: int, words: int = 24, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> tuple[list[list[tuple[str, str]]], list[tuple[str, str]]]:
    """Rounds of examples, each with a (text, label) per label in random order (while it has more), and texts to label.

    what: "banking77" (PolyAI/banking77: customers' questions by intent, 77 labels; in a mirror or on the hub) or
    "kinds" (packaged text by its kind, KINDS; the first `words` words of a document). ValueError for another name.
    """
    random = np.random.default_rng(seed)
    if what == "banking77":
        train, test = (read_split("PolyAI/banking77", None, split, data_dir) for split in ("train", "test"))
        by_label: dict[str, list[str]] = {}
        for row in train:
            by_label.setdefault(row["label"], []).append(row["text"].strip())
        pool = [(row["text"].strip(), row["label"]) for row in test]
    elif what == "kinds":
        by_label, pool = {}, []
        for label, source in KINDS.items():
            dataset, config, split, text, _ = SOURCES[source]
            texts = [" ".join(text(row).split()[:words]) for row in read_split(dataset, config, split, data_dir)]
            texts = list(dict.fromkeys(texts))
            texts = [texts[i] for i in random.permutation(len(texts))]
            by_label[label] = texts[:shots]
            pool += [(one, label) for one in texts[shots : shots + n_queries]]
    else:
        raise ValueError(f"labelled text {what!r}; there are kinds (packaged) and banking77 (a mirror or the hub)")
    for texts in by_label.values():
        random.shuffle(texts)
    labels = sorted(by_label)
    rounds = []
    for k in range(shots):
        order = [labels[i] for i in random.permutation(len(labels))]
        rounds.append([(by_label[label][k], label) for label in order if k < len(by_label[label])])
    return rounds, [pool[i] for i in random.permutation(len(pool))[:n_queries]]


def label_prompts(rounds, queries, shots: int, text: str = "text", label: str = "kind") -> tuple[list[str], list[str]]:
    """(prompts, targets): each query after the first `shots` rounds of examples; the target ends with its line."""
    lines = [f"{text}: {one}\n{label}: {name}\n" for examples in rounds[:shots] for one, name in examples]
    return [f"{''.join(lines)}{text}: {one}\n{label}:" for one, _ in queries], [f" {name}\n" for _, name in queries]


def retrieval(
    tokenizer, n_tokens: int, n_facts: int = 16, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> tuple[list[str], list[str]]:
    """(prompts, targets): facts spread evenly over n_tokens of packaged news, each asked for after the whole text.

    A fact: "The secret word of Anna is river." Guessing among the words that stand in the text is right once in
    n_facts. Prompts have n_tokens tokens or a few less, the question included. ValueError where that is too short.
    """
    random = np.random.default_rng(seed)
    if not 1 <= n_facts <= len(NAMES) or n_tokens < 40 * n_facts // 2 + 40:
        raise ValueError(f"{n_facts=} in {n_tokens=}: at most {len(NAMES)} facts, and at least 20 tokens for each")
    who, what = ([pool[i] for i in random.permutation(len(NAMES))[:n_facts]] for pool in (NAMES, WORDS))
    facts = [f"The secret word of {name} is {word}." for name, word in zip(who, what, strict=True)]
    ask = "\n\nQuestion: What is the secret word of {0}?\nAnswer: The secret word of {0} is"
    questions = [ask.format(name) for name in who]
    lengths = {text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (*facts, *questions)}
    room = n_tokens - sum(lengths[fact] for fact in facts) - max(lengths[q] for q in questions)
    rows = read_split("EdinburghNLP/xsum", None, "test", data_dir)
    sentences: list[str] = []
    for i in random.permutation(len(rows)):
        sentences += [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", rows[i]["document"]) if s.strip()]
        if len(sentences) * 8 > n_tokens:  # enough to choose from: sentences have about 25 tokens
            break
    chosen: list[str] = []
    for sentence in sentences:
        size = len(tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"])
        if size <= room:
            chosen.append(sentence)
            room -= size
    parts: list[str] = []
    for k, part in enumerate(np.array_split(np.array(chosen, dtype=object), n_facts)):
        parts += [facts[k], *part]
    return [" ".join(parts) + question for question in questions], [f" {word}" for word in what]


# ---- how sure


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share right, by Wilson's score."""
    interval = stats.binomtest(int(n_right), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def shares(rows: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Percent right with its 95 % interval, by the columns named: n_right, n, value, low, high.

    rows: one per answer, `right` 0 or 1 (or, of several answers at once, `right` of `n`).
    """
    n = rows["n"] if "n" in rows else 1
    table = rows.assign(n_right=rows["right"], n=n).groupby(list(by), sort=False)[["n_right", "n"]].sum().reset_index()
    table["value"] = 100 * table["n_right"] / table["n"]
    both = [wilson(*pair) for pair in table[["n_right", "n"]].itertuples(index=False)]
    return table.assign(low=[100 * low for low, _ in both], high=[100 * high for _, high in both])


def context_table(rows: pd.DataFrame, chance: Mapping[str, float]) -> pd.DataFrame:
    """Table 12: percent right by examples a label, their mean, and facts found; one row a plan, the last for guessing.

    rows: task ("retrieval" or the name of the labels), plan, item, tokens, right, and for labels shots. chance: percent
    by guessing, by task. Columns: method, "1: 0.3k" (examples a label: tokens) ..., avg with its error over queries,
    found with its error over facts, in the contexts that every plan was given.
    """
    labels, facts = rows[rows["task"] != "retrieval"], rows[rows["task"] == "retrieval"]
    tokens = labels.groupby("shots")["tokens"].first()
    wide = 100 * labels.groupby(["plan", "shots"], sort=False)["right"].mean().unstack()
    wide.columns = [f"{shots:.0f}: {n / 1000:.1f}k" for shots, n in tokens.items()]
    each = 100 * labels.groupby(["plan", "item"], sort=False)["right"].mean().unstack("plan")  # over examples a label
    table = wide.assign(avg=each.mean(), avg_stderr=each.sem())
    everyone = facts.groupby("tokens")["plan"].nunique() == len(table)
    found = shares(facts[facts["tokens"].isin(everyone[everyone].index)], "plan").set_index("plan")
    table["found"], table["found_stderr"] = found["value"], (found["high"] - found["low"]) / 3.92  # never 0 ± 0
    guess = dict.fromkeys([*wide, "avg"], chance[labels["task"].iloc[0]]) | {"found": chance["retrieval"]}
    return pd.concat([table, pd.DataFrame(guess, index=["Guessing"])]).rename_axis("method").reset_index()


def plot_by_length(rows: pd.DataFrame, ax, chance: float, ylabel: str) -> None:
    """Percent right against tokens of context, one line a plan; the more of a kind is dropped, the stronger its colour.

    rows: plan ("Baseline", "Attention-8"), tokens, right. chance: percent right by guessing. Bands, 95 %: of the
    baseline and of the plans that drop most.
    """
    table = shares(rows, "plan", "tokens")
    dropped = table["plan"].str.extract(r"-(\d+)")[0].fillna("0").astype(int)
    for (n, plan), line in table.groupby([dropped, "plan"]):
        look, strength = style.method(plan), 1.0 if n == 0 else 0.3 + 0.7 * n / dropped.max()
        ax.plot(line["tokens"], line["value"], label=plan, alpha=strength, **look)
        if n in (0, dropped.max()):
            ax.fill_between(line["tokens"], line["low"], line["high"], color=look["color"], alpha=0.1, linewidth=0)
    ax.axhline(chance, label="Guessing", **style.METHODS["Random"] | {"marker": ""})
    ticks = sorted(set(rows["tokens"]))
    ax.set(xscale="log", xlabel="Tokens of context", ylabel=ylabel, ylim=(0, 102))
    ax.set_xticks(ticks, [f"{n / 1000:.1f}k" for n in ticks])
    ax.minorticks_off()
