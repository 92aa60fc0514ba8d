"""The proof finds what a layer adds to its input, whatever the layer calls it, and refuses what does not add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny
from torch import nn

from llmdrop import anatomy, find_anatomy, proof
from llmdrop.proof import Gone, NotAdditive, prove, random_copy

WIDTH = 16
SHAPE = torch.Size([1, 8, WIDTH])


class Mixer(nn.Module):
    """Causal: every token reads the mean of those before it."""

    def __init__(self, ahead: bool = False):
        super().__init__()
        self.ahead = ahead
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights = torch.ones(x.shape[1], x.shape[1])
        weights = weights if self.ahead else weights.tril()
        return self.inside(weights / weights.sum(-1, keepdim=True) @ x)


class Layer(nn.Module):
    """A layer made to order: y = carry * (x + attn * mixes(x) + mlp * narrow(...) + beside(...))."""

    def __init__(self, carry=1.0, attn=1.0, mlp=1.0, parallel=False, third=False, in_place=False, n_outputs=0):
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.mixes = Mixer()
        self.second = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        if third:
            self.beside = nn.Linear(WIDTH, WIDTH)
        self.carry = carry
        self.attn = attn
        self.mlp = mlp
        self.parallel = parallel
        self.in_place = in_place
        self.n_outputs = n_outputs

    def forward(self, x):
        mixed = self.mixes(self.first(x))
        m = x if self.parallel else x + self.attn * mixed
        y = self.narrow(torch.tanh(self.wide(self.second(m))))
        if self.in_place:
            y *= self.mlp
            y += x
            y += self.attn * mixed
        else:
            y = x + self.attn * mixed + self.mlp * y
        if hasattr(self, "beside"):
            y = y + self.beside(m)
        y = self.changed(x, self.carry * y)
        return (y, *[None] * (self.n_outputs - 1)) if self.n_outputs else y

    def changed(self, x, y):
        return y


SCALES = st.floats(0.1, 3).map(lambda value: round(value, 3))


@settings(max_examples=40, deadline=None)
@given(SCALES, SCALES, SCALES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_the_sum_of_any_additive_layer_is_found(carry, attn, mlp, parallel, third, in_place, n_outputs):
    layer = Layer(carry, attn, mlp, parallel, third, in_place, n_outputs)
    split = prove(random_copy(layer), ((), {}), SHAPE)
    assert split.carry == pytest.approx(carry, abs=1e-4)
    assert split.attn.writers == ("mixes",)
    assert split.attn.scales == pytest.approx((carry * attn,), abs=1e-3)
    assert split.mlp.writers == (("narrow", "beside") if third else ("narrow",))
    assert split.mlp.scales == pytest.approx((carry * mlp, carry)[: 1 + third], abs=1e-3)
    assert split.parallel == parallel
    assert split.n_outputs == n_outputs
    assert split.overwrites == in_place
    assert set(split.attn.stubs) == {"first", "mixes"}
    assert set(split.mlp.stubs) == {"second", "wide", "narrow", *(["beside"] if third else [])}
    assert split.attn.core == "mixes"


class Normalized(Layer):
    def changed(self, x, y):
        return nn.functional.layer_norm(y, [WIDTH])


class Gated(Layer):
    def changed(self, x, y):
        return x + torch.sigmoid(x) * (y - x)


class Shifted(Layer):
    def changed(self, x, y):
        return y + 1


class Multiplied(Layer):
    def changed(self, x, y):
        return y * (1 + 0.01 * y.mean(-1, keepdim=True))


@pytest.mark.parametrize("kind", [Normalized, Gated, Shifted, Multiplied])
@settings(max_examples=5, deadline=None)
@given(SCALES, st.booleans(), st.booleans())
def test_what_is_no_sum_is_refused(kind, scale, parallel, third):
    with pytest.raises(NotAdditive):
        prove(random_copy(kind(1.0, scale, scale, parallel, third)), ((), {}), SHAPE)


class Twice(Layer):
    """A second attention after the first."""

    def __init__(self):
        super().__init__()
        self.again = Mixer()

    def forward(self, x):
        y = super().forward(x)
        return y + self.again(y)


class Reversed(Layer):
    def forward(self, x):
        m = x + self.narrow(torch.tanh(self.wide(self.second(x))))
        return m + self.mixes(self.first(m))


class Idle(Layer):
    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(WIDTH, WIDTH)


def looking_ahead() -> Layer:
    layer = Layer()
    layer.mixes = Mixer(ahead=True)
    return layer


@pytest.mark.parametrize(
    "make, message",
    [
        (Twice, "two attentions, one after the other: mixes and again"),
        (Reversed, "its MLP .narrow. runs before its attention .mixes."),
        (Idle, "it has adapter besides, which did not run"),
        (looking_ahead, "looks ahead"),
    ],
)
def test_layers_of_other_kinds_are_refused_by_what_they_are(make, message):
    with pytest.raises(NotAdditive, match=message):
        prove(random_copy(make()), ((), {}), SHAPE)


def test_one_sublayer_alone_is_a_layer():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.mixer = Mixer()

        def forward(self, x):
            return x + self.mixer(self.norm(x))

    split = prove(random_copy(Alone()), ((), {}), SHAPE)
    assert split.mlp is None
    assert split.attn.writers == ("mixer",)
    assert split.attn.matrix == "mixer.inside"


def test_a_copy_leaves_the_layer_as_it_is_and_reads_no_weight():
    layer = Layer()
    calls = []
    layer.mixes.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer.narrow.weight.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    on_meta = Layer().to("meta")
    for source in (layer, on_meta, Layer().bfloat16()):
        copied = random_copy(source)
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in copied.parameters())
        assert prove(copied, ((), {}), SHAPE).mlp.writers == ("narrow",)
    assert not calls, "hooks are not copied"
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True)


@pytest.mark.parametrize("n_outputs", [0, 2, 3])
def test_what_stands_for_a_module_returns_what_it_returned(n_outputs):
    x = torch.randn(2, 3, WIDTH)
    for passes, expected in ((None, torch.zeros(2, 3, 4)), (0, x), (1, x + 1), ("residual", x + 2)):
        gone = Gone(nn.LayerNorm(WIDTH, dtype=torch.bfloat16), passes, 4, n_outputs)
        out = gone(x, x + 1, residual=x + 2)
        assert (len(out) if n_outputs else 0) == n_outputs
        assert torch.equal(out[0] if n_outputs else out, expected)
        assert gone.weight.dtype == torch.bfloat16
        assert not list(gone.parameters())
        assert not gone.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_proving_leaves_the_model_alone(family):
    """Copies run with eager attention; the model's own settings stay."""
    model = tiny(family, "sdpa")
    implementation = model.config._attn_implementation
    before = model.config.to_dict()
    find_anatomy(model)
    assert model.config.to_dict() == before
    for module in model.modules():
        if "config" in vars(module):
            assert module.config._attn_implementation == implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_large_matrices_are_proven_by_quick_ones(family, monkeypatch):
    expected = find_anatomy(tiny(family)).splits
    anatomy._OF_CONFIG.clear()
    monkeypatch.setattr(proof, "LARGE", 0)
    assert find_anatomy(tiny(family)).splits == expected
    anatomy._OF_CONFIG.clear()
