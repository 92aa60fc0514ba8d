"""The store: measured once, never stale, never half-written; whatever dies, fills up or runs at the same time."""

import errno
import json
import math
import multiprocessing
import os
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, random_ids, tiny

import llmdrop
from llmdrop import scoring
from llmdrop.calibration import Calibration
from llmdrop.repro.provenance import model_key, provenance, speed_key, tokenizer_digest
from llmdrop.repro.store import Entry, Store
from llmdrop.scoring import score

fork = multiprocessing.get_context("fork")
in_one_directory = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
scalars = (
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
nested = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))
keys = st.dictionaries(st.text(max_size=5), nested, min_size=1, max_size=5)


def never():
    raise AssertionError("measured again")


def files(store: Store) -> list[Path]:
    return sorted(store.root.rglob("*.json"))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


# ---- keys and values


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@in_one_directory
@given(keys, scalars)
def test_measured_once_whatever_the_order_of_the_key(store, key, value):
    measured = store.get("any", key, lambda: {"b": value, "a": (1, 2.5)})
    assert measured == store.get("any", reordered(key), never) == Store(store.root).get("any", key, never, slug="other")
    assert list(measured) == ["b", "a"] and measured["a"] == [1, 2.5]


@in_one_directory
@given(keys, st.data())
def test_a_changed_setting_is_another_measurement(tmp_path_factory, key, data):
    store = Store(tmp_path_factory.mktemp("results"))  # examples may share keys
    name = data.draw(st.sampled_from(sorted(key)))
    other = key | {name: data.draw(scalars)}
    assume(json.dumps(other, sort_keys=True) != json.dumps(key, sort_keys=True))
    assert store.get("any", key, lambda: [1, key]) != store.get("any", other, lambda: [2, other])
    assert store.get("any", key, never) == [1, key]


def test_file_says_what_and_how_and_its_name_is_readable(store, capsys):
    store.get("score", {"a": 1}, lambda: 1.5, slug="smollm2 135m/xsum")
    (file,) = files(store)
    record = json.loads(file.read_text())
    assert file.parent == store.root / "score" and file.name.startswith("smollm2-135m-xsum-")
    assert len(file.stem.rpartition("-")[2]) == 16
    assert (record["key"], record["value"]) == ({"a": 1}, 1.5) and {"provenance", "created"} <= set(record)
    assert capsys.readouterr().out.startswith("measuring score: smollm2 135m/xsum ... 0.0 s\n")
    store.get("score", {"a": 1}, never)
    assert capsys.readouterr().out == ""


def test_not_finite_values_come_back(store):
    for _ in range(2):
        assert math.isnan(store.get("any", {"a": 1}, lambda: [math.nan, math.inf])[0])


@pytest.mark.parametrize("key", [{"a": {1, 2}}, {"a": torch.ones(1)}, {"a": math.nan}, {1: 0, "b": 1}])
def test_keys_that_are_not_json_are_refused(store, key):
    with pytest.raises(TypeError, match="the key of a measurement must be plain JSON"):
        store.get("any", key, never)


def test_values_that_are_not_json_are_refused(store):
    with pytest.raises(TypeError, match="the value of a measurement must be plain JSON"):
        store.get("any", {"a": 1}, lambda: torch.ones(1))
    assert not files(store) and store.get("any", {"a": 1}, lambda: 2) == 2
    with pytest.raises(ValueError, match="names a folder"):
        store.get("../any", {}, never)


def test_only_the_missing_of_many_are_computed(store, capsys):
    store.get("any", {"i": 1}, lambda: "known")
    asked = []

    def compute(missing):
        asked.extend(missing)
        return [f"new {i}" for i in missing]

    entries = [Entry({"i": i}, f"s{i}") for i in (0, 1, 2, 0)]
    capsys.readouterr()
    assert store.get_many("any", entries, compute) == ["new 0", "known", "new 2", "new 0"]
    assert asked == [0, 2] and capsys.readouterr().out.startswith("measuring any: s0, s2 ...")
    with pytest.raises(ValueError):  # a compute that yields too few
        store.get_many("any", [Entry({"i": 8}), Entry({"i": 9})], lambda missing: [1])


def test_a_failed_measurement_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError):
        store.get("any", {"a": 1}, lambda: 1 / 0)
    assert not files(store) and store.get("any", {"a": 1}, lambda: 2) == 2


# ---- damage


@in_one_directory
@given(st.data())
def test_a_damaged_file_is_set_aside_and_measured_again(store, data):
    value = {"acc": [0.5, 0.25], "name": "x"}
    store.get("any", {"a": 1}, lambda: value)
    (file,) = files(store)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    again = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.get("any", {"a": 1}, lambda: again.append(1) or value) == value
    assert len(caught) == len(again) <= 1
    if again:
        assert "is damaged" in str(caught[0].message)
        assert file.with_name(file.name + ".damaged").read_bytes() == content
    assert store.get("any", {"a": 1}, never) == value


def test_a_file_with_the_content_of_another_is_not_believed(store):
    store.get("any", {"a": 1}, lambda: 1)
    store.get("any", {"a": 2}, lambda: 2)
    one, two = (next(f for f in files(store) if json.loads(f.read_text())["value"] == v) for v in (1, 2))
    one.write_bytes(two.read_bytes())
    with pytest.warns(UserWarning, match="does not match its checksum or its key"):
        assert store.get("any", {"a": 1}, lambda: 11) == 11
    assert store.get("any", {"a": 2}, never) == 2


# ---- full disks, kills, company


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full(store, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"cannot store the measurement .*No space left on device.*Make room"):
            store.get("any", {"a": 1}, lambda: 1)
    assert not files(store) and not list(store.root.rglob("*.tmp"))
    assert store.get("any", {"a": 1}, lambda: 2) == 2


def test_the_kernel_refuses_to_write_on(store):
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # the file breaks off half-way
        try:
            store.get("any", {"a": 1}, lambda: "x" * 10_000)
        except OSError as error:
            os._exit(7 if "cannot store" in str(error) else 1)

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 7
    assert not files(store) and store.get("any", {"a": 1}, lambda: 2) == 2


def test_sigkill_loses_only_the_measurement_in_flight(store):
    def compute(missing):
        yield "first"
        time.sleep(60)

    entries = [Entry({"i": 0}), Entry({"i": 1})]
    process = fork.Process(target=store.get_many, args=("any", entries, compute))
    process.start()
    deadline = time.time() + 20
    while not files(store) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(files(store)) == 1
    assert store.get_many("any", entries, lambda missing: [f"now {i}" for i in missing]) == ["first", "now 1"]


def test_concurrent_processes_measure_each_key_once(store, tmp_path):
    log = tmp_path / "log"
    start = fork.Event()

    def child(order):
        def compute(missing):
            for i in missing:
                time.sleep(0.05)
                with open(log, "a") as file:
                    file.write(f"{order[i]}\n")
                yield order[i] * 10

        start.wait()
        values = store.get_many("any", [Entry({"i": i}) for i in order], compute)
        os._exit(0 if values == [10 * i for i in order] else 1)

    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2], [1, 3], [3, 1], [0, 4]]
    processes = [fork.Process(target=child, args=(order,)) for order in orders]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * len(orders)
    assert sorted(log.read_text().split()) == list("01234")


def test_what_is_timed_has_the_machine_for_itself(store, tmp_path):
    """Many processes measure; a file stands for each that is at it. One that is killed does not hold up the others."""
    busy = tmp_path / "busy"
    busy.mkdir()

    def child(kind, i):
        def compute():
            inner = store.get("inner", {"i": i}, lambda: i)  # a measurement that needs another
            mine = busy / f"{kind}-{i}"
            mine.touch()
            beside = set()
            for _ in range(10):
                time.sleep(0.01)
                beside |= {other.name for other in busy.iterdir()} - {mine.name}
            mine.unlink()
            if i == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return [inner, sorted(beside)]

        _, beside = store.get(kind, {"i": i}, compute)
        os._exit(1 if beside and kind == "timing" or any(name.startswith("timing") for name in beside) else 0)

    kinds = ["losses", "timing", "losses", "timing", "losses", "score", "timing", "serving"]
    processes = [fork.Process(target=child, args=(kind, i)) for i, kind in enumerate(kinds)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, *[0] * (len(kinds) - 1)]


# ---- measurements


@pytest.fixture(scope="module")
def model():
    made = tiny("llama", vocab_size=300, max_position_embeddings=512)
    made.name_or_path = "org/tiny@v1"
    return made


def test_scores_by_sample_have_the_mean_that_is_scored(tmp_path):
    store = Store(tmp_path)
    model = tiny("llama")
    calibration = Calibration(random_ids(5, 12))
    by_sample = store.sample_scores(model, calibration)
    scores = store.score(model, calibration)
    for kind in ("attn", "mlp", "block"):
        assert by_sample[kind].shape == (5, len(scores.attn))
        assert by_sample[kind].mean(axis=0) == pytest.approx(getattr(scores, kind), rel=1e-9)
    again = store.sample_scores(model, calibration)
    assert (again["attn"] == by_sample["attn"]).all() and len(list(tmp_path.glob("sample-scores/*.json"))) == 1
    mask = torch.ones(5, 12, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="custom is padded; scores by sample need samples of one length"):
        store.sample_scores(model, Calibration(random_ids(5, 12), attention_mask=mask))


def test_score_is_stored(store, model, capsys):
    calibration = Calibration(random_ids(4, 12), source="toy (set), seed 0")
    first = store.score(model, calibration)
    expected = score(model, calibration, progress=False)
    assert (first.attn == expected.attn).all() and (first.stderr["mlp"] == expected.stderr["mlp"]).all()
    capsys.readouterr()
    again = store.score(model, calibration, batch_size=3, with_residual=True)  # a default, said; float32: any batch
    assert again.to_json() == first.to_json() and capsys.readouterr().out == ""
    assert store.score(model, calibration, with_residual=False).to_json() != first.to_json()
    store.score(model, Calibration(random_ids(4, 12, seed=1)))
    assert len(files(store)) == 3 and all(file.name.startswith("tiny-v1-") for file in files(store))


def test_a_raised_version_is_measured_again(store, model, monkeypatch):
    """The number of the scoring protocol enters the key; the code does not."""
    calibration = Calibration(random_ids(2, 8))
    store.score(model, calibration)
    monkeypatch.setattr(scoring, "VERSION", scoring.VERSION + 1)
    store.score(model, calibration)
    assert len(files(store)) == 2


# ---- fingerprints


def test_model_key_sees_weights_dtype_and_attention():
    def key(model):
        return json.dumps(model_key(model, 8), sort_keys=True)

    first = key(tiny("llama"))
    assert key(tiny("llama")) == first
    changed = tiny("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    others = [changed, tiny("llama", seed=1), tiny("llama").bfloat16(), tiny("llama", "sdpa"), tiny("qwen3")]
    assert len({first} | {key(model) for model in others}) == 6
    assert model_key(tiny("llama"), 8) == model_key(tiny("llama"), 3) == model_key(tiny("llama"))  # float32
    assert model_key(tiny("llama").bfloat16(), 8) != model_key(tiny("llama").bfloat16(), 3)


def test_speed_key_sees_shapes_and_not_weights():
    def key(model):
        return json.dumps(speed_key(model), sort_keys=True)

    first = key(tiny("llama"))
    assert key(tiny("llama", seed=1)) == first
    others = [tiny("llama", intermediate_size=64), tiny("llama").bfloat16(), tiny("llama", "sdpa"), tiny("qwen3")]
    others.append(tiny("llama", rms_norm_eps=1e-3))
    assert len({first} | {key(model) for model in others}) == 6


def test_tokenizer_digest_sees_what_it_does_not_how_it_was_called():
    tokenizer = byte_tokenizer()
    first = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=5)
    assert tokenizer_digest(tokenizer) == first
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != first


def test_provenance_names_code_versions_machine_model_and_text(model):
    facts = provenance(model, Calibration(random_ids(2, 4), source="toy"), seed=3)
    assert facts["model"] == "org/tiny" and facts["revision"] == "v1" and facts["dtype"] == "float32"
    assert facts["torch"].startswith(torch.__version__.split("+")[0]) and facts["calibration"] == "toy"
    assert facts["seed"] == 3 and facts["device"] and facts["threads"] >= 1 and json.dumps(facts)
    wanted = {
        "time",
        "llmdrop",
        "git_commit",
        "git_dirty",
        "python",
        "interpreter",
        "transformers",
        "lm_eval",
        "platform",
        "weights",
    }
    assert wanted | {"calibration_digest", "device_type", "attention"} <= set(facts)


@pytest.mark.parametrize(
    ("interpreter", "named"),
    [
        (Path(llmdrop.__file__).parents[1] / ".venv/bin/python", ".venv/bin/python"),
        (Path.home() / "envs/mine/bin/python", "~/envs/mine/bin/python"),
        (Path("/opt/conda/bin/python"), "/opt/conda/bin/python"),
    ],
)
def test_provenance_names_the_interpreter(interpreter, named, monkeypatch):
    monkeypatch.setattr("sys.executable", str(interpreter))
    assert provenance()["interpreter"] == named
