"""Decoders of every shape: found, scored, dropped exactly, cached; the others refused by name and reason.

All types of the installed transformers are tried by `make families`; these are one of each shape.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from decoders import tiny_decoder
from tiny import random_ids

from llmdrop import Calibration, DropPlan, apply_plan, dropped, find_anatomy, save_model, score
from llmdrop.checkpoints.load import load_weights
from llmdrop.compress.search import greedy
from llmdrop.hooks import ResidualTap

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families  # noqa: E402

SHAPES = [
    "llama",
    "olmo3",  # norms after, windows
    "cohere",  # one norm for both branches, scaled logits
    "phi",  # parallel
    "gptj",
    "falcon",  # adds in place
    "granite",  # scaled branches
    "minicpm3",
    "beam",  # scaled by depth
    "doge",  # scaled by weights
    "gemma4_text",  # a third branch
    "bloom",  # the stream passes through its modules
    "mpt",
    "dbrx",
    "gpt_oss",  # an MLP that returns a tuple
    "llama4_text",
    "mixtral",
    "qwen3_5_text",  # hybrids
    "jamba",
    "falcon_h1",
    "lfm2",
    "nemotron_h",  # one sublayer a layer
    "mamba2",
    "deepseek_v32",  # indexers
    "gpt_neo",
    "smollm3",
]
REFUSED = {
    "gemma3n_text": "several residual streams",
    "deepseek_v4": "several residual streams",
    "hy_v4": "several residual streams",
    "minimax": "normalizes",
    "openai-gpt": "normalizes",
    "xlnet": "normalizes",
    "bert": "normalizes",
    "zaya": "adds a bias",
    "rwkv": "normalizes",
    "roberta-prelayernorm": "looks ahead",
    "hrm_text": "more than once",
    "longcat_flash": "two attentions",
    "inkling_text": "two attentions",
    "inkling2_text": "not added to its input",
    "qwen4_exp_text": "does not add to its input",
    "git": "no layer runs on text alone",
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_decoder_of_each_shape(kind):
    model, ids = tiny_decoder(kind), random_ids(2, 12)
    assert families.check_score(model, ids) == families.YES
    assert families.check_drop(model, ids) == families.YES
    assert families.check_generation(model, ids) == families.YES
    assert families.check_packed(model, ids) in (families.YES, "rows of their own")


@pytest.mark.parametrize("kind", ["llama", "falcon", "bloom", "gpt_oss", "qwen3_5_text", "falcon_h1", "dbrx", "lfm3"])
def test_what_is_saved_is_loaded(kind):
    model, ids = tiny_decoder(kind), random_ids(2, 12)
    assert families.check_save(model, ids) == families.YES


LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "kind, rope",
    [
        ("gemma4_text", None),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": DEFAULT}),
        ("olmo3", {"full_attention": LINEAR, "sliding_attention": DEFAULT}),
        ("llama", LLAMA3),
    ],
)
def test_rotary_settings_are_read_as_they_were(kind, rope):
    model = tiny_decoder(kind, **({} if rope is None else {"rope_parameters": rope}))
    assert rope is None or model.config.rope_parameters == rope
    assert families.check_save(model, random_ids(2, 12)) == families.YES


@pytest.mark.parametrize("kind", ["zamba", "zamba2", "mllama"])
def test_where_a_decoder_asks_its_cache_by_place_generation_with_one_is_refused(kind, tmp_path):
    model, ids = tiny_decoder(kind), random_ids(2, 12)
    assert families.check_drop(model, ids) == families.YES
    assert families.check_generation(model, ids) == "first attention, refused"
    model.generate(ids, max_new_tokens=3)
    if kind != "mllama":  # whose text model alone is no checkpoint
        save_model(apply_plan(model, DropPlan([0])), None, tmp_path / "m")
        loaded = load_weights(tmp_path / "m")
        with pytest.raises(ValueError, match="run it with use_cache=False"):
            loaded.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize("kind, expected", [("llama", "yes"), ("smollm3", "yes"), ("diffllama", "own format")])
def test_without_a_block_it_is_an_ordinary_checkpoint_where_it_can_be(kind, expected):
    assert families.check_block(tiny_decoder(kind), random_ids(2, 12)) == expected


@pytest.mark.parametrize("kind, reason", REFUSED.items())
def test_other_architectures_are_refused_by_name_and_reason(kind, reason):
    with pytest.raises(ValueError, match=f"residual split of this .* model can be proven: .*{reason}"):
        find_anatomy(tiny_decoder(kind))


def test_a_layer_that_stands_in_two_places_is_refused():
    model = tiny_decoder("llama")
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(ValueError, match="layers 2 and 3 are one module"):
        find_anatomy(model)
    copied = copy.deepcopy(model.model.layers[2])
    model.model.layers[3] = copied
    assert find_anatomy(model).live("attn") == [*range(6)]


@pytest.mark.parametrize(
    "kind, blocks",
    [
        ("gemma4_text", [4, 5]),  # settings by the number of the layer
        ("dots3_note", [0]),
        ("olmo_hybrid", [0, 2, 4]),  # its config refuses to have no linear attention
        ("dbrx", [0, 3]),  # depths by other names
        ("gpt_neo", [1]),
        ("nemotron_h", [0]),
    ],
)
def test_without_blocks_what_is_saved_is_what_is_loaded(kind, blocks, tmp_path):
    model, ids = tiny_decoder(kind), random_ids(2, 12)
    apply_plan(model, DropPlan(blocks, blocks))
    save_model(model, None, tmp_path / "m")
    loaded = load_weights(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(families.logits(loaded, ids), families.logits(model, ids), atol=1e-4, rtol=0)
    assert find_anatomy(loaded).plan == find_anatomy(model).plan
    more = DropPlan([2]) if find_anatomy(model).live("attn") != [2] else DropPlan([], [2])
    apply_plan(loaded, more)
    torch.testing.assert_close(
        families.logits(loaded, ids), families.logits(apply_plan(model, more), ids), atol=1e-4, rtol=0
    )


def test_lists_that_are_as_long_as_the_model_by_chance_are_not_cut(tmp_path):
    model, ids = tiny_decoder("mamba2", num_hidden_layers=2), random_ids(2, 12)
    model.config.eos_token_id = [5, 6]
    apply_plan(model, DropPlan([1], [1]))
    save_model(model, None, tmp_path / "m")
    loaded = load_weights(tmp_path / "m", dtype=torch.float32)
    assert list(loaded.config.time_step_limit) == list(model.config.time_step_limit)
    assert loaded.config.eos_token_id == [5, 6]
    torch.testing.assert_close(families.logits(loaded, ids), families.logits(model, ids), atol=1e-5, rtol=0)


def test_the_sum_is_checked_on_the_first_batch_of_every_run():
    model, ids = tiny_decoder("llama"), random_ids(2, 12)
    with ResidualTap(model, lambda *_: None):
        model(ids)
    former = model.model.layers[3].forward
    model.model.layers[3].forward = lambda *args, **kwargs: former(*args, **kwargs) * 1.01
    with pytest.raises(RuntimeError, match="layer 3 .*does not give the sum"), ResidualTap(model, lambda *_: None):
        model(ids)
    with pytest.raises(RuntimeError, match="layer 3"):
        score(model, Calibration(ids, "random"), progress=False)


def test_what_is_proven_is_kept_and_proven_again_where_layers_change(monkeypatch):
    from llmdrop import anatomy

    model = tiny_decoder("llama")
    runs = []
    prove = anatomy.prove
    monkeypatch.setattr(anatomy, "prove", lambda *args: runs.append(1) or prove(*args))
    find_anatomy(model)
    once = len(runs)
    find_anatomy(model)
    with dropped(model, DropPlan([0, 1], [1, 2])):
        find_anatomy(model)
    assert len(runs) == once
    model.model.layers[2].mlp = torch.nn.Sequential(model.model.layers[2].mlp)
    find_anatomy(model)
    assert len(runs) > once


def test_a_model_of_which_every_layer_lost_something_is_proven_by_its_config():
    from llmdrop import anatomy

    model = tiny_decoder("llama")
    expected = find_anatomy(model).splits
    apply_plan(model, DropPlan(range(6), [2]))
    anatomy._PROVEN.clear()
    assert find_anatomy(model).splits == (*expected[:2], None, *expected[3:])


def test_attention_that_reads_what_an_earlier_one_gave_is_refused():
    """By itself such a layer does not run, and so nothing of it can be proven."""
    with pytest.raises(ValueError, match="no residual split of this 'gemma4_text' model can be proven"):
        find_anatomy(tiny_decoder("gemma4_text", num_kv_shared_layers=2))


def test_what_needs_more_than_is_there_is_refused():
    model = tiny_decoder("doge")
    with pytest.raises(ValueError, match="scales the residual stream"):
        from llmdrop.compress.windows import score_windows

        score_windows(model, Calibration(random_ids(2, 24), "random"), window=4, sinks=1)
    with pytest.raises(ValueError, match="parallel"):
        from llmdrop.compress.reconstruction import fit

        fit(tiny_decoder("cohere"), DropPlan([1]), Calibration(random_ids(4, 12), "random"))
    assert len(greedy(tiny_decoder("cohere"), Calibration(random_ids(2, 12), "random"), n=2).order) == 2
