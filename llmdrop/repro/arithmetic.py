"""School arithmetic in written answers: what every variant of a model writes, and what it is worth."""

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..compress.variant import Variant
from ..evaluation.questions import arithmetic_prompt, follows, number, right
from .quality import answers
from .store import Store


def solve(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    variants: Mapping[str, Variant],
    problems: Sequence[tuple[str, float]],
    max_new_tokens: int = 20,
    prompt: str = "shots",
    batch_size: int = 16,
    store: Store | None = None,
) -> pd.DataFrame:
    """Every variant's written answer to every problem (question, answer), stored, and what it is worth.

    prompt: as in `questions.arithmetic_prompt`; after worked examples ("shots") an answer is one line. Returns variant,
    item, question, expected, answer, and, each 0 or 1: right, format (the asked one), unparsable (no number in it).
    """
    prompts = [arithmetic_prompt(question, prompt) for question, _ in problems]
    stop = ["\n"] if prompt == "shots" else []
    rows = answers(model, tokenizer, variants, prompts, "arithmetic", max_new_tokens, stop, batch_size, store)
    rows["question"] = [problems[item][0] for item in rows["item"]]
    rows["expected"] = [problems[item][1] for item in rows["item"]]
    rows["right"] = [int(right(row.answer, row.expected)) for row in rows.itertuples()]
    rows["format"] = rows["answer"].map(follows).astype(int)
    rows["unparsable"] = rows["answer"].map(number).isna().astype(int)
    return rows
