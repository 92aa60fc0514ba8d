"""Every path of the library on two pretended GPUs gives the CPU's numbers, and waits for them no more than it must.

What the pretense can show, and what only a real GPU can (`make gpu`), is said in `device.py`.
"""

import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from device import CAPTURING, pretended_gpus, reason_not_to
from device_cases import ONE_GPU, PLAN, TEXT, TWO_GPUS, all_corrections, cases, device_of, forward, name_of
from exports import TOKENIZER, wide
from tiny import byte_tokenizer, random_ids, tiny
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import DynamicCache, LlamaForCausalLM

from llmdrop import (
    Calibration,
    DropPlan,
    Store,
    apply_plan,
    load_model,
    save_model,
    score,
    score_checkpoint,
    score_distributed,
)
from llmdrop.checkpoints import digest
from llmdrop.checkpoints.load import check_device, load_weights
from llmdrop.compress.variant import Variant
from llmdrop.compress.windows import windowed
from llmdrop.evaluation.generation import generate, greedy_matches
from llmdrop.evaluation.sweep import Item, loglikelihoods
from llmdrop.repro.provenance import model_key
from llmdrop.repro.quality import quality
from llmdrop.repro.timing import timing
from llmdrop.speed.geometry import GEOMETRIES, Shape, geometry_model
from llmdrop.speed.measure import greedy_tokens, measure_speed

pytestmark = pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to()))


@pytest.fixture
def gpus(monkeypatch):
    # transformers reads weights in a pool of threads, which began outside of the pretense
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with pretended_gpus() as machine:
        yield machine


# -- the pretense itself


def test_what_a_gpu_refuses_is_refused(gpus):
    here = torch.ones(2, 3)
    first, second = here.to("cuda"), here.cuda(1)
    assert (str(first.device), str(second.device)) == ("cuda:0", "cuda:1") and first.is_cuda
    for mixed in (
        lambda: first + here,
        lambda: first @ second.T,
        lambda: torch.cat([first, second]),
        lambda: first[torch.tensor([1]).to("cuda:1")],
    ):
        with pytest.raises(RuntimeError, match="to be on the same device"):
            mixed()
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        first.numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        here.to("cuda:2")
    assert torch.equal((first * torch.tensor(2.0)).cpu(), 2 * here), "a number may be anywhere"


def test_what_a_graph_refuses_is_refused(gpus):
    x = torch.ones(3, device="cuda")
    mask = x > 0
    pinned = torch.ones(3).pin_memory()
    for waits in (
        x.sum().item,
        x.cpu,
        lambda: x[mask],
        lambda: x.copy_(torch.ones(3)),
        mask.nonzero,
        lambda: bool(x[0]),
    ):
        with pytest.raises(RuntimeError, match=CAPTURING), torch.cuda.graph(torch.cuda.CUDAGraph()):
            waits()
    with torch.cuda.graph(torch.cuda.CUDAGraph()) as _:
        x.copy_(pinned, non_blocking=True)


def test_a_graph_runs_again_on_what_is_there_then(gpus):
    x, total = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += (2 * x).sum()
    x.fill_(5)
    graph.replay()
    assert total.item() == 6 + 30


# -- the CPU's numbers


# what runs on two GPUs runs on one for a single family: nothing of another stays on the host there that does not here
ALONE = [
    (family, act) for family, act in cases(ONE_GPU) if family == "llama" or act not in (*TWO_GPUS, all_corrections)
]


@pytest.mark.parametrize("family, act", ALONE, ids=name_of)
def test_one_gpu_gives_the_numbers_of_the_cpu(family, act, gpus):
    expected = act(tiny(family, "sdpa"))
    model = tiny(family, "sdpa").to("cuda:1")  # not the current device
    np.testing.assert_allclose(act(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, act", cases(TWO_GPUS, with_all_methods=False), ids=name_of)
def test_two_gpus_give_the_numbers_of_the_cpu(family, act, gpus, tmp_path):
    expected = act(tiny(family, "sdpa"))
    tiny(family, "sdpa").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model", device="balanced")  # by accelerate's own hooks
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1"}
    np.testing.assert_allclose(act(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_of_the_mean_in_16_bits(dtype, gpus):
    (compensated,) = (act for _, act in cases([]) if name_of(act) == "compensated-mean" and _ == "llama")
    expected = compensated(tiny("llama", "sdpa").to(dtype))
    np.testing.assert_allclose(compensated(tiny("llama", "sdpa").to("cuda", dtype)), expected, atol=0.05)


# -- decoding


def test_a_graph_writes_what_single_steps_write(gpus):
    prompt = random_ids(2, 16)
    for plan in (DropPlan(), DropPlan(attn=[0, 3], mlp=[2])):
        expected = greedy_tokens(apply_plan(tiny("llama", "sdpa"), plan), prompt, 8)
        model = apply_plan(tiny("llama", "sdpa").to("cuda"), plan)
        written = greedy_tokens(model, prompt.to("cuda"), 8, "static", "graph")
        assert torch.equal(written.cpu(), expected)


@pytest.mark.parametrize("cache, decoding", [("dynamic", "eager"), ("static", "eager"), ("static", "graph")])
def test_speed_is_measured(cache, decoding, gpus):
    model = tiny("llama", "sdpa").to("cuda:1")
    out = measure_speed(model, 2, 16, 8, repeats=2, cache=cache, decoding=decoding, timed_steps=4)
    assert out["peak_bytes"] == 1 and out["decode_seconds"] > 0  # as the pretense has it
    assert out["kv_bytes"] == measure_speed(tiny("llama", "sdpa"), 2, 16, 8, cache=cache)["kv_bytes"]


def test_random_weights_are_made_on_the_device(gpus, monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "Tiny", Shape(4, 256, 4, 2, 64, 512, 100))
    model = geometry_model("Tiny", "cuda:1", "bfloat16")
    assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {"cuda:1"}
    assert forward_is_finite(model)


def forward_is_finite(model) -> bool:
    with torch.no_grad():
        return bool(model(random_ids(2, 8).to(device_of(model))).logits.isfinite().all())


# -- waiting for the GPU


def test_a_sweep_waits_once_a_call_and_plan(gpus):
    model = tiny("llama", "sdpa").to("cuda")
    items = [Item(tuple(row), 20) for row in random_ids(30, 24).tolist()]
    loglikelihoods(model, [DropPlan()], items, progress=False)  # once it is tried whether texts so long can share rows
    for plans in ([DropPlan()], [DropPlan(), DropPlan(attn=[4]), DropPlan(mlp=[4])]):
        before = gpus.waits
        loglikelihoods(model, plans, items, progress=False)  # 600 scored positions
        assert gpus.waits - before <= 8 + len(plans)


def test_a_window_adds_no_waiting_to_a_decode_step(gpus):
    model = tiny("llama", "sdpa").to("cuda")
    waits = []
    for layers in ([], [0, 1, 2, 3, 4]):
        with windowed(model, layers, window=6, sinks=2), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(random_ids(1, 20).to("cuda"), past_key_values=cache)
            before = gpus.waits
            for _ in range(4):
                model(random_ids(1, 1).to("cuda"), past_key_values=cache)
            waits.append(gpus.waits - before)
    assert waits[0] == waits[1]


def test_scoring_waits_by_the_batch_and_not_by_the_token(gpus):
    model = tiny("llama", "sdpa").to("cuda")
    waits = []
    score(model, random_ids(1, 8), progress=False)  # the first proves where its attention and MLP are
    for length in (8, 64):
        before = gpus.waits
        score(model, Calibration(random_ids(2, length)), batch_size=1, progress=False)
        waits.append(gpus.waits - before)
    assert waits[0] == waits[1]


class Made(TorchDispatchMode):
    """Every tensor that an operation gives: its type, shape and bytes."""

    def __init__(self):
        super().__init__()
        self.tensors: list[tuple[torch.dtype, torch.Size, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [value for value in tree_flatten(out)[0] if isinstance(value, torch.Tensor)]
        self.tensors += [(value.dtype, value.shape, value.nbytes) for value in made]
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_sweep_holds_no_distances_of_64_bits(family, gpus):
    model = tiny(family, "sdpa").to("cuda")
    with Made() as made:
        loglikelihoods(model, [DropPlan()], [Item(tuple(random_ids(1, 24)[0].tolist()), 20)], progress=False)
    of_pairs = {dtype for dtype, shape, _ in made.tensors if len(shape) == 3 and shape[1] == shape[2] > 1}
    assert torch.bool in of_pairs and torch.int64 not in of_pairs
    assert (torch.int32 in of_pairs) == (family == "gemma2"), "distances are for windows"


def test_the_digest_takes_a_piece_of_the_largest_parameter(gpus, monkeypatch):
    monkeypatch.setattr(digest, "ROW", 2**6)
    model = tiny("llama", vocab_size=5000).to("cuda")
    with Made() as made:
        digest.weights_digest(model)
    of_64_bits = [n_bytes for dtype, _, n_bytes in made.tensors if dtype == torch.int64]
    assert max(of_64_bits) == 8 * 256 * 2**6 < model.get_input_embeddings().weight.nbytes


# -- files


@pytest.mark.parametrize("stream_on", ["device", "host", "file", "auto"])
def test_a_checkpoint_is_scored_from_disk(stream_on, gpus, tmp_path):
    model = tiny("llama", "sdpa")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    expected = score(model, TEXT, 2, progress=False)
    settings = {"device": "cuda:1", "stream_on": stream_on, "work_dir": tmp_path / "work", "progress": False}
    got = score_checkpoint(tmp_path / "model", TEXT, 2, **settings)
    np.testing.assert_allclose(got.to_frame()["score"], expected.to_frame()["score"], atol=1e-6)


@pytest.mark.parametrize(
    "format, settings, plan",
    [
        ("hf", {}, PLAN),
        ("hf", {}, DropPlan([2], [2])),
        ("nemotron-nas", {}, PLAN),
        ("gguf", {"weights": "f32"}, PLAN),
        ("gguf", {"weights": "q8_0"}, PLAN),
    ],
)
def test_it_is_saved_as_from_the_cpu_and_loaded_to_any_gpu(format, settings, plan, gpus, tmp_path):
    name = "model.gguf" if format == "gguf" else "model"
    shape = {"hidden_size": 64, "intermediate_size": 96}  # in blocks of 32, for q8_0
    for device in ("cpu", "cuda:1"):
        save_model(wide(plan, **shape).to(device), TOKENIZER, tmp_path / device / name, format=format, **settings)
    for file in (tmp_path / "cpu").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "cuda:1" / file.relative_to(tmp_path / "cpu")).read_bytes()
    expected = forward(load_model(tmp_path / "cpu" / name, device="cpu")[0])
    model, _ = load_model(tmp_path / "cuda:1" / name, device="cuda:1")
    assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {"cuda:1"}
    np.testing.assert_allclose(forward(model), expected, rtol=1e-4, atol=1e-5)


def test_weights_go_to_the_gpu_as_they_are_read(gpus, tmp_path, monkeypatch):
    """Not by way of a whole model in main memory."""
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    moved_from = set()
    to = torch.nn.Module.to

    def watched(module, *args, **kwargs):
        moved_from.update(parameter.device.type for parameter in module.parameters())
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    model, _ = load_model(tmp_path / "model", device="cuda:1")
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:1"} and moved_from == {"cuda"}


# -- the rest of the flow


def test_answers_and_matches(gpus):
    prompts = ["Layers that change little go first. ", "Layers that change little go last. Why?", "The"]
    targets = [" A", " B", " C"]
    found = []
    for device in ("cpu", "cuda:1"):
        model = tiny("llama", "sdpa", vocab_size=257).to(device)
        written = generate(model, byte_tokenizer(), prompts, max_new_tokens=5, stop=["\n"])
        matches = greedy_matches(model, byte_tokenizer(), [DropPlan(), PLAN], prompts, targets, progress=False)
        found.append((written, matches))
    assert found[0] == found[1]


def test_quality_and_timing_are_stored_by_device(gpus, tmp_path):
    text = Calibration(random_ids(4, 24), "random")
    variants = {"Baseline": Variant(), "Attn-2": Variant(DropPlan(attn=[1, 3]))}
    rows = {}
    for device in ("cpu", "cuda:1"):
        model = tiny("llama", "sdpa", vocab_size=257).to(device)
        store = Store(tmp_path)
        rows[device] = quality(model, byte_tokenizer(), variants, texts={"random": text}, store=store)
        sizes = {"batch_size": 1, "prompt_len": 8, "new_tokens": 2, "rounds": 1}
        assert (timing(model, variants, store=store, **sizes)["status"] == "ok").all()
    np.testing.assert_allclose(rows["cuda:1"]["value"], rows["cpu"]["value"], rtol=1e-5)
    assert len(list((tmp_path / "losses").glob("*.json"))) == 4, "a GPU's numbers are not taken for a CPU's"


def test_cudnn_attention_is_off_and_in_the_key(gpus):
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert check_device("cpu") == "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
        assert check_device("auto") == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
        model = tiny("llama", "sdpa")
        assert "cudnn_attention" not in model_key(model), "keys of what is stored from CPUs stay"
        key = model_key(model.to("cuda"))
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert (key["cudnn_attention"], model_key(model)["cudnn_attention"]) == (False, True)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_4_bit_weights_go_to_the_gpu_that_was_asked_for(gpus, tmp_path, monkeypatch):
    """And not to the current one: transformers puts them where device_map says while it reads them."""
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    asked = []

    def from_pretrained(*args, **kwargs):
        asked.append(kwargs["device_map"])
        raise OSError("seen enough")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    for device in ("cuda:1", "cuda", "cpu"):
        with pytest.raises(OSError, match="seen enough"):
            load_weights(tmp_path, device=device)
    assert asked == [{"": "cuda:1"}, {"": "cuda"}, {"": "cpu"}]


def test_processes_add_their_sums_on_the_host_by_gloo(gpus, monkeypatch):
    """NCCL would refuse models on the CPU, and processes that share a GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    backends = []
    added = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "init_process_group", backends.append)
    monkeypatch.setattr(distributed, "new_group", lambda backend: backends.append(backend) or "of two")
    monkeypatch.setattr(distributed, "all_reduce", lambda values, group: added.append(values.device.type))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda group: None)
    monkeypatch.setattr("llmdrop.streaming.processes.scores_from_sums", lambda *sums: None)  # these are of half
    score_distributed(tiny("llama", "sdpa").to("cuda"), TEXT, progress=False)
    assert (backends, added) == (["gloo", "gloo"], ["cpu"])


def test_the_suite_hides_real_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.mark.parametrize("rank, gets", [(0, "cuda:0"), (1, "cuda:1"), (2, None)])
def test_every_process_of_a_launcher_has_a_gpu_of_its_own(rank, gets, gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with nullcontext() if gets else pytest.raises(ValueError, match="'cuda:2' is not available.*one of its own"):
        assert check_device("auto") == gets
