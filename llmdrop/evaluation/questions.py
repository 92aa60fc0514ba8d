"""Questions whose answers can be checked: school arithmetic, labels and facts out of a context.

Prompts come out of packaged data (or a mirror), the same for every model and plan; answers are judged by plain rules.
"""

import os
import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.mirror import read_split
from ..data.texts import SOURCES

Examples = list[tuple[str, str]]  # (text, label)

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
KINDS = {
    "news": "xsum",
    "law": "multilexsum",
    "story": "narrativeqa",
    "code": "stdlib",
    "math": "asdiv",
    "history": "quac",
    "questions": "questions",
    "dialogue": "dialogue",
}

# who has a secret word, and the words: as many of each
NAMES = """Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nick Olga Paul Quinn Rosa Sam Tina Uma
Victor Wendy Xavier Yara Zoe Albert Bella Carlos Diana Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Oscar
Peter Rachel Simon Teresa Ursula Vera Walter Yvonne Adam Betty Charles Donna Edward Frances Gary Hannah Isaac Jane Kurt
Linda Mark Nancy Owen""".split()
WORDS = """river window garden bottle orange silver doctor camera island pencil forest dragon butter winter guitar
mountain rabbit ticket engine castle mirror planet cotton hammer pepper basket candle monkey bridge letter tiger lemon
rocket pillow desert finger coffee police market kitchen summer flower ladder wallet carpet cheese jacket button tunnel
magnet needle violin saddle turtle walnut anchor ribbon helmet cactus parrot insect copper velvet spider""".split()


def draw(values: Sequence, random: np.random.Generator, n: int | None = None, what: str = "values") -> list:
    """n of the values (None: all) in random order. ValueError if there are fewer; `what` they are, for people."""
    n = len(values) if n is None else n
    if not 1 <= n <= len(values):
        raise ValueError(f"n={n}; there are {len(values)} {what}")
    return [values[i] for i in random.permutation(len(values))[:n]]


def sentences(text: str) -> list[str]:
    """The sentences of a text, with single spaces between words."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if sentence]


def arithmetic(
    n: int | None, seed: int = 0, data_dir: str | os.PathLike | None = None, largest: float = 20
) -> list[tuple[str, float]]:
    """(question, answer) of n (None: all) easy problems of ASDiv, in an order shuffled by seed.

    Easy: the text holds two numbers, in digits, neither above `largest`, and the answer is their sum or difference.
    ValueError if there are fewer than n.
    """
    found: dict[tuple[str, float], None] = {}  # a set in order
    for row in read_split("EleutherAI/asdiv", None, "validation", data_dir):
        question = " ".join(f"{row['body']} {row['question']}".split())
        given = [float(value.replace(",", "")) for value in re.findall(rf"(?<![\w.-]){NUMBER}(?!\w)", question)]
        answer = number(row["answer"].split(" (")[0])
        if len(given) == 2 and max(given) <= largest and answer in (sum(given), abs(given[0] - given[1])):
            found[question, answer] = None
    what = f"such problems in ASDiv with numbers up to {largest}"
    return draw(list(found), np.random.default_rng(seed), n, what)


def arithmetic_prompt(question: str, style: str = "shots") -> str:
    """The question after SHOTS, or ("metamath") in the instruction that MetaMath's models were tuned with."""
    if style == "metamath":
        return METAMATH.format(question)
    if style != "shots":
        raise ValueError(f"prompt {style!r}; there are shots and metamath")
    worked = [f"Question: {asked}\nAnswer: {how}. The answer is {answer}.\n\n" for asked, how, answer in SHOTS]
    return f"{''.join(worked)}Question: {question}\nAnswer:"


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


def labeled(
    what: str, n_queries: int, shots: int, words: int = 24, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> tuple[list[Examples], Examples]:
    """Rounds of examples, each with a (text, label) per label in random order (while it has more), and texts to label.

    what: "banking77" (PolyAI/banking77: customers' questions by intent, 77 labels; in a mirror or on the hub) or
    "kinds" (packaged text by its kind, KINDS; the first `words` words of a document). ValueError for another name.
    """
    random = np.random.default_rng(seed)
    by_label: dict[str, list[str]] = {}
    pool: Examples = []
    if what == "banking77":
        for row in read_split("PolyAI/banking77", None, "train", data_dir):
            by_label.setdefault(row["label"], []).append(row["text"].strip())
        queries = read_split("PolyAI/banking77", None, "test", data_dir)
        pool = [(row["text"].strip(), row["label"]) for row in queries]
    elif what == "kinds":
        for label, source in KINDS.items():
            beginnings = [" ".join(text.split()[:words]) for text in SOURCES[source].documents(data_dir)]
            texts = draw(list(dict.fromkeys(beginnings)), random)
            by_label[label] = texts[:shots]
            pool += [(text, label) for text in texts[shots : shots + n_queries]]
    else:
        raise ValueError(f"labeled text {what!r}; there are kinds (packaged) and banking77 (a mirror or the hub)")
    for texts in by_label.values():
        random.shuffle(texts)
    labels = sorted(by_label)
    rounds = []
    for k in range(shots):
        order = draw(labels, random)
        rounds.append([(by_label[label][k], label) for label in order if k < len(by_label[label])])
    return rounds, draw(pool, random)[:n_queries]


def label_prompts(
    rounds: list[Examples], queries: Examples, shots: int, text: str = "text", label: str = "kind"
) -> tuple[list[str], list[str]]:
    """(prompts, targets): each query after the first `shots` rounds of examples; the target ends with its line."""
    lines = [f"{text}: {example}\n{label}: {name}\n" for examples in rounds[:shots] for example, name in examples]
    prompts = [f"{''.join(lines)}{text}: {query}\n{label}:" for query, _ in queries]
    return prompts, [f" {name}\n" for _, name in queries]


def retrieval(
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    n_facts: int = 16,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> tuple[list[str], list[str]]:
    """(prompts, targets): facts spread evenly over n_tokens of packaged news, each asked for after the whole text.

    A fact: "The secret word of Anna is river." Guessing among the words that stand in the text is right once in
    n_facts. Prompts have n_tokens tokens or a few less, the question included. ValueError where that is too short.
    """
    if not 1 <= n_facts <= len(NAMES) or n_tokens < 20 * n_facts + 40:
        raise ValueError(f"{n_facts=} in {n_tokens=}: at most {len(NAMES)} facts, and at least 20 tokens for each")
    random = np.random.default_rng(seed)
    names = draw(NAMES, random, n_facts)
    words = draw(WORDS, random, n_facts)
    facts = [f"The secret word of {name} is {word}." for name, word in zip(names, words, strict=True)]
    questions = [
        f"\n\nQuestion: What is the secret word of {name}?\nAnswer: The secret word of {name} is" for name in names
    ]

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    room = n_tokens - sum(map(size, facts)) - max(map(size, questions))
    chosen: list[str] = []
    n_seen = 0
    for row in draw(read_split("EdinburghNLP/xsum", None, "test", data_dir), random):
        for sentence in sentences(row["document"]):
            n = size(f" {sentence}")
            if n <= room:
                chosen.append(sentence)
                room -= n
            n_seen += 1
        if n_seen * 8 > n_tokens:  # enough to choose from: sentences have about 25 tokens
            break
    parts: list[str] = []
    for fact, sentences_after in zip(facts, np.array_split(np.array(chosen, dtype=object), n_facts), strict=True):
        parts += [fact, *sentences_after]
    return [" ".join(parts) + question for question in questions], [f" {word}" for word in words]
