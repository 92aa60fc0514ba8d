"""The digest of a model's weights: every change shows, wherever it is and whatever sums it keeps."""

import copy
import time
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from llmdrop import save_model, weights_digest
from llmdrop.checkpoints.load import load_weights

LARGE = 3 * 2**16 + 5  # rows of the digest's sums, and a part of one


def model_of(**tensors: torch.Tensor):
    """What a digest reads of a model."""
    config = SimpleNamespace(to_dict=lambda: {"model_type": "llama"})
    return SimpleNamespace(config=config, state_dict=lambda keep_vars: tensors)


def test_it_sees_swaps_and_hidden_writes_and_no_names(tmp_path):
    model = tiny("llama")
    digest = weights_digest(model)
    assert (
        weights_digest(tiny("llama"))
        == digest
        == weights_digest(load_weights(save_model(tiny("llama"), None, tmp_path / "m")))
    )
    with torch.no_grad():
        weight = model.model.layers[3].mlp.down_proj.weight
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert weights_digest(model) != digest, "a swap of two weights must show"
    before = weights_digest(model)
    model.model.norm.weight.data[3] += 1
    assert weights_digest(model) != before, "a write that autograd does not see must show"
    assert weights_digest(tiny("llama", seed=1)) != digest != weights_digest(tiny("llama").bfloat16())


@settings(deadline=None, max_examples=200)
@given(
    corner=st.tuples(st.integers(0, LARGE - 1), st.integers(1, 2**17), st.integers(1, 2**17)),
    bit=st.integers(0, 31),
    seed=st.integers(0, 99),
)
def test_changes_that_keep_the_sums_of_rows_and_columns_show(corner, bit, seed):
    """+1 -1 / -1 +1 in the corners of a rectangle of any width and height: such patterns once went unseen."""
    words = torch.randint(-(2**30), 2**30, (LARGE,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    start, width, height = corner
    places = [start, start + width, start + height, start + width + height]
    changed = words.clone()
    for place, sign in zip(places, (1, -1, -1, 1), strict=True):
        changed[place % LARGE] += sign * (1 << bit if bit < 31 else -(2**31))
    if torch.equal(changed, words):  # the corners met
        return
    digests = {weights_digest(model_of(a=value.view(torch.float32))) for value in (words, changed)}
    assert len(digests) == 2


@settings(deadline=None, max_examples=200)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8]),
    length=st.sampled_from([1, 2, 3, 5, 4096, 2**16 - 1, 2**16, 2**17 + 1]),
    data=st.data(),
)
def test_flipped_bits_show_in_every_type_and_length(dtype, length, data):
    tensor = torch.zeros(length, dtype=dtype)
    n_bits = 8 * tensor.nbytes
    flips = data.draw(st.sets(st.integers(0, n_bits - 1), min_size=1, max_size=6))
    changed = tensor.clone()
    for flip in flips:
        changed.view(torch.uint8)[flip // 8] ^= 1 << flip % 8
    assert weights_digest(model_of(a=tensor)) != weights_digest(model_of(a=changed))


def test_pairs_of_sign_flips_show():
    """They keep every sum modulo a power of two."""
    words = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    digests = {weights_digest(model_of(a=words))}
    for first, second in ((0, 1), (0, 2**16), (7, 4096), (LARGE - 2, LARGE - 1)):
        changed = words.clone()
        changed[[first, second]] *= -1
        digests.add(weights_digest(model_of(a=changed)))
    assert len(digests) == 5


def test_names_shapes_types_and_places_count():
    value = torch.arange(6.0)
    models = [
        {"a": value},
        {"b": value},
        {"a": value.view(2, 3)},
        {"a": value.view(torch.int32)},
        {"a": value, "b": value},
    ]
    models += [
        {"a": value[:3], "b": value[3:]},
        {"a": value[3:], "b": value[:3]},
        {"a": torch.cat([value, torch.zeros(1)])},
    ]
    assert len({weights_digest(model_of(**model)) for model in models}) == len(models)
    rows = torch.zeros(2, 2**16)
    rows[0] = torch.randn(2**16)
    assert weights_digest(model_of(a=rows)) != weights_digest(model_of(a=rows.flip(0)))


def test_how_a_tensor_lies_in_memory_does_not_count():
    value = torch.randn(3, 7).bfloat16()
    storage = torch.zeros(22, dtype=torch.bfloat16)
    storage[1:] = value.flatten()
    for same in (value.T.contiguous().T, storage[1:].view(3, 7), value.clone(), torch.nn.Parameter(value)):
        assert weights_digest(model_of(a=same)) == weights_digest(model_of(a=value))


def test_it_is_fast_enough_to_be_taken_again_and_again(smollm2):
    model = smollm2[0]
    weights_digest(model)
    start = time.process_time()
    digest = weights_digest(model)
    assert time.process_time() - start < 2, "a quarter of a second where nothing else runs"
    other = copy.copy(model)
    assert weights_digest(other) == digest
