"""Every way to write a dropped model, read by every loader there is: equal hidden states or a refusal, never a guess.

A stock class that finds no weights for a sublayer makes some up and goes on. So whatever writes a dropped model must
write what stock classes refuse, and each Auto class must find a class of ours where remote code is allowed.
"""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from exports import TOKENIZER, logits
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import random_ids, tiny
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from llmdrop import (
    Calibration,
    DropPlan,
    apply_plan,
    dropped,
    find_anatomy,
    load_model,
    perplexity,
    save_model,
    score,
)
from llmdrop.checkpoints.blocks import renumber
from llmdrop.checkpoints.load import load_weights
from llmdrop.checkpoints.transformers_format import auto_classes
from llmdrop.prune import put

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt")
PLANS = {
    "attention": DropPlan([0, 3]),
    "MLP": DropPlan([], [1, 4]),
    "mixed": DropPlan([0, 2, 3], [2, 4]),
    "blocks": DropPlan([1, 3], [1, 3]),
}
IDS = random_ids(2, 9)
EAGER = {"attn_implementation": "eager"}  # as the tiny models
AUTO = (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification)


def hidden(model: PreTrainedModel) -> torch.Tensor:
    """The last hidden state, which every head of an architecture reads, [B, T, C]."""
    with torch.no_grad():
        return model.base_model(IDS, use_cache=False).last_hidden_state


def trainer(model: PreTrainedModel, folder: Path, max_steps: int) -> Trainer:
    samples = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 12, seed=3)]
    settings = {"per_device_train_batch_size": 4, "save_steps": 1, "report_to": [], "use_cpu": True}
    settings |= {"disable_tqdm": True, "learning_rate": 1e-2, "max_steps": max_steps}
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=samples)


# -- writers: (dropped model, empty folder) -> (the model as written, where) ------------------------------------------


def by_save_model(model, folder):
    return model, save_model(model, TOKENIZER, folder / "m")


def by_save_pretrained(model, folder):
    model.save_pretrained(folder, max_shard_size="30KB")
    return model, folder


def by_trainer(model, folder):
    trainer(model, folder, 2).train()
    return model, folder / "checkpoint-2"


def by_peft_merge(model, folder):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)
    return merged, folder


def by_load_change_save(model, folder):
    save_model(model, TOKENIZER, folder / "first")
    model = load_weights(folder / "first", **EAGER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder / "second")
    return model, folder / "second"


def by_remote_code_and_save(model, folder):
    save_model(model, TOKENIZER, folder / "first")
    model = AutoModelForCausalLM.from_pretrained(folder / "first", trust_remote_code=True, **EAGER)
    model.save_pretrained(folder / "second")
    return model, folder / "second"


WRITERS = (by_save_model, by_save_pretrained, by_trainer, by_peft_merge, by_load_change_save, by_remote_code_and_save)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_loader_makes_up_weights(family, plan, writer, tmp_path):
    whole = tiny(family)
    stock = type(whole)
    dense = hidden(whole)
    model, path = writer(apply_plan(whole, PLANS[plan]), tmp_path)
    model.eval()
    expected = hidden(model)
    assert (expected - dense).abs().max() > 1e-3, "the plan must matter, or this test shows nothing"

    def check(loaded, needs_head=False):
        torch.testing.assert_close(hidden(loaded.eval()), expected, atol=1e-5, rtol=0)
        if needs_head:
            torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), atol=1e-5, rtol=0)

    loaded = load_weights(path, **EAGER)
    assert torch.equal(hidden(loaded), expected) and torch.equal(logits(loaded, IDS), logits(model, IDS))
    if writer is by_save_model or plan != "blocks":  # others write an ordinary, shorter checkpoint
        assert find_anatomy(loaded).plan == PLANS[plan]
    for auto in AUTO:
        if auto.__name__ not in auto_classes(whole.config.model_type):  # transformers has no such head for it
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                auto.from_pretrained(path, trust_remote_code=True, **EAGER)
            continue
        check(auto.from_pretrained(path, trust_remote_code=True, **EAGER), needs_head=auto is AutoModelForCausalLM)
    settings = {"trust_remote_code": True, "model_kwargs": dict(EAGER)}
    generator = pipeline("text-generation", str(path), tokenizer=TOKENIZER, **settings)
    check(generator.model, needs_head=True)
    if plan == "blocks":
        check(stock.from_pretrained(path, **EAGER), needs_head=True)
        check(AutoModel.from_pretrained(path, **EAGER))
        return
    for name in (stock.__name__, type(model.base_model).__name__):
        with pytest.raises(Exception, match="minus dropped ones: load with llmdrop.load_model or trust_remote_code"):
            getattr(transformers, name).from_pretrained(path, **EAGER)
    for auto in AUTO:
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(path, trust_remote_code=False, **EAGER)


# -- heads, copies, configs -------------------------------------------------------------------------------------------


def loaded_with_a_head(folder: Path) -> PreTrainedModel:
    path = save_model(apply_plan(tiny("llama"), PLANS["mixed"]), TOKENIZER, folder / "decoder")
    return AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True, num_labels=3, **EAGER)


def dropped_from_a_classifier(folder: Path) -> PreTrainedModel:
    config = copy.deepcopy(tiny("llama").config)
    config.num_labels = 3
    whole = AutoModelForSequenceClassification.from_config(config, **EAGER)
    whole.model.load_state_dict(tiny("llama").model.state_dict())
    return apply_plan(whole, PLANS["mixed"])


def made_around_a_dropped_decoder(folder: Path) -> PreTrainedModel:
    model = apply_plan(tiny("llama"), PLANS["mixed"])
    model.config.num_labels = 3
    classifier = transformers.LlamaForSequenceClassification(model.config)
    classifier.model = model.model
    return classifier


@pytest.mark.parametrize("make", [loaded_with_a_head, dropped_from_a_classifier, made_around_a_dropped_decoder])
def test_a_classifier_on_a_dropped_decoder_is_saved_as_such(make, tmp_path):
    model = make(tmp_path).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    assert expected.shape == (2, 3)
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", trust_remote_code=True, **EAGER)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(Exception, match="minus dropped ones"):
        transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "m")


def test_a_classifier_is_no_language_model(tmp_path):
    dropped_from_a_classifier(tmp_path).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        load_weights(tmp_path / "m")


def test_blocks_of_a_classifier(tmp_path):
    """Heads hold a config of their own in their decoder; both must know the new depth."""
    config = copy.deepcopy(tiny("gemma2").config)
    whole = AutoModelForSequenceClassification.from_config(config, **EAGER).eval()
    assert whole.model.config is not None
    apply_plan(whole, PLANS["blocks"])
    whole.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_hidden_layers"] == len(written["layer_types"]) == 3
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, **EAGER).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_fresh_model_of_a_dropped_ones_config_is_whole(family, plan, tmp_path):
    model = apply_plan(tiny(family), PLANS[plan])
    fresh = AutoModelForCausalLM.from_config(model.config, **EAGER)
    parts = find_anatomy(fresh)
    assert not parts.plan and parts.n_layers == 5
    scores = score(fresh, Calibration(IDS), progress=False)
    assert not any(torch.tensor(getattr(scores, kind)).isnan().any() for kind in ("attn", "mlp", "block"))
    fresh.save_pretrained(tmp_path)
    again = type(fresh).from_pretrained(tmp_path, **EAGER)  # the stock class
    torch.testing.assert_close(logits(again, IDS), logits(fresh.eval(), IDS))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_what_was_dropped_from_them(duplicate, tmp_path):
    model = apply_plan(tiny("llama"), PLANS["mixed"])
    twin = duplicate(model)
    assert find_anatomy(twin).plan == PLANS["mixed"]
    twin.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_weights(tmp_path, **EAGER), IDS), logits(model, IDS))


def test_save_pretrained_while_dropped_and_after(tmp_path):
    model = tiny("llama")
    with dropped(model, PLANS["mixed"]):
        expected = logits(model, IDS)
        model.save_pretrained(tmp_path / "while")
        assert type(model.config) is transformers.LlamaConfig
    model.save_pretrained(tmp_path / "after")
    torch.testing.assert_close(logits(load_weights(tmp_path / "while", **EAGER), IDS), expected)
    assert not (tmp_path / "after" / "modeling_llmdrop.py").exists()
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "after", **EAGER)
    torch.testing.assert_close(logits(stock, IDS), logits(model, IDS))


@pytest.mark.parametrize("more", [DropPlan([1], []), DropPlan([2], [0, 3])], ids=["more", "only blocks are left"])
def test_dropping_more_from_what_remote_code_loaded(more, tmp_path):
    model = apply_plan(tiny("llama"), DropPlan([0, 3], [2]))
    save_model(model, TOKENIZER, tmp_path / "first")
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True, **EAGER)
    apply_plan(remote, more).save_pretrained(tmp_path / "second")
    expected = logits(apply_plan(model, more), IDS)
    loaded = load_weights(tmp_path / "second", **EAGER)
    assert find_anatomy(loaded).plan == DropPlan([0, 3], [2]) | more
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True, **EAGER)
    for one in (remote, loaded, again):
        torch.testing.assert_close(logits(one, IDS), expected, atol=1e-5, rtol=0)


def test_a_model_that_holds_a_dropped_one_is_refused_before_writing(tmp_path):
    class Wrapper(transformers.BertPreTrainedModel):
        def __init__(self, config, inner):
            super().__init__(config)
            self.inner = inner

    wrapper = Wrapper(transformers.BertConfig(), apply_plan(tiny("llama"), PLANS["mixed"]))
    with pytest.raises(ValueError, match="'bert' model holds a dropped 'llama' model"):
        wrapper.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_save_pretrained_of_0_1_0_is_read(tmp_path):
    """It wrote the stock config with all layers, and the record; the weights of what was dropped are not there."""
    for name, plan in PLANS.items():
        model = apply_plan(tiny("gemma2"), plan)
        with ExitStack() as undo:
            renumber(undo, model)
            put(undo, model.config, "llmdrop", {"n_layers": 5} | plan.key)
            transformers.PreTrainedModel.save_pretrained.__wrapped__(model, tmp_path / name)
        loaded = load_weights(tmp_path / name, **EAGER)
        assert find_anatomy(loaded).plan == plan
        torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS))


def test_others_may_read_the_files_and_nothing_is_left_over(tmp_path):
    for format, name in (("hf", "hf"), ("nemotron-nas", "nas"), ("gguf", "m.gguf")):
        model = apply_plan(tiny("llama", vocab_size=400), DropPlan([3]))
        save_model(model, TOKENIZER, tmp_path / name, format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf", "nas"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o044 == 0o044, path


# -- multimodal models: dropping is in their language model, what is saved is the whole -------------------------------

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MIXED_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MULTIMODAL = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": MIXED_TYPES},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
        "image_token_index": 90,
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {"text_config": TEXT | SECTIONS, "vision_config": QWEN_VISION},
    "qwen3_vl": {"text_config": TEXT, "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
    },
}


def multimodal(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **MULTIMODAL[family])
    model = AutoModelForImageTextToText.from_config(config, **EAGER).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.dim() == 1))
    return model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_models_are_saved_whole(family, plan, tmp_path):
    model = multimodal(family)
    ids = IDS.clamp(3, 80)
    inputs = {"input_ids": ids}
    if family == "gemma3":
        inputs["input_ids"] = torch.cat([torch.full((2, 4), 90), ids], 1)
        inputs["token_type_ids"] = (inputs["input_ids"] == 90).long()
        inputs["pixel_values"] = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        dense = model(**inputs).logits
        apply_plan(model, PLANS[plan])
        expected = model(**inputs).logits
    assert (expected - dense).abs().max() > 1e-3
    save_model(model, TOKENIZER, tmp_path / "m")
    model.save_pretrained(tmp_path / "by transformers")
    for path in (tmp_path / "m", tmp_path / "by transformers"):
        ours = load_weights(path, **EAGER)
        theirs = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, **EAGER).eval()
        assert type(ours) is type(model)
        for loaded in (ours, theirs):
            with torch.no_grad():
                torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=0)
            how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
            cached = loaded.generate(input_ids=ids, **how)
            assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **how))
        if plan == "blocks":
            with torch.no_grad():
                stock = type(model).from_pretrained(path, **EAGER)
                torch.testing.assert_close(stock(**inputs).logits, expected, atol=1e-5, rtol=0)
        else:
            with pytest.raises(Exception, match="minus dropped ones"):
                type(model).from_pretrained(path, **EAGER)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_perplexity_of_a_multimodal_model(family):
    model = multimodal(family)
    ids = IDS.clamp(3, 80)
    with torch.no_grad():
        logp = model(input_ids=ids).logits.log_softmax(-1)
    expected = -logp[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert perplexity(model, ids, progress=False)["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)


def test_a_fresh_model_of_a_remote_ones_config_is_whole(tmp_path):
    save_model(apply_plan(tiny("llama"), PLANS["mixed"]), TOKENIZER, tmp_path / "dropped")
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "dropped", trust_remote_code=True, **EAGER)
    for config in (remote.config, transformers.LlamaConfig(**remote.config.to_dict())):
        fresh = transformers.LlamaForCausalLM(config).eval()
        fresh.save_pretrained(tmp_path / "fresh")
        loaded = load_weights(tmp_path / "fresh")
        assert not find_anatomy(loaded).plan
        torch.testing.assert_close(logits(loaded, IDS), logits(fresh, IDS), atol=1e-5, rtol=0)


def test_blocks_dropped_again_from_what_the_stock_class_loaded(tmp_path):
    save_model(apply_plan(tiny("llama"), PLANS["blocks"]), TOKENIZER, tmp_path / "first")
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first", **EAGER)
    fresh = transformers.LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "first", num_hidden_layers=5))
    fresh.save_pretrained(tmp_path / "deeper")
    torch.testing.assert_close(logits(load_weights(tmp_path / "deeper"), IDS), logits(fresh.eval(), IDS))
    apply_plan(stock, DropPlan([0], [0]))
    for write in (lambda path: save_model(stock, TOKENIZER, path), stock.save_pretrained):
        write(tmp_path / "second")
        loaded = load_weights(tmp_path / "second", **EAGER)
        torch.testing.assert_close(logits(loaded, IDS), logits(stock, IDS), atol=1e-5, rtol=0)
        shutil.rmtree(tmp_path / "second")


def test_adapters_do_not_name_the_undropped_model(tmp_path):
    base = save_model(tiny("llama", vocab_size=400), TOKENIZER, tmp_path / "base")
    less = apply_plan(tiny("llama", vocab_size=400), PLANS["mixed"])
    dropped_path = save_model(less, TOKENIZER, tmp_path / "dropped")
    models = [apply_plan(load_model(base, device="cpu")[0], PLANS["mixed"]), load_model(dropped_path, device="cpu")[0]]
    for k, model in enumerate(models):
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, settings).eval()
        expected = logits(adapted, IDS)
        adapted.save_pretrained(tmp_path / f"adapters {k}")
        with pytest.raises(OSError):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"adapters {k}")
        again = PeftModel.from_pretrained(load_model(dropped_path, device="cpu")[0], tmp_path / f"adapters {k}")
        torch.testing.assert_close(logits(again.eval(), IDS), expected, atol=1e-5, rtol=0)


def test_threads_that_save_one_model_wait_for_each_other(tmp_path):
    model = apply_plan(tiny("llama"), PLANS["mixed"])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda k: model.save_pretrained(tmp_path / str(k)), range(12)))
    assert type(model.config) is transformers.LlamaConfig
    for path in tmp_path.iterdir():
        torch.testing.assert_close(logits(load_weights(path, **EAGER), IDS), logits(model, IDS), atol=1e-5, rtol=0)
