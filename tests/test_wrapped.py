"""What torch.compile, DataParallel, DDP, FSDP and peft put around a model: the model inside is taken, or refused."""

import copy

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from exports import TOKENIZER, logits, wide
from tiny import FAMILIES, byte_tokenizer, random_ids, tiny
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, score
from llmdrop.anatomy import unwrapped
from llmdrop.checkpoints.four_bits import quantized
from llmdrop.compress.healing import heal
from llmdrop.compress.reconstruction import fit, reconstruct
from llmdrop.compress.search import greedy, taylor
from llmdrop.compress.shortened_llama import block_taylor
from llmdrop.compress.wanda import wanda, zeroed
from llmdrop.compress.windows import score_windows, windowed
from llmdrop.evaluation.generation import generate, greedy_matches

IDS = random_ids(4, 12)
PLAN = DropPlan([1, 3], [2])


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model, **options):
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False} | options
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}

FOR_A_WHILE = {  # what does not change the model, as numbers
    "score": lambda m: [score(m, IDS, progress=False).attn, score(m, IDS, gap=True, progress=False).gap],
    "score_distributed": lambda m: llmdrop.score_distributed(m, IDS, progress=False).mlp,
    "perplexity": lambda m: llmdrop.perplexity(m, IDS, progress=False)["perplexity"],
    "perplexity_sweep": lambda m: llmdrop.perplexity_sweep(m, {"a": PLAN}, IDS, progress=False)["perplexity"],
    "taylor": lambda m: [index for _, index in taylor(m, IDS).order],
    "greedy": lambda m: list(greedy(m, IDS, n=2).losses.values()),
    "score_windows": lambda m: score_windows(m, IDS, window=3, sinks=1),
    "kv_cache_bytes": lambda m: llmdrop.kv_cache_bytes(m, 2, 8, PLAN),
    "predict_speed": lambda m: llmdrop.predict_speed(m, PLAN, prompt_len=8, new_tokens=8).seconds,
}
WRITES = {  # what reads or changes weights
    "fit": lambda m: [change.weight for change in fit(m, DropPlan([2]), IDS).values() if change.weight is not None],
    "wanda": lambda m: list(wanda(m, IDS, 0.5).values()),
    "block_taylor": lambda m: block_taylor(m, IDS),
}


def numbers(values):
    return np.concatenate([np.ravel(np.asarray(v, float)) for v in (values if isinstance(values, list) else [values])])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("use", [*FOR_A_WHILE, *WRITES])
def test_the_wrapped_model_gives_the_models_own_numbers(use, wrapper, processes):
    run = (FOR_A_WHILE | WRITES)[use]
    np.testing.assert_array_equal(numbers(run(WRAPPERS[wrapper](tiny("llama")))), numbers(run(tiny("llama"))))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_dropping_in_a_wrapper(family, wrapper, processes, tmp_path):
    model, plain = tiny(family), tiny(family)
    wrapped = WRAPPERS[wrapper](model)
    dense = logits(wrapped, IDS)
    with dropped(plain, PLAN):
        expected = logits(plain, IDS)
    with dropped(wrapped, PLAN) as inside:
        assert inside is wrapped
        torch.testing.assert_close(logits(wrapped, IDS), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(wrapped, IDS), dense, atol=0, rtol=0)
    assert llmdrop.weights_digest(wrapped) == llmdrop.weights_digest(tiny(family))
    if "DDP" in wrapper:
        with pytest.raises(ValueError, match="apply_plan to the model before it is wrapped, and wrap what is left"):
            apply_plan(wrapped, PLAN)
        assert llmdrop.find_anatomy(model).plan == DropPlan()
    else:
        assert apply_plan(wrapped, PLAN) is wrapped
        torch.testing.assert_close(logits(wrapped, IDS), expected, atol=1e-5, rtol=0)
        path = llmdrop.save_model(wrapped, byte_tokenizer(), tmp_path / "m")
        torch.testing.assert_close(logits(llmdrop.load_model(path, device="cpu")[0], IDS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_writing_answering_timing_and_exporting_in_a_wrapper(wrapper, processes, tmp_path):
    shape = dict(vocab_size=257, eos_token_id=256)
    wrapped, tokenizer = WRAPPERS[wrapper](tiny("llama", **shape)), byte_tokenizer()
    plain = tiny("llama", **shape)
    prompts = ["Layers that", "change little"]
    assert generate(wrapped, tokenizer, prompts, 6) == generate(plain, tokenizer, prompts, 6)
    asked = (tokenizer, [PLAN], prompts, [" can go", " go"])
    assert greedy_matches(wrapped, *asked, progress=False) == greedy_matches(plain, *asked, progress=False)
    rows = [llmdrop.evaluate(m, tokenizer, ["piqa"], limit=3, progress=False) for m in (wrapped, plain)]
    assert rows[0].equals(rows[1])
    speed = llmdrop.measure_speed(wrapped, prompt_len=4, new_tokens=2, repeats=1)
    assert speed["kv_bytes"] == llmdrop.measure_speed(plain, prompt_len=4, new_tokens=2, repeats=1)["kv_bytes"]
    compared = llmdrop.compare_speed(wrapped, {"whole": DropPlan(), "less": PLAN}, 1, prompt_len=4, new_tokens=2)
    assert list(compared["plan"]) == ["whole", "less"]
    for name, format in (("m", "nemotron-nas"), ("m.gguf", "gguf")):
        path = llmdrop.save_model(WRAPPERS[wrapper](wide()), TOKENIZER, tmp_path / name, format=format)
        loaded = llmdrop.load_model(path, "float32", "cpu")[0]
        ids = random_ids(1, 8)
        torch.testing.assert_close(logits(loaded, ids), logits(wide(), ids), atol=0.02, rtol=0)


CHANGES = [
    lambda model, zeros: zeroed(model, zeros),
    lambda model, zeros: quantized(model, group_size=32),
    lambda model, zeros: windowed(model, [1], 3, 1),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_changes_of_weights_in_a_wrapper(wrapper, processes):
    plan, shape = DropPlan([2]), {"intermediate_size": 64}
    plain = tiny("llama", **shape)
    changes = fit(plain, plan, IDS)
    expected = logits(reconstruct(tiny("llama", **shape), plan, changes), IDS)
    if "DDP" not in wrapper:
        wrapped = WRAPPERS[wrapper](tiny("llama", **shape))
        torch.testing.assert_close(logits(reconstruct(wrapped, plan, changes), IDS), expected, atol=1e-5, rtol=0)
    wrapped = WRAPPERS[wrapper](tiny("llama", **shape))
    zeros = wanda(plain, IDS, 0.5)
    for change in CHANGES if "compiled" not in wrapper else CHANGES[:2]:
        with change(plain, zeros):
            expected = logits(plain, IDS)
        with change(wrapped, zeros):
            torch.testing.assert_close(logits(wrapped, IDS), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(wrapped, IDS), logits(plain, IDS), atol=0, rtol=0)


def test_windows_in_a_compiled_model_are_refused():
    """It would go on as compiled, without them."""
    in_place = tiny("llama")
    in_place.compile(backend="eager")
    for model in (torch.compile(tiny("llama"), backend="eager"), in_place):
        with pytest.raises(ValueError, match="a compiled model does not see windows.*before torch.compile"):
            windowed(model, [1], 3, 1).__enter__()


# ---- peft


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_are_not_merged_count(family):
    adapted = with_lora(tiny(family))
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected, got = (score(m, IDS, progress=False) for m in (merged, adapted))
    np.testing.assert_allclose(got.block, expected.block, atol=1e-5)
    np.testing.assert_allclose(got.attn, expected.attn, atol=1e-5)
    assert np.abs(got.block - score(tiny(family), IDS, progress=False).block).max() > 1e-3, "the adapters must matter"
    losses = [llmdrop.perplexity(m, IDS, progress=False)["log_perplexity"] for m in (merged, adapted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    with dropped(merged, PLAN), dropped(adapted, PLAN):
        torch.testing.assert_close(logits(adapted, IDS), logits(merged, IDS), atol=1e-4, rtol=0)
    expected = logits(apply_plan(merged, PLAN), IDS)
    assert apply_plan(adapted, PLAN) is adapted
    torch.testing.assert_close(logits(adapted, IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use", FOR_A_WHILE)
def test_what_reads_only_takes_adapters(use):
    adapted = with_lora(tiny("llama"))
    merged = copy.deepcopy(adapted).merge_and_unload()
    run = FOR_A_WHILE[use]
    np.testing.assert_allclose(numbers(run(adapted)), numbers(run(merged)), rtol=1e-3, atol=1e-5)


def added_adapter():
    """An adapter that transformers itself put into a stock model."""
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    return model


ADAPTED = {
    "LoRA": lambda: with_lora(tiny("llama")),
    "with a trained head": lambda: with_lora(tiny("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "IA3": lambda: peft.get_peft_model(
        tiny("llama"), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "compiled LoRA": lambda: torch.compile(with_lora(tiny("llama")), backend="eager"),
    "add_adapter": added_adapter,
}
MERGED_FIRST = {
    "save_model": lambda m, path: llmdrop.save_model(m, None, path),
    "nemotron-nas": lambda m, path: llmdrop.save_model(m, None, path, format="nemotron-nas"),
    "gguf": lambda m, path: llmdrop.save_model(m, None, path / "m.gguf", format="gguf"),
    "reconstruct": lambda m, path: reconstruct(m, DropPlan([2]), {}),
    "zeroed": lambda m, path: wanda(m, IDS, 0.5),
    "quantized": lambda m, path: quantized(m).__enter__(),
    "heal": lambda m, path: heal(m, DropPlan([2]), llmdrop.Calibration(IDS)),
} | {name: (lambda m, path, run=run: run(m)) for name, run in WRITES.items()}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("use", MERGED_FIRST)
def test_what_writes_weights_asks_to_merge_first(use, kind, tmp_path):
    model = ADAPTED[kind]()
    score(model, IDS, progress=False)
    with pytest.raises(ValueError, match="adapters of peft.*merge them first, model = peft_model.merge_and_unload"):
        MERGED_FIRST[use](model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_drop_adapt_merge_save_load(tmp_path):
    plan = DropPlan([1], [3])
    adapted = with_lora(apply_plan(tiny("llama"), plan))
    expected = logits(adapted, IDS)
    path = llmdrop.save_model(adapted.merge_and_unload(), byte_tokenizer(), tmp_path / "m")
    loaded = llmdrop.load_model(path, device="cpu")[0]
    assert llmdrop.find_anatomy(loaded).plan == plan
    torch.testing.assert_close(logits(loaded, IDS), expected, atol=1e-5, rtol=0)


def test_peft_models_that_are_more_than_their_layers():
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for config in (prompts, prefix):
        model = peft.get_peft_model(tiny("llama"), config)
        for use in (lambda m: score(m, IDS, progress=False), lambda m: apply_plan(m, PLAN)):
            with pytest.raises(ValueError, match="more than its layers show.*model.get_base_model"):
                use(model)
        score(model.get_base_model(), IDS, progress=False)


# ---- sharded


@pytest.mark.parametrize("use", [*FOR_A_WHILE, "apply_plan", "dropped", "save_model", "generate", "measure_speed"])
def test_sharded_models_are_refused_with_what_to_do(use, processes, tmp_path):
    others = {
        "apply_plan": lambda m: apply_plan(m, PLAN),
        "dropped": lambda m: dropped(m, PLAN).__enter__(),
        "save_model": lambda m: llmdrop.save_model(m, None, tmp_path / "m"),
        "generate": lambda m: generate(m, byte_tokenizer(), ["a"], 2),
        "measure_speed": lambda m: llmdrop.measure_speed(m, prompt_len=4, new_tokens=2),
    }
    run = (FOR_A_WHILE | others)[use]
    whole = FullyShardedDataParallel(tiny("llama"), device_id=torch.device("cpu"))
    inside = tiny("llama")
    for layer in inside.model.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    for model in (whole, inside):
        with pytest.raises(ValueError, match="sharded .FSDP, DeepSpeed.*before it is wrapped.*full state dict"):
            run(model)
    assert not list(tmp_path.iterdir())


def test_what_is_no_wrapper_stays_as_it_is():
    model = tiny("llama")
    assert unwrapped(model) is model and unwrapped(model, with_adapters=False) is model
    with pytest.raises(ValueError, match="a Linear is no transformers model"):
        llmdrop.find_anatomy(nn.DataParallel(nn.Linear(2, 2)))
