"""Last words, instructions and repetition are judged as they say."""

import numpy as np
import pytest

from llmdrop.evaluation import free_text as writing


def test_last_words_stand_in_the_passage():
    prompts, targets = writing.last_words(40)
    assert len(set(prompts)) == 40 and writing.last_words(20) == (prompts[:20], targets[:20])
    for prompt, target in zip(prompts, targets, strict=True):
        assert len(prompt.split()) >= 40 and not prompt.endswith(target) and target[1:] in prompt.lower()
    with pytest.raises(ValueError, match="passages of more than 40 words"):
        writing.last_words(10_000)


@pytest.mark.parametrize(
    "instruction, good, bad",
    [
        ("lowercase", "a plain answer, all small.", "An answer."),
        ("capital", "BE LOUD!", "Be loud!"),
        ("commas", "First this. Then that.", "First this, then that."),
        ("Begin", "Certainly. Take a pan.", "Take a pan."),
        ("one word", " Bacon.\n", "Bacon fat."),
        ("quotation", '"Take a pan."', 'Take a "pan".'),
        ("bullet", "Here:\n* one\n* two", "* one\n* two\n* three"),
        ("End", "Take a pan. I hope this helps.", "I hope this helps. Bye."),
    ],
)
def test_instructions_are_checked(instruction, good, bad):
    (found,) = [text for text in writing.INSTRUCTIONS if instruction in text]
    assert writing.obeys(good, found) and not writing.obeys(bad, found)
    assert not writing.obeys("", found) and not writing.obeys(" ... ", found)


def test_every_instruction_is_asked():
    prompts, chosen = writing.instructions(16)
    assert chosen[:8] == list(writing.INSTRUCTIONS) == chosen[8:]
    assert all(prompt.endswith(f"? {instruction}") for prompt, instruction in zip(prompts, chosen, strict=True))


def test_repetition():
    assert writing.repeated("a b c d e f g") == 0 and writing.distinct("a b c") == 1
    assert writing.repeated("a b c d " * 5) == pytest.approx(1 - 4 / 17)
    assert writing.distinct("a a a a a") == 0.25
    assert writing.repeated("") == 0 and np.isnan(writing.distinct("word"))
