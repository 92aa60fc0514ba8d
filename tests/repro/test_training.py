"""Small Llamas trained here: the same numbers again, also after SIGKILL; published checkpoints: clear errors."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import FileOperations
from tqdm import tqdm

from llmdrop import dropped, plan_drop, save_model, score
from llmdrop.calibration import SOURCES
from llmdrop.repro import paper, training, training_checkpoints, training_claims, training_measures, training_text
from llmdrop.repro.store import Store
from llmdrop.repro.training import Recipe, new_model, pretrain
from llmdrop.repro.training_text import END, load_training_text

RECIPE = Recipe(n_layers=3, width=32, steps=20, batch_size=2, lr=5e-3, n_checkpoints=6)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A mirror whose news are sentences in which every word decides the next, mostly."""
    root = tmp_path_factory.mktemp("mirror")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghij"), 4)) for _ in range(60)]
    follows = {word: random.choice(words, 3) for word in words}
    folder = root / "EdinburghNLP/xsum/default"
    folder.mkdir(parents=True)
    with open(folder / "test.jsonl", "w") as file:
        for i in range(300):
            document = [words[i % 60]]
            while len(document) < 60:
                document.append(random.choice(follows[document[-1]]))
            file.write(json.dumps({"document": f"{i} " + " ".join(document)}) + "\n")
    return root


@pytest.fixture(scope="module")
def small(mirror):
    return load_training_text(["xsum"], 320, 16, 500, 8, mirror)


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    return tmp_path / "build"


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    return pretrain(small, RECIPE, [0], "cpu", Store(tmp_path_factory.mktemp("store")))


def never(*args, **kwargs):
    raise AssertionError("measured again")


# ---- text


def test_text_is_packed_held_out_and_always_the_same(small, mirror):
    again = load_training_text(["xsum"], 320, 16, 500, 8, mirror)
    assert small.digest == again.digest and small.train.shape == (500, 16) and small.valid.input_ids.shape == (8, 16)
    rows = SOURCES["xsum"].documents(mirror)
    windows = torch.cat([small.scored.input_ids, small.valid.input_ids])
    assert len(windows.unique(dim=0)) == 16  # scored on some, measured on others
    held = small.tokenizer.decode(windows.flatten()).split(END)
    used = small.tokenizer.decode(load_training_text(["xsum"], 320, 16, None, 8, mirror).train.ravel()).split(END)
    assert held[0] in SOURCES["xsum"].held_out(mirror) and held[0] not in used  # whole documents, on one side only
    assert len(set(used) & set(rows)) > 0.9 * len(rows)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_baselines_are_interpolated_kneser_ney(vocabulary, seed):
    """Against a count of every n-gram, one after the other, and the recursive formula."""
    random = np.random.default_rng(seed)
    train = random.integers(0, vocabulary, (20, 8))
    valid = random.integers(0, vocabulary, (3, 8))
    orders = range(1, training_text.LONGEST_GRAM + 1)
    occurrences = {
        n: Counter(tuple(row[j : j + n]) for row in train.tolist() for j in range(9 - n)) for n in orders
    }  # of every n-gram in `train`
    counts = {n: Counter(gram[1:] for gram in occurrences[n + 1]) for n in orders[:-1]}
    counts[orders[-1]] = occurrences[orders[-1]]

    def probability(token: int, context: tuple) -> float:
        of_order = counts[len(context) + 1]
        lower = probability(token, context[1:]) if context else 1 / vocabulary
        following = [n for gram, n in of_order.items() if gram[:-1] == context]
        if not following:
            return lower
        once, twice = (sum(n == k for n in of_order.values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        rest = discount * len(following) * lower
        return (max(of_order[(*context, token)] - discount, 0) + rest) / sum(following)

    losses = training_text.count_baselines(train, valid, vocabulary)
    assert (losses["uniform"] == math.log(vocabulary)).all()
    for name, order in (("bigram", 2), ("5-gram", 5)):
        expected = [
            -math.log(probability(row[t], tuple(row[max(0, t - order + 1) : t])))
            for row in valid.tolist()
            for t in range(1, 8)
        ]
        assert losses[name] == pytest.approx(np.reshape(expected, (3, 7)).mean(axis=1))
    unigram = (np.bincount(train.ravel(), minlength=vocabulary) + 1) / (train.size + vocabulary)
    assert losses["unigram"] == pytest.approx(-np.log(unigram[valid[:, 1:]]).mean(axis=1))


def test_every_source_is_held_out_one_after_the_other(tmp_path):
    """As far as it reaches: of two sources a window each, then the longer one's."""
    news = [{"document": f"{i} newsnewsnews"} for i in range(400)]
    sums = [{"body": f"{i} sumssumssums", "question": "", "answer": ""} for i in range(60)]
    for file, rows in (("EdinburghNLP/xsum/default/test", news), ("EleutherAI/asdiv/default/validation", sums)):
        path = tmp_path / f"{file}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    text = load_training_text(["xsum", "asdiv"], 300, 16, 50, 12, tmp_path)
    is_news = ["news" in text.tokenizer.decode(window) for window in (*text.scored.input_ids, *text.valid.input_ids)]
    n_sums = is_news.count(False)
    assert 1 < n_sums < 10 and is_news == [True, False] * n_sums + [True] * (24 - 2 * n_sums)


def test_baselines_are_in_order(small):
    losses = small.baselines
    assert losses["uniform"] > losses["unigram"] + 0.5 > losses["bigram"] + 1 and losses["bigram"] > losses["5-gram"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sources=["xsum", "novels"]), "unknown text novels; these are known: xsum"),
        (dict(sources=[]), "none given"),
        (dict(vocabulary=200), "vocabulary=200.*at least 257"),
        (dict(seq_len=1), "seq_len=1"),
        (dict(n_valid=10_000), r"\d+ documents give .*, and \d+ are held out; need 1 and 20000. Add sources"),
    ],
)
def test_text_errors(mirror, change, message):
    with pytest.raises(ValueError, match=message):
        load_training_text(**dict(sources=["xsum"], vocabulary=300, seq_len=16, n_valid=8, data_dir=mirror) | change)


# ---- training


@given(st.integers(1, 10**6), st.integers(2, 40))
def test_checkpoints_are_log_spaced(steps, n):
    marks = training.checkpoint_steps(steps, n)
    assert marks == sorted(set(marks)) and marks[0] == 0 and marks[-1] == steps and len(marks) <= n
    ratios = np.diff(np.log(marks[1:]))
    assert len(marks) < n or len(ratios) < 2 or ratios.max() / ratios.min() < 6  # rounding, at the first steps


@given(st.integers(1, 10**5), st.integers(0, 30))
def test_late_checkpoints_are_even(steps, n_late):
    marks = training.checkpoint_steps(steps, 2, n_late)
    late = [step for step in marks if 0 < step < steps]
    assert all(step >= steps // 2 for step in late) and len(late) <= n_late
    assert len(np.unique(np.diff([*late, steps]))) <= 3  # but for rounding, and where they coincide


def test_bfloat16_learns_as_well(small, undisturbed):
    """Trained so, measured in float32: nearly the same losses."""
    losses = pretrain(small, replace(RECIPE, bfloat16=True), [0], "cpu").curve["valid_loss"]
    assert losses[0] == pytest.approx(undisturbed.curve["valid_loss"][0], abs=1e-5)
    assert not np.allclose(losses, undisturbed.curve["valid_loss"], atol=1e-5)
    assert np.allclose(losses, undisturbed.curve["valid_loss"], atol=0.02)


def test_a_run_learns_and_begins_where_the_model_was_made(small, undisturbed):
    scores, curve, losses, costs = undisturbed
    assert curve["step"].tolist() == [0, 1, 2, 4, 9, 20] and curve["tokens"].tolist()[-1] == 20 * 2 * 16
    assert scores.groupby(["tokens", "kind"]).size().eq(3).all() and scores["run"].eq("seed 0").all()
    assert curve["valid_loss"].iloc[-1] < curve["valid_loss"].iloc[0] - 0.3
    assert curve["train_loss"].isna().tolist() == [True] + [False] * 5
    model = new_model(small, RECIPE, 0).eval()
    first = score(model, small.scored, progress=False).to_frame()
    assert np.allclose(scores.loc[scores["step"] == 0, "score"], first["score"], atol=1e-6)
    ids = small.valid.input_ids
    assert curve["valid_loss"][0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
    assert curve["valid_stderr"][0] == pytest.approx(before.std().item() / math.sqrt(8), abs=1e-6)
    assert losses.groupby("step").size().eq(8).all()
    assert losses.loc[losses["step"] == 0, "nats"].tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert costs.groupby(["step", "kind", "n", "chosen"]).size().eq(8).all() and set(costs["n"]) == {1}
    last = costs[costs["step"] == 20].pivot(index=["kind", "window"], columns="chosen", values="nats")
    assert last["now"].tolist() == last["at the end"].tolist()


def test_dropping_costs_by_hand(small):
    """Against the model really dropped: the layers that score lowest now, and those that another order names."""
    model = new_model(small, replace(RECIPE, n_layers=4), 3).eval()
    now = score(model, small.scored, progress=False)
    last = replace(now, attn=now.attn[::-1], mlp=now.mlp[::-1], block=now.block[::-1])
    whole = model_losses(model, small.valid.input_ids)
    rows = training_measures.dropping_costs(model, now, last, small.valid)
    assert [(row["kind"], row["n"], row["chosen"]) for row in rows] == [
        (kind, n, chosen) for n in (1, 2) for kind in ("attn", "mlp", "block") for chosen in ("now", "at the end")
    ]
    for row in rows:
        plan = plan_drop(now if row["chosen"] == "now" else last, row["kind"], row["n"])
        with dropped(model, plan):
            more = model_losses(model, small.valid.input_ids) - whole
        assert row["nats"] == pytest.approx(more.tolist(), abs=2e-5)


def model_losses(model, ids) -> torch.Tensor:
    """[n_windows], nats per token."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def test_abilities_of_a_head_that_copies(small, monkeypatch):
    """A head that looks at the token after the earlier occurrence is found, however the model is attended with."""
    model = new_model(small, replace(RECIPE, n_layers=2), 0).eval()
    untrained = training_measures.abilities(model, small.valid)
    assert untrained["repeated_loss"] == pytest.approx(math.log(320), abs=0.5)
    assert 0 < untrained["induction"] < 0.3 and abs(untrained["in_context"]) < 0.5
    attention = model.model.layers[1].self_attn
    half = small.seq_len // 2

    def copying(hidden_states, **kwargs):
        output, weights = type(attention).forward(attention, hidden_states, **kwargs)
        made_up = torch.zeros_like(weights)
        for place in range(half, 2 * half):
            made_up[:, 0, place, place - half + 1] = 0.75  # of the first head alone
        return output, made_up

    monkeypatch.setattr(attention, "forward", copying)
    (head,) = {training_measures._induction(model, torch.arange(1, 9).repeat(1, 2))}
    assert head == pytest.approx(0.75) and model.config._attn_implementation == "sdpa"


def test_one_seed_gives_the_same_scores_whatever_the_threads(small, undisturbed, tmp_path):
    """As different runs do it: two processes at a time, each its own seed, then one process with two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both = pretrain(small, RECIPE, [0, 1], "cpu", Store(tmp_path / "a"))
        alone = pretrain(small, RECIPE, [1], "cpu", Store(tmp_path / "b"))
    finally:
        torch.set_num_threads(threads)
    for i in range(4):
        for run, expected in (("seed 0", undisturbed[i]), ("seed 1", alone[i])):
            found = both[i][both[i]["run"] == run].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-6)
    assert (alone[0]["score"] - undisturbed[0]["score"]).abs().max() > 1e-3


def test_a_finished_run_is_never_made_again(small, undisturbed, build, monkeypatch):
    def finished(**change):
        return pretrain(small, replace(RECIPE, **change), [0], "cpu", Store(build / "store"))

    finished()
    assert not list((build / "pretrain").glob("*"))  # what was needed to continue is gone
    monkeypatch.setattr(training, "train_run", never)
    pd.testing.assert_frame_equal(finished()[0], undisturbed[0])
    for change in (dict(steps=21), dict(lr=4e-3), dict(width=64), dict(n_checkpoints=5), dict(bfloat16=True)):
        with pytest.raises(AssertionError, match="measured again"):
            finished(**change)


def test_sigkill_at_any_point_costs_nothing(small, undisturbed, build):
    """Killed again and again, mostly while it writes its state, the run arrives at the same numbers."""
    store, random, seen = Store(build / "store"), np.random.default_rng(0), []

    def train(last):
        tqdm.set_lock(threading.RLock())  # the shared one would stay taken, were this killed holding it
        torch.set_num_threads(1)
        FileOperations(on="state.pt").last = last
        pretrain(small, RECIPE, [0], "cpu", store, save_every=0)

    def steps_done() -> int:
        file = next((build / "pretrain").glob("*/state.pt"), None)
        return -1 if file is None else training.read_state(file)["step"]

    for _ in range(4):
        child = multiprocessing.get_context("fork").Process(target=train, args=(random.integers(7, 14),))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        seen.append(steps_done())
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < 20  # each went on where the last one was
    found = pretrain(small, RECIPE, [0], "cpu", store)
    for i in range(4):
        pd.testing.assert_frame_equal(found[i], undisturbed[i], rtol=0, atol=0)


def test_what_is_measured_of_a_trained_run_is_kept(small, undisturbed, build, monkeypatch):
    """Stopped at the third checkpoint, it goes on with the third, and trains no step again."""
    costs_of = training_measures.dropping_costs
    asked = []

    def failing(*args):
        asked.append(args)
        return never() if len(asked) == 3 else costs_of(*args)

    monkeypatch.setattr(training_measures, "dropping_costs", failing)
    with pytest.raises(AssertionError):
        pretrain(small, RECIPE, [0], "cpu", Store(build / "store"))
    monkeypatch.setattr(training, "train_step", never)
    found = pretrain(small, RECIPE, [0], "cpu", Store(build / "store"))
    assert len(asked) == 1 + len(training.checkpoint_steps(20, 6))
    for frame, expected in zip(found, undisturbed, strict=True):
        pd.testing.assert_frame_equal(frame, expected, rtol=0, atol=0)


def test_a_killed_notebook_takes_its_training_along():
    fork, (reader, writer) = multiprocessing.get_context("fork"), os.pipe()

    def train():
        training.die_with_parent()
        os.write(writer, b"x")
        time.sleep(60)

    def notebook():
        fork.Process(target=train).start()
        time.sleep(60)

    parent = fork.Process(target=notebook)
    parent.start()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    start = time.monotonic()
    assert os.read(reader, 1) == b""  # nobody is left who could write
    assert time.monotonic() - start < 30


def test_a_damaged_state_is_named(small, build, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training_measures, "abilities", never)  # dies when it is trained
        with pytest.raises(AssertionError):
            pretrain(small, RECIPE, [0], "cpu", save_every=0)
    (file,) = (build / "pretrain").glob("*/state.pt")
    assert len(list(file.parent.glob("step-*.pt"))) == len(training.checkpoint_steps(20, 6))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"state.pt is damaged.*delete it"):
        pretrain(small, RECIPE, [0], "cpu")
    torch.save({"step": Recipe()}, file)  # anything but plain values and tensors is not unpickled
    with pytest.raises(ValueError, match=r"state.pt is damaged.*delete it"):
        pretrain(small, RECIPE, [0], "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seeds=[]), "at least one seed"),
        (dict(seeds=[1, 1]), "all different"),
        (dict(seeds=[-1]), "none negative"),
        (dict(width=40), "width=40.*head size 32"),
        (dict(head_size=0), "head_size=0.*at least one layer"),
        (dict(steps=0), "steps=0"),
        (dict(n_checkpoints=1), "n=1.*two checkpoints"),
        (dict(n_late_checkpoints=-1), "n_late=-1.*no negative"),
        (dict(device="cuda:77"), "device 'cuda:77' is not available"),
        (dict(lr=0), "lr=0"),
    ],
)
def test_impossible_settings(small, change, message):
    recipe = {name: value for name, value in change.items() if name not in ("seeds", "device")}
    run = {"seeds": [0], "device": "cpu"} | {name: value for name, value in change.items() if name not in recipe}
    with pytest.raises(ValueError, match=message):
        pretrain(small, replace(RECIPE, **recipe), **run)


def test_divergence_is_said(small):
    with pytest.raises(FloatingPointError, match="seed 0 diverged before step .*smaller lr than 1e"):
        pretrain(small, replace(RECIPE, lr=1e30), [0], "cpu")


# ---- checkpoints of others


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A directory with three checkpoints of one run, another depth and another tokenizer."""
    root = tmp_path_factory.mktemp("run")
    for i, name in enumerate(("step1", "step2", "step3")):
        save_model(new_model(small, RECIPE, i), small.tokenizer, root / name)
    save_model(new_model(small, replace(RECIPE, n_layers=2), 0), small.tokenizer, root / "shallow")
    tokenizer = small.tokenizer.__class__.from_pretrained(root / "step1")
    tokenizer.add_tokens(["qqq"])
    save_model(new_model(small, RECIPE, 0), tokenizer, root / "stranger")
    return root


@pytest.fixture
def scored(run, mirror, tmp_path):
    def scored(revisions=None, model=run, **change):
        settings = dict(calibration="xsum", n_samples=2, seq_len=16, data_dir=mirror, device="cpu") | change
        revisions = revisions or {"step2": 20, "step1": 10, "step3": 30}
        return training_checkpoints.score_checkpoints(
            str(model), revisions, **settings, store=Store(tmp_path / "store")
        )

    return scored


def test_directories_are_scored_once(scored, run, monkeypatch, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    found = scored(model=copy)
    assert found["tokens"].unique().tolist() == [10, 20, 30] and found["step"].unique().tolist()[0] == "step1"
    assert len(found) == 3 * 3 * 3 and found["score"].notna().all() and found["run"].eq("copy").all()
    monkeypatch.setattr(training_checkpoints, "load_model", never)
    pd.testing.assert_frame_equal(found, scored(model=copy))
    os.utime(copy / "step2/model.safetensors")  # it may have changed
    with pytest.raises(AssertionError, match="measured again"):
        scored(model=copy)


@pytest.mark.parametrize(
    "revisions, message",
    [
        ({"step1": 1}, "at least two"),
        ({"step1": 1, "step2": 1}, "no two alike in tokens"),
        (
            {"step1": 1, "step9": 2, "step8": 3},
            "no checkpoint step9, step8; .*: shallow, step1, step2, step3, stranger",
        ),
        ({"step1": 1, "stranger": 2, "step2": 3}, "the tokenizer of stranger is not that of step2"),
        ({"step1": 1, "shallow": 2}, "differ in depth.*'step1': 3, 'shallow': 2"),
    ],
)
def test_checkpoints_that_do_not_fit(scored, revisions, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        scored(revisions)


class Hub:
    """Stands in for the hub: the revisions of one repository are directories."""

    def __init__(self, root):
        self.root, self.on_disk = root, []

    def list_repo_refs(self, model):
        if model != "lab/model":
            raise OSError("404 Repository Not Found")
        branches = [SimpleNamespace(name=f"step{i}", target_commit=str(i) * 40) for i in (1, 2, 3)]
        return SimpleNamespace(branches=branches, tags=[])

    def list_repo_files(self, model, revision):
        return ["model.safetensors", "pytorch_model.bin"]

    def download(self, model, revision, local_dir, allow_patterns):
        assert "*.bin" not in allow_patterns
        shutil.copytree(self.root / f"step{revision[0]}", local_dir)
        self.on_disk.append(sorted(path.name[0] for path in local_dir.parent.iterdir()))


@pytest.fixture
def hub(run, monkeypatch):
    hub, load = Hub(run), training_checkpoints.AutoTokenizer.from_pretrained
    monkeypatch.setattr(training_checkpoints, "HfApi", lambda: hub)
    monkeypatch.setattr(training_checkpoints, "snapshot_download", hub.download)
    tokenizer = SimpleNamespace(from_pretrained=lambda model, revision: load(run / f"step{revision[0]}"))
    monkeypatch.setattr(training_checkpoints, "AutoTokenizer", tokenizer)
    return hub


def test_one_hub_checkpoint_on_disk_at_a_time(scored, run, request, build):
    expected, hub = scored(), request.getfixturevalue("hub")
    killed = build / "checkpoint/lab--model" / ("9" * 40)
    killed.mkdir(parents=True)  # left by a killed run
    found = scored(model="lab/model", keep=False)
    assert hub.on_disk == [["2"], ["1"], ["3"]] and not list((build / "checkpoint/lab--model").iterdir())
    assert np.allclose(found["score"], expected["score"]) and found["run"].eq("lab/model").all()


def test_a_killed_scoring_run_goes_on(scored, hub, monkeypatch):
    load = training_checkpoints.load_model
    with monkeypatch.context() as patch:
        patch.setattr(
            training_checkpoints, "load_model", lambda where, *a: never() if "3" * 40 in where else load(where, *a)
        )
        with pytest.raises(AssertionError):
            scored(model="lab/model", keep=False)
    scored(model="lab/model", keep=False)
    assert hub.on_disk == [["2"], ["1"], ["3"], ["3"]]


def test_bad_revisions_and_hubs(scored, hub):
    with pytest.raises(ValueError, match="lab/model has no revision step7; it has 3: step1, step2, step3"):
        scored({"step1": 1, "step7": 2}, model="lab/model")
    with pytest.raises(FileNotFoundError, match=r"cannot list the revisions of 'lab/modle'.*404.*directory"):
        scored(model="lab/modle")


# ---- what is said of a run


def made_up(runs=("a", "b"), kinds=("attn",)) -> pd.DataFrame:
    """Module 0 far above; layer i falls by i per tenfold tokens."""
    rows = []
    for run in runs:
        for tokens in (0, 10, 100, 1000):
            for layer in range(9):
                value = 100.0 if layer == 0 else 20 + layer * (1 - math.log10(tokens or 10))
                rows += [dict(run=run, tokens=tokens, kind=kind, layer=layer, score=value) for kind in kinds]
    return pd.DataFrame(rows)


def test_agreement_by_hand():
    scores = made_up()
    scores.loc[scores["tokens"] < 100, "score"] = -scores["score"] + 1e-3 * scores["layer"]
    found = training_claims.agreement(scores, 2).set_index(["run", "tokens"])
    assert len(found) == 8 and found.loc[("a", 1000), ["rank_correlation", "overlap"]].tolist() == [1, 1]
    assert found.loc[("a", 100), ["rank_correlation", "overlap"]].tolist() == [pytest.approx(1), 1]
    assert found.loc[("a", 0), ["rank_correlation", "overlap"]].tolist() == [pytest.approx(-1), 0]


def test_between_runs_by_hand():
    scores = made_up()
    scores.loc[(scores["run"] == "b") & (scores["layer"] > 0), "score"] *= -1
    (found,) = training_claims.between_runs(scores, 3).to_dict("records")
    assert found["rank_correlation"] == pytest.approx(-1) and found["overlap"] == 0
    assert training_claims.between_runs(made_up(runs=["a"]), 3).empty


def trained() -> pd.DataFrame:
    """Three runs over 0, 10, 100, 1000 tokens: attention starts above the MLPs and falls below them at 100."""
    values = {"attn": (8.0, 6.0, 2.0, 1.0), "mlp": (2.0, 3.0, 4.0, 5.0), "block": (9.0, 8.0, 7.0, 7.0)}
    rows = [
        dict(run=run, tokens=tokens, kind=kind, layer=layer, score=100 if layer == 0 else values[kind][i] + layer / 100)
        for run in ("a", "b", "c")
        for i, tokens in enumerate((0, 10, 100, 1000))
        for kind in values
        for layer in range(9)
    ]
    return pd.DataFrame(rows)


def test_consistency_by_hand():
    scores = trained()
    attention = scores["kind"] == "attn"
    scores.loc[(scores["tokens"] == 10) & attention & (scores["layer"] > 0), "score"] *= -1  # the order upside down,
    scores.loc[(scores["tokens"] == 10) & attention, "score"] += 20  # before what counts as late
    found = training_claims.consistency(scores, 2, 100)
    measured = {claim: finding.estimate.value for claim, finding in found.items()}
    assert measured["fig07-attn-low-always"] == pytest.approx(2.045 / 4.045)
    assert measured["fig07-attn-stays-low"] == pytest.approx(2.045 / 7.045)
    assert measured["fig07-attn-low-share"] == 100
    assert measured["fig07-mlp-rises"] == pytest.approx(1) and measured["fig07-block-rises"] == pytest.approx(0)
    assert measured["fig07-module0-apart"] == pytest.approx(100 / 7.07)
    assert measured["fig07-attn-ranking-stable"] == pytest.approx(1)
    assert measured["fig07-order-early"] == 10  # from 100 of 1000 tokens on
    assert measured["fig07-top-n-overlap"] == 100
    assert measured["fig07-seeds-agree"] == pytest.approx(1) and measured["fig07-seeds-as-training"] == pytest.approx(0)
    others = {"fig07-below-5-gram", "fig07-cost-attn-below-mlp", "fig07-cost-final-plan"}  # about losses
    ids = set(paper.claims().query("notebook == 'fig07_checkpoints'")["id"])
    assert set(measured) == ids - others  # every claim of the figure, and no other


def test_what_is_said_of_losses_by_hand(tmp_path):
    windows = pd.DataFrame({"window": range(6), "nats": [3.0, 3.2, 2.8, 3.1, 2.9, 3.0]})
    losses = pd.concat(
        [
            windows.assign(run=run, tokens=t, nats=windows["nats"] + t / 100)
            for run, t in (("a", 0), ("a", 10), ("b", 0), ("b", 10))
        ]
    )
    losses.loc[(losses["run"] == "b") & (losses["tokens"] == 10), "nats"] += 0.5
    found = training_claims.learning(losses, np.array([4.0, 4.2, 3.8, 4.1, 3.9, 4.0]))
    assert found["fig07-below-5-gram"].estimate.value == pytest.approx(4 - 3.6)
    rows = []
    added = {("attn", "now"): 0.1, ("attn", "at the end"): 0.12, ("mlp", "now"): 0.4, ("mlp", "at the end"): 9.0}
    for (kind, chosen), nats in added.items():
        for run in ("a", "b"):
            for tokens in (0, 10, 20):
                more = 0.1 if (run, tokens, kind, chosen) == ("b", 10, "attn", "at the end") else 0
                more += 5 if tokens == 0 else 0  # before what counts as late
                more += 0.2 if (run, tokens, kind, chosen) == ("a", 20, "attn", "now") else 0
                rows += [
                    dict(run=run, tokens=tokens, kind=kind, chosen=chosen, n=2, window=w, nats=nats + more + w / 50)
                    for w in range(6)
                ]
                rows.append(dict(rows[-1], n=4, nats=99.0))
    found |= training_claims.dropping(pd.DataFrame(rows), 2, 10)
    assert found["fig07-cost-attn-below-mlp"].estimate.value == pytest.approx(0.3 - 0.4)
    assert found["fig07-cost-final-plan"].estimate.value == pytest.approx(0.02 + 0.05)
    for claim, finding in found.items():
        paper.record_claim(tmp_path, claim, finding.estimate, finding.detail)
    verdicts = paper.joined_claims(tmp_path).set_index("id")["verdict"]
    assert verdicts[list(found)].tolist() == ["holds", "holds", "differs"]


def test_what_falls_does_not_rise_and_late_disorder_counts(tmp_path):
    scores = trained()
    scores.loc[scores["kind"] == "mlp", "score"] *= -1
    scores.loc[(scores["tokens"] == 100) & (scores["kind"] == "attn") & (scores["layer"] > 0), "score"] *= -1
    found = training_claims.consistency(scores, 2, 100)
    for claim, finding in found.items():
        paper.record_claim(
            tmp_path, claim, finding.estimate, finding.detail
        )  # every interval is what its claim asks for
    verdicts = paper.joined_claims(tmp_path).set_index("id")["verdict"]
    assert (verdicts[["fig07-mlp-rises", "fig07-attn-ranking-stable", "fig07-order-early"]] == "differs").all()
    with pytest.raises(ValueError, match="1 checkpoints from 500 tokens on"):
        training_claims.consistency(scores, 2, 500)


def test_many_runs_speak_for_the_next_one():
    """With five runs the claims are about their mean, over seeds; four have an interval over layers."""
    scores = pd.concat([trained().query("run == 'a'").assign(run=run) for run in "abcde"])
    attention = (scores["kind"] == "attn") & (scores["layer"] > 0)
    for i, run in enumerate("abcde"):
        scores.loc[attention & (scores["run"] == run), "score"] *= 1 + 0.1 * i
    found = training_claims.consistency(scores, 2, 100)["fig07-attn-low-always"].estimate
    highest = 2.045 / 4.045 * np.array([1, 1.1, 1.2, 1.3, 1.4])
    assert found.value == pytest.approx(np.exp(np.log(highest).mean())) and (found.over, found.n) == ("seeds", 5)
    t = 2.776 * np.log(highest).std(ddof=1) / math.sqrt(5)  # Student's, 4 degrees of freedom
    assert np.log(found.high / found.value) == pytest.approx(t, rel=0.15)

    few = training_claims.consistency(scores[scores["run"] != "e"], 2, 100)["fig07-attn-low-always"].estimate
    assert few.value == pytest.approx(highest[3]) and few.over == "layers"


def test_consistency_of_one_run():
    found = training_claims.consistency(trained().query("run == 'a'"), 2, 100)
    alone = {claim for claim, finding in found.items() if finding.estimate is None}
    assert alone == {"fig07-seeds-agree", "fig07-seeds-as-training"}
    assert found["fig07-seeds-agree"].detail.startswith("runs: 1;")
    intervals = [finding.estimate for finding in found.values() if finding.estimate is not None]
    assert all(math.isfinite(estimate.low) for estimate in intervals)


def test_the_search_over_shapes_is_stored_and_written_as_a_table(mirror, tmp_path):
    """benchmarks/training_shapes.py as a program, as docs/profiles.md gives it, with a smaller text and model."""
    text = {"sources": ["xsum"], "vocabulary": 300, "seq_len": 16, "n_valid": 4, "data_dir": str(mirror)}
    profile = {"TEXT": text, "RECIPE": {"steps": 2, "lr": 1e-3}}
    (tmp_path / "small.yaml").write_text(json.dumps({"fig07_checkpoints": profile}))
    script = Path(__file__).parents[2] / "benchmarks" / "training_shapes.py"
    options = ["--shapes", "2x16x8x2", "2x24x8x2", "--minutes", "0.01", "--profile", tmp_path / "small.yaml"]
    command = [sys.executable, script, *options, "--out", tmp_path, "--jobs"]
    environment = os.environ | {"LLMDROP_BUILD": str(tmp_path / "build"), "PYTHONPATH": str(script.parents[1])}
    tables = []
    for jobs in ("2", "1"):
        done = subprocess.run([*command, jobs], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append((tmp_path / "fig07_shapes.csv").read_text())
    assert tables[0] == tables[1] and "measuring" not in done.stdout
    table = pd.read_csv(tmp_path / "fig07_shapes.csv")
    assert sorted(table["width"]) == [16, 24] and table["loss"].is_monotonic_increasing
    assert ((table["loss_low"] < table["loss"]) & (table["tokens"] > 0)).all()
