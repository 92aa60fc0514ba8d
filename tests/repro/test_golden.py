"""Numbers of a tiny fixed model, stored in golden.json: whoever changes them must raise a VERSION.

Results are kept under keys that hold the VERSION of the measuring modules, so a change of numbers that leaves VERSION
as it was would mix old and new results. After raising it, store the new numbers:

    python tests/repro/test_golden.py
"""

import ast
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as tests/conftest.py does, when run as a program

import numpy as np
import pytest
import torch
from tiny import random_ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmdrop
from llmdrop import Calibration, DropPlan
from llmdrop.checkpoints.four_bits import INSTALL as BITSANDBYTES
from llmdrop.compress import reconstruction, search, shortened_llama
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.wanda import WandaMask
from llmdrop.compress.windows import score_windows, windowed
from llmdrop.evaluation.evaluate import ask
from llmdrop.evaluation.generation import generate, greedy_matches
from llmdrop.evaluation.perplexity import text_items
from llmdrop.evaluation.sweep import loglikelihoods
from llmdrop.repro import training
from llmdrop.repro.store import Store
from llmdrop.repro.training_text import TrainingText

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-5  # relative: processors add in different orders
ROUNDING = 1e-6  # absolute: a small difference between two losses has the rounding of the losses
PLANS = [DropPlan(), DropPlan(attn=[1, 3]), DropPlan(attn=[2], mlp=[2, 4])]
# modules whose VERSION stands for a protocol, not for numbers that every machine gives
NO_FIXED_NUMBERS = {
    "llmdrop.speed.measure": "durations",
    "llmdrop.speed.roofline": "speed of this machine's memory and arithmetic",
    "llmdrop.serving.checks": "what an engine that is installed here answers",
    "llmdrop.streaming.score": "a file format; its scores are those of llmdrop.scoring",
    "llmdrop.data.packaged": "rows converted from packages; the keys of results hold digests of texts and tasks",
}


# -- the fixed parts ------------------------------------------------------------------------------------------------


def text(n_samples: int = 4, seq_len: int = 24, seed: int = 0) -> Calibration:
    return Calibration(random_ids(n_samples, seq_len, seed))


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' 97 tokens, one word each."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w0")


def sentence(seed: int, length: int = 6) -> str:
    return " ".join(f"w{i}" for i in random_ids(1, length, seed)[0].tolist())


def sizes(tensor: torch.Tensor) -> list[float]:
    """Norms of the positive and the negative numbers in each quarter: no sums that cancel, so that they are stable."""
    norms = []
    for part in tensor.detach().double().flatten().chunk(4):
        norms += [part.clamp(min=0).norm().item(), part.clamp(max=0).norm().item()]
    return norms


def logits(model: torch.nn.Module) -> list[float]:
    with torch.inference_mode():
        return sizes(model(text().input_ids).logits)


# -- what is measured, by module ------------------------------------------------------------------------------------


def of_scoring() -> dict:
    calibration = text()
    scores = llmdrop.score(tiny("llama"), calibration, batch_size=3, gap=True, progress=False)
    without_residual = llmdrop.score(tiny("gpt_neox"), calibration, with_residual=False, progress=False)
    return {"llama": json.loads(scores.to_json()), "gpt_neox": json.loads(without_residual.to_json())}


def of_sweep() -> dict:
    sums, greedy = loglikelihoods(tiny("llama"), PLANS, text_items(text()), progress=False)
    return {"sums": sums.tolist(), "greedy": greedy.tolist()}


def of_evaluate() -> list:
    questions = [
        {"goal": sentence(k), "sol1": sentence(k + 100), "sol2": sentence(k + 200, 4), "label": k % 2} for k in range(4)
    ]
    with tempfile.TemporaryDirectory() as mirror:
        file = Path(mirror, "baber/piqa/default/validation.jsonl")
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        return ask(tiny("llama"), words(), PLANS, "piqa", limit=3, data_dir=mirror, progress=False)


def of_generation() -> dict:
    model = tiny("llama")
    prompts = [sentence(k, 3 + k) for k in range(4)]
    written = generate(model, words(), prompts, max_new_tokens=5)
    targets = [" " + " ".join(answer.split()[:2]) for answer in written]
    return {
        "written": written,
        "matches": greedy_matches(model, words(), PLANS, prompts, targets, progress=False),
    }


def of_reconstruction() -> dict:
    model = tiny("llama")
    calibration = text(8, 32)
    numbers = {}
    for method in reconstruction.METHODS:
        changes = reconstruction.fit(model, PLANS[2], calibration, method)
        numbers[method] = {
            f"{kind} {i}": sizes(change.weight if change.weight is not None else change.bias)
            for (kind, i), change in changes.items()
        }
    return numbers


def of_search() -> dict:
    model = tiny("llama")
    calibration = text()
    choices = {
        "taylor": search.taylor(model, calibration, "joint"),
        "one-shot": search.one_shot(model, calibration, "attn", "perplexity"),
        "greedy": search.greedy(model, calibration, "joint", 4, every=2),
        "latency-aware": search.greedy(model, calibration, "joint", 4, seconds={"attn": 2.0, "mlp": 1.0}),
    }
    return {
        name: {"order": choice.order, "tokens": choice.tokens, "losses": choice.losses}
        for name, choice in choices.items()
    }


def of_windows() -> dict:
    model = tiny("llama", "sdpa")
    with windowed(model, [1, 2], window=8, sinks=2):
        narrow = logits(model)
    return {"scores": score_windows(model, text(), window=8, sinks=2), "logits": narrow}


def of_wanda() -> list[float]:
    model = tiny("llama")
    with WandaMask(0.25, text()).applied(model):
        return logits(model)


def of_shortened_llama() -> list[float]:
    return shortened_llama.block_taylor(tiny("llama"), text()).tolist()


def of_healing() -> dict:
    pytest.importorskip("peft")
    from llmdrop.compress.healing import heal

    healed, losses = heal(tiny("llama"), PLANS[1], text(8), batch_size=2, progress=False)
    return {"losses": losses, "logits": logits(healed)}


def of_four_bits() -> dict:
    pytest.importorskip("bitsandbytes", reason=BITSANDBYTES)
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    numbers = {}
    for algorithm in ("nf4", "fp4"):
        with FourBits(algorithm, group_size=64).applied(model):
            numbers[algorithm] = logits(model)
    return numbers


def of_training() -> dict:
    train = random_ids(12, 16, seed=1).int().numpy()
    fixed = TrainingText(words(), train, text(4, 16), text(4, 16), baselines={}, count_losses=np.zeros(4))
    recipe = training.Recipe(n_layers=2, width=32, steps=6, batch_size=2, n_checkpoints=3)
    with tempfile.TemporaryDirectory() as root:
        trained = training.pretrain(fixed, recipe, [0], "cpu", Store(root))
    return {
        "scores": trained.scores["score"].tolist(),
        "losses": trained.losses["nats"].tolist(),
        "costs": trained.costs["nats"].tolist(),
        "abilities": trained.curve[["in_context", "repeated_loss", "induction"]].to_numpy().tolist(),
    }


MEASURED: dict[str, Callable] = {
    "llmdrop.scoring": of_scoring,
    "llmdrop.evaluation.sweep": of_sweep,
    "llmdrop.evaluation.evaluate": of_evaluate,
    "llmdrop.evaluation.generation": of_generation,
    "llmdrop.compress.reconstruction": of_reconstruction,
    "llmdrop.compress.search": of_search,
    "llmdrop.compress.windows": of_windows,
    "llmdrop.compress.wanda": of_wanda,
    "llmdrop.compress.shortened_llama": of_shortened_llama,
    "llmdrop.compress.healing": of_healing,
    "llmdrop.compress.four_bits": of_four_bits,
    "llmdrop.repro.training": of_training,
}


# -- stored and measured --------------------------------------------------------------------------------------------


def measure(module: str) -> dict:
    """Its VERSION and its numbers now, as plain JSON."""
    numbers = json.loads(json.dumps(MEASURED[module]()))
    return {"version": importlib.import_module(module).VERSION, "numbers": numbers}


def difference(stored, measured, path: str = "") -> str | None:
    """Where the two first differ by more than TOLERANCE and ROUNDING, in words; None where they do not."""
    if isinstance(stored, dict) and isinstance(measured, dict) and list(stored) == list(measured):
        pairs = [(f"{path}.{name}", stored[name], measured[name]) for name in stored]
    elif isinstance(stored, list) and isinstance(measured, list) and len(stored) == len(measured):
        pairs = [(f"{path}[{k}]", stored[k], measured[k]) for k in range(len(stored))]
    elif isinstance(stored, float) and isinstance(measured, float):
        close = math.isclose(stored, measured, rel_tol=TOLERANCE, abs_tol=ROUNDING)
        both_nan = math.isnan(stored) and math.isnan(measured)
        return None if close or both_nan else f"{path or 'the number'} was {stored!r} and is {measured!r}"
    else:
        return None if stored == measured else f"{path or 'it'} was {stored!r} and is {measured!r}"
    for name, before, now in pairs:
        found = difference(before, now, name)
        if found is not None:
            return found
    return None


def complaint(module: str, stored: dict | None, measured: dict) -> str | None:
    """What is wrong with a module's stored numbers, and how to put it right; None where nothing is."""
    store = "run `python tests/repro/test_golden.py` to store the new numbers"
    if stored is None:
        return f"no numbers of {module} are stored; {store}"
    if measured["version"] != stored["version"]:
        return f"VERSION of {module} went from {stored['version']} to {measured['version']}; {store}"
    changed = difference(stored["numbers"], measured["numbers"])
    if changed is not None:
        return f"the numbers of {module} have changed ({changed}): raise VERSION in {module} and {store}"
    return None


def read_golden() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def store_golden() -> None:
    """Store what has a new VERSION or is new. Exits where numbers changed under the same VERSION."""
    golden = read_golden()
    for module in MEASURED:
        measured = measure(module)
        stored = golden.get(module)
        problem = complaint(module, stored, measured)
        if stored is not None and stored["version"] == measured["version"] and problem is not None:
            sys.exit(problem)
        if problem is not None:
            print(f"{module}: stored, VERSION {measured['version']}")
            golden[module] = measured
    GOLDEN.write_text(json.dumps({module: golden[module] for module in MEASURED}, indent=1) + "\n")


# -- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))


@pytest.mark.parametrize("module", MEASURED)
def test_numbers_are_the_stored_ones(module):
    problem = complaint(module, read_golden().get(module), measure(module))
    assert problem is None, problem


def test_every_version_is_watched():
    package = Path(llmdrop.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        assigned = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
        if any(ast.unparse(target) == "VERSION" for node in assigned for target in node.targets):
            found.add(".".join(file.relative_to(package.parent).with_suffix("").parts))
    assert found == set(MEASURED) | set(NO_FIXED_NUMBERS)
    assert set(read_golden()) == set(MEASURED)


def test_changed_numbers_are_noticed(monkeypatch):
    """A measuring function that gives a little else, by a factor just above the tolerance."""
    module = "llmdrop.evaluation.sweep"
    stored = read_golden()[module]
    right = loglikelihoods

    def slightly_different(*args, **kwargs):
        sums, greedy = right(*args, **kwargs)
        return sums * (1 + 2 * TOLERANCE), greedy

    monkeypatch.setattr(sys.modules[__name__], "loglikelihoods", slightly_different)
    problem = complaint(module, stored, measure(module))
    assert problem.startswith(f"the numbers of {module} have changed (.sums[0][0] was ")
    assert f"raise VERSION in {module} and run `python tests/repro/test_golden.py`" in problem


def test_a_raised_version_asks_for_the_new_numbers(monkeypatch):
    module = "llmdrop.evaluation.sweep"
    monkeypatch.setattr(importlib.import_module(module), "VERSION", 99)
    problem = complaint(module, read_golden()[module], measure(module))
    assert problem.startswith(f"VERSION of {module} went from 1 to 99; run `python tests/repro/test_golden.py`")


def test_storing_refuses_what_has_no_new_version(tmp_path, monkeypatch):
    module = "llmdrop.evaluation.sweep"
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "GOLDEN", tmp_path / "golden.json")
    monkeypatch.setattr(here, "MEASURED", {module: of_sweep})
    store_golden()
    stored = read_golden()
    assert complaint(module, stored[module], measure(module)) is None
    monkeypatch.setattr(here, "MEASURED", {module: lambda: {"sums": [1.0]}})
    with pytest.raises(SystemExit, match=f"raise VERSION in {module}"):
        store_golden()
    assert read_golden() == stored
    monkeypatch.setattr(importlib.import_module(module), "VERSION", 99)
    store_golden()
    assert read_golden() == {module: {"version": 99, "numbers": {"sums": [1.0]}}}


@pytest.mark.parametrize(
    "stored, measured, same",
    [
        (1.0, 1.0 + 0.5 * TOLERANCE, True),
        (1.0, 1.0 + 2 * TOLERANCE, False),
        (4e-4, 4e-4 + 0.5 * ROUNDING, True),
        (4e-4, 4e-4 + 2 * ROUNDING, False),
        ({"a": [1.0, "x"]}, {"a": [1.0, "x"]}, True),
        ({"a": [1.0, "x"]}, {"a": [1.0, "y"]}, False),
        ([1.0], [1.0, 2.0], False),
        ({"a": 1}, {"b": 1}, False),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (None, 0.0, False),
    ],
)
def test_difference(stored, measured, same):
    assert (difference(stored, measured) is None) is same


if __name__ == "__main__":
    store_golden()
