"""Scores equal their definition, whatever the batching and padding."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from tiny import FAMILIES, random_ids, tiny
from torch.utils.data import DataLoader

from llmdrop import (
    Calibration,
    DropPlan,
    ImportanceScores,
    dropped,
    perplexity,
    plan_drop,
    score,
    score_distributed,
)
from llmdrop.anatomy import find_anatomy as anatomy
from llmdrop.compress.reconstruction import fit
from llmdrop.compress.search import one_shot, taylor
from llmdrop.compress.shortened_llama import block_taylor
from llmdrop.compress.wanda import wanda
from llmdrop.compress.windows import score_windows
from llmdrop.sublayers import in_float64


def calibration(ids, mask=None):
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


def stored(model, ids):
    """Residual streams before, between and after, and both branches, recorded the plain way: everything is kept."""
    parts, streams = anatomy(model), []
    for i, layer in enumerate(parts.layers):
        seen = {}
        if layer is None:
            streams.append(seen)
            continue
        attn_out, mlp_in, mlp_out = (
            layer.get_submodule(name)
            for name in (
                parts.sublayer("attn", i).writers[0],
                next(iter(parts.sublayer("mlp", i).stubs)),
                parts.sublayer("mlp", i).writers[0],
            )
        )
        layer.register_forward_pre_hook(
            lambda m, a, k, s=seen: s.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        mlp_in.register_forward_pre_hook(lambda m, a, s=seen: s.update(m=a[0]))
        attn_out.register_forward_hook(lambda m, a, o, s=seen: s.update(fa=o[0] if isinstance(o, tuple) else o))
        mlp_out.register_forward_hook(lambda m, a, o, s=seen: s.update(fm=o))
        layer.register_forward_hook(lambda m, a, o, s=seen: s.update(y=o[0] if isinstance(o, tuple) else o))
        streams.append(seen)
    with torch.inference_mode():
        model(ids)
    return [{k: v.double().reshape(*ids.shape, -1) for k, v in s.items() if v.ndim} for s in streams]


def one_minus_cos(a, b):
    return (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_definition(family):
    ids = random_ids(6, 11)
    scores = score(tiny(family), calibration(ids), batch_size=4, gap=True, progress=False)
    bare = score(tiny(family), calibration(ids), with_residual=False, progress=False)
    streams, splits = stored(tiny(family), ids), anatomy(tiny(family)).splits
    for i, s in enumerate(streams):
        m = s["x"] if splits[i].parallel else s["m"]
        assert scores.attn[i] == pytest.approx(one_minus_cos(s["x"], s["x"] + s["fa"]), abs=1e-5)
        assert scores.mlp[i] == pytest.approx(one_minus_cos(m, m + s["fm"]), abs=1e-5)
        assert scores.block[i] == pytest.approx(one_minus_cos(s["x"], s["y"]), abs=1e-5)
        assert bare.attn[i] == pytest.approx(one_minus_cos(s["x"], s["fa"]), abs=1e-5)
        assert bare.mlp[i] == pytest.approx(one_minus_cos(m, s["fm"]), abs=1e-5)
        size = (s["fa"].norm(dim=-1) / (s["x"] + s["fa"]).norm(dim=-1)).mean().item()
        assert scores.magnitude["attn"][i] == pytest.approx(size, abs=1e-5)
        for j in range(i, len(streams)):
            assert scores.gap[i, j] == pytest.approx(one_minus_cos(s["x"], streams[j]["y"]), abs=1e-5)
    assert np.isnan(scores.gap[np.tril_indices(5, -1)]).all()
    np.testing.assert_allclose(np.diag(scores.gap), scores.block, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_padding_do_not_matter(family):
    lengths, ids = [12, 5, 9, 12, 7, 3, 12, 8], random_ids(8, 12)
    alone = [score(tiny(family), calibration(ids[k : k + 1, :n]), progress=False) for k, n in enumerate(lengths)]
    expected = np.average([s.attn for s in alone], axis=0, weights=lengths)
    expected_mlp = np.average([s.mlp for s in alone], axis=0, weights=lengths)
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for k, n in enumerate(lengths):
            where = slice(12 - n, 12) if side == "left" else slice(0, n)
            padded[k, where], mask[k, where] = ids[k, :n], 1
        for batch_size in (1, 3, 8):
            got = score(tiny(family, "sdpa"), calibration(padded, mask), batch_size=batch_size, progress=False)
            np.testing.assert_allclose(got.attn, expected, atol=1e-5)
            np.testing.assert_allclose(got.mlp, expected_mlp, atol=1e-5)
            assert got.n_tokens == sum(lengths)


def test_standard_error_is_that_of_the_sample_means():
    ids = random_ids(7, 16)
    each = [score(tiny("llama"), calibration(ids[k : k + 1]), progress=False).block for k in range(7)]
    stderr = score(tiny("llama"), calibration(ids), batch_size=3, progress=False).stderr["block"]
    np.testing.assert_allclose(stderr, np.std(each, axis=0, ddof=1) / 7**0.5, rtol=1e-3)


def test_dropped_sublayers_score_nan_and_the_others_see_the_dropped_model():
    model, ids, plan = tiny("llama"), random_ids(4, 9), DropPlan([1, 3], [3])
    with dropped(model, plan):
        scores = score(model, calibration(ids), progress=False)
        following = plan_drop(scores, "attn", 2)
    assert np.isnan(scores.attn[[1, 3]]).all() and np.isnan(scores.mlp[3]) and np.isnan(scores.block[3])
    assert np.isfinite(scores.mlp[1]) and np.isfinite(scores.block[1]), "the other half of a block stays live"
    assert not set(following.attn) & {1, 3}
    assert scores.block[1] == pytest.approx(scores.mlp[1], abs=1e-6)  # without its attention a block is its MLP


def test_round_trip_and_clear_errors():
    scores = score(tiny("llama"), calibration(random_ids(2, 8)), gap=True, progress=False)
    again = ImportanceScores.from_json(scores.to_json())
    assert again.to_json() == scores.to_json()
    frame = scores.to_frame()
    assert list(frame.columns) == ["kind", "layer", "score", "stderr", "magnitude"] and len(frame) == 15
    with pytest.raises(ValueError, match="not importance scores"):
        ImportanceScores.from_json("{}")
    with pytest.raises(ValueError, match="batch_size=0"):
        score(tiny("llama"), calibration(random_ids(2, 8)), batch_size=0)


def test_hooks_are_gone_after_an_exception():
    model = tiny("llama")
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 3"):
        score(model, calibration(random_ids(2, 5)), progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_gap_of_a_model_with_dropped_blocks(family):
    model, ids, plan = tiny(family), random_ids(4, 9), DropPlan([0, 2], [0, 2])
    with dropped(model, plan):
        scores = score(model, calibration(ids), gap=True, progress=False)
        streams = stored(model, ids)
    present = [1, 3, 4]
    assert np.isnan(scores.gap[[0, 2]]).all() and np.isnan(scores.gap[:, [0, 2]]).all()
    for at, i in enumerate(present):
        for k in range(at, 3):
            expected = one_minus_cos(streams[i]["x"], streams[present[k]]["y"])
            assert scores.gap[i, present[k]] == pytest.approx(expected, abs=1e-5)
    assert plan_drop(scores, "consecutive", 1).attn[0] in present
    assert plan_drop(scores, "consecutive", 2) == DropPlan([3, 4], [3, 4])
    with pytest.raises(ValueError, match="no 3 blocks in a row"):
        plan_drop(scores, "consecutive", 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind, name", [("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
def test_values_that_are_not_finite_are_refused_by_layer(value, kind, name):
    model = tiny("llama")
    model.model.layers[3].get_submodule(name).weight.data[0, 0] = value
    with pytest.raises(ValueError, match=f"layer 3's {kind} gives values that are not finite.*bfloat16"):
        score(model, calibration(random_ids(4, 9)), batch_size=2, progress=False)
    assert not model.training


def test_float16_overflow_is_refused_and_dropped_layers_are_not():
    model = tiny("llama").half()
    model.model.layers[2].mlp.down_proj.weight.data.fill_(60000)
    with pytest.raises(ValueError, match="layer 2's mlp.*float16 overflows"):
        score(model, calibration(random_ids(2, 9)), progress=False)
    with dropped(model, DropPlan(mlp=[2])):
        assert np.isfinite(score(model, calibration(random_ids(2, 9)), progress=False).mlp[[0, 1, 3, 4]]).all()


def test_scores_compare_and_hash():
    one, same = (score(tiny("llama"), calibration(random_ids(2, 8)), progress=False) for _ in range(2))
    other = score(tiny("llama"), calibration(random_ids(2, 8, seed=1)), progress=False)
    assert one == same and one != other and one != "scores" and len({one, same, other}) == 2
    with dropped(model := tiny("llama"), DropPlan([1])):
        gone = [score(model, calibration(random_ids(2, 8)), progress=False) for _ in range(2)]
    assert gone[0] == gone[1], "NaN of dropped sublayers is no difference"


def test_train_mode_is_put_back_after_an_exception():
    model = tiny("llama").train()
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 3"):
        score(model, calibration(random_ids(2, 5)), progress=False)
    assert model.training


def test_threads_that_score_one_model_do_not_mix():
    model = tiny("llama").train()  # each thread sets eval mode and gives back this one
    texts = [Calibration(random_ids(24, 16, seed=seed)) for seed in range(4)]
    expected = [score(model, text, batch_size=2, progress=False) for text in texts]
    stop = threading.Event()

    def run_meanwhile():
        while not stop.is_set():
            model(random_ids(1, 5))

    with ThreadPoolExecutor(len(texts) + 1) as threads:
        running = threads.submit(run_meanwhile)
        jobs = [threads.submit(score, model, text, 2, progress=False) for text in texts]
        scores = [job.result() for job in jobs]
        stop.set()
        running.result()
    assert scores == expected
    assert all(module.training for module in model.modules())


def test_what_a_calibration_can_be_made_of_is_scored():
    ids = random_ids(3, 8)
    expected = score(tiny("llama"), Calibration(ids), progress=False)
    for given in (ids, ids.numpy(), ids.tolist(), {"input_ids": ids}, DataLoader(list(ids), 2)):
        assert score(tiny("llama"), given, progress=False) == expected
    with pytest.raises(TypeError, match="a str is no token ids.*Texts go through llmdrop.load_calibration"):
        score(tiny("llama"), "A text.", progress=False)


READERS = {
    "score": lambda model, ids: score(model, ids, progress=False),
    "perplexity": lambda model, ids: perplexity(model, ids, progress=False),
    "score_distributed": lambda model, ids: score_distributed(model, ids, progress=False),
    "fit": lambda model, ids: fit(model, DropPlan([2]), ids),
    "taylor": taylor,
    "one_shot": one_shot,
    "wanda": lambda model, ids: wanda(model, ids, 0.5),
    "block_taylor": block_taylor,
    "windows": lambda model, ids: score_windows(model, ids, window=2, sinks=1),
}


@pytest.mark.parametrize("reader", sorted(READERS))
def test_what_the_model_cannot_read_is_refused_with_a_sentence(reader):
    read = READERS[reader]
    ids = random_ids(4, 12)
    ids[1, 3] = 97
    with pytest.raises(ValueError, match="token id 97 is beyond the model's vocabulary of 97.*resize_token_embeddings"):
        read(tiny("llama"), ids)
    with pytest.raises(ValueError, match="on the meta device"):
        read(tiny("llama").to("meta"), random_ids(4, 12))
    if reader != "windows":
        with pytest.warns(UserWarning, match="llama model was made for 8: .* use samples of at most 8"):
            read(tiny("llama", max_position_embeddings=8), random_ids(4, 12))  # rotary positions go on
    for family, options in (("gpt2", {"n_positions": 8}), ("opt", {"max_position_embeddings": 8})):
        model = tiny(family, **options)
        with pytest.raises(ValueError, match=f"12 tokens|11 tokens and this {family} model learned 8 positions"):
            read(model, random_ids(4, 12))
        padded = Calibration([[5] * 4, [6] * 8, [7] * 8, [8] * 5])
        read(model, padded)


def test_offloaded_weights_are_no_missing_ones(tmp_path):
    expected = score(tiny("llama"), random_ids(3, 8), progress=False)
    model = tiny("llama")
    places = {name: "cpu" for name, child in model.named_children()}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
    dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert score(model, random_ids(3, 8), progress=False) == expected


def test_float64_where_a_device_has_none():
    class OnMPS:
        device = torch.device("mps")

        def cpu(self):
            return torch.ones(2)

    assert in_float64(OnMPS()).dtype == in_float64(torch.ones(2)).dtype == torch.float64
