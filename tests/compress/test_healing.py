"""Training after the drop lowers the loss, merges exactly, is kept once it is done, and says what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, apply_plan, find_anatomy, weights_digest
from llmdrop.compress.healing import Healing, heal
from llmdrop.compress.reconstruction import Change, fit, reconstruct

PLAN = DropPlan(attn=[1, 3], mlp=[2])
TEXT = Calibration(random_ids(24, 16))


def logits(model):
    with torch.no_grad():
        return model(TEXT.input_ids[:4], use_cache=False).logits


def distance(model, other) -> float:
    mine, theirs = (logits(each).log_softmax(-1) for each in (model, other))
    return float((mine.exp() * (mine - theirs)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_recovers_and_keeps_the_shapes(family):
    pytest.importorskip("peft")
    model, plain = tiny(family), apply_plan(tiny(family), PLAN)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    healed, losses = heal(model, PLAN, TEXT, learning_rate=1e-2, progress=False)
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert distance(model, healed) < 0.9 * distance(model, plain)
    assert {k: v.shape for k, v in healed.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the model is unchanged"
    assert not any("lora" in name for name, _ in healed.named_modules())


def test_the_adapter_is_kept_and_merges_exactly(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model, folder = tiny("llama"), tmp_path / "healed" / "one"
    changes = fit(model, PLAN, TEXT)
    healed, losses = heal(model, PLAN, TEXT, changes, learning_rate=1e-2, folder=folder, progress=False)
    adapted = peft.PeftModel.from_pretrained(reconstruct(tiny("llama"), PLAN, changes), folder)
    torch.testing.assert_close(logits(adapted), logits(healed), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("llmdrop.compress.healing._train", None)  # must not be called again
    again, kept = heal(model, PLAN, TEXT, changes, learning_rate=1e-2, folder=folder, progress=False)
    assert kept == losses and torch.equal(logits(again), logits(healed))
    with pytest.raises(ValueError, match="another training .rank differ"):
        heal(model, PLAN, TEXT, changes, learning_rate=1e-2, rank=4, folder=folder, progress=False)


def test_it_trains_on_the_models_device_whatever_accelerate_was_used_for_before(monkeypatch):
    """accelerate has one device for the whole process: that of its first use, which may be another."""
    pytest.importorskip("peft")
    losses = heal(tiny("llama"), PLAN, TEXT, progress=False)[1]
    monkeypatch.setattr("accelerate.Accelerator", None)  # must not be asked
    assert heal(tiny("llama"), PLAN, TEXT, progress=False)[1] == losses


def test_two_processes_share_the_samples(tmp_path):
    pytest.importorskip("peft")
    script = tmp_path / "heal.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])}
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | hidden)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["losses"] == second["losses"] and len(first["losses"]) == 6  # of twelve batches
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())


SHARED = """
import os, sys, torch
from tiny import random_ids, tiny
from llmdrop import Calibration, DropPlan
from llmdrop.compress.healing import heal

plan = DropPlan(attn=[1, 3], mlp=[2])
healed, losses = heal(tiny("llama"), plan, Calibration(random_ids(24, 16)), progress=False)
torch.save({"losses": losses, "state": healed.state_dict()}, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    folder = tmp_path / "one"

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmdrop.compress.healing._loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            heal(tiny("llama"), PLAN, TEXT, folder=folder, progress=False)
    assert not folder.exists()
    heal(tiny("llama"), PLAN, Calibration(TEXT.input_ids[:2]), folder=folder, progress=False)
    assert json.loads((folder / "healing.json").read_text())["settings"]["rank"] == 8


@pytest.mark.parametrize("side", [(0, 6), (6, 0)], ids=["right", "left"])
@pytest.mark.parametrize("loss", ["kl", "perplexity"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's positions are absolute
def test_losses_ignore_padding(family, loss, side):
    pytest.importorskip("peft")
    mask = torch.nn.functional.pad(torch.ones_like(TEXT.input_ids), side)
    ids = torch.nn.functional.pad(TEXT.input_ids, side, value=5)
    found = [
        heal(tiny(family), PLAN, text, loss=loss, progress=False)[1]
        for text in (TEXT, Calibration(ids, attention_mask=mask))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_healed_model_for_a_while_is_trained_once(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path))
    model, healing = tiny("llama"), Healing(TEXT, learning_rate=1e-2)
    changes = fit(model, PLAN, TEXT)
    dense, digest = logits(model), weights_digest(model)
    healed, losses = heal(model, PLAN, TEXT, changes, learning_rate=1e-2, progress=False)
    with healing.applied(model, PLAN, changes):
        torch.testing.assert_close(logits(model), logits(healed))
        assert find_anatomy(model).plan == PLAN
    assert torch.equal(logits(model), dense) and weights_digest(model) == digest
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "healed").iterdir()] == ["llama-Joint-3"]
    with monkeypatch.context() as patch:
        patch.setattr("llmdrop.compress.healing._train", None)  # must not be called again
        assert healing.losses(model, PLAN, changes) == losses
        with Healing(TEXT, learning_rate=1e-2).applied(model, PLAN, changes):
            torch.testing.assert_close(logits(model), logits(healed))
    for other in (changes | {("mlp", 0): Change(changes["mlp", 0].weight + 1)}, {}):  # another start, another adapter
        assert healing.losses(model, PLAN, other) != losses
    assert len(list((tmp_path / "healed").iterdir())) == 3
    assert healing.label == "healed, rank 8" and healing.key["text"] == TEXT.digest and healing.key["rank"] == 8
    json.dumps(healing.key)


def test_errors(monkeypatch):
    with pytest.raises((ValueError, ImportError), match="not one of kl, perplexity|pip install"):
        heal(tiny("llama"), PLAN, TEXT, loss="mse")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'llmdrop\[healing\]'"):
        heal(tiny("llama"), PLAN, TEXT)
