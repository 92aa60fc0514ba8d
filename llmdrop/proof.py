"""Prove where attention and MLP sit in a decoder layer, by perturbing it.

A layer is *additive* if what it gives is its input and what some of its modules, the *writers*, add to it:

    y = c * x + sum over writers w of s_w * w        x, y, w: [B, T, C]; c, s_w: a number, or one per channel

Nothing is taken from names. A copy of the layer with random weights, in float32, is run with arguments as the decoder
gives them. A module is a writer if moving its output by d moves y by s_w * d, with the writers already found held at
what they gave; with all of them held, moving x by d must move y by c * d; then the sum must be y, to float32, and again
on a fresh input. A writer that reacts to other tokens is attention (a token mixer), any other is MLP. Modules that feed
writers of one kind only belong to that sublayer; those that feed both (a norm that attention and MLP share) stay.
"""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

TOLERANCE = 2e-6  # of the sum, in units of its largest term
REACTION = 1e-4  # a module reacts to what moves its output by more than so much of it
N_TOKENS = 8
LARGE = 2**22  # numbers in a matrix beyond which a copy has one that is quick to multiply
TOUCHED = 3  # the token that is moved to see who looks at others

Call = tuple[tuple, dict]  # args and kwargs, besides the residual stream, with which the decoder calls a layer


class NotAdditive(ValueError):
    """A layer has no residual split that can be proven; says why."""


@dataclass(frozen=True)
class Stub:
    """What stands for a module that is gone: it gives zeros, or hands on one of its arguments.

    passes: the argument's place or name, or None for zeros. width: of the zeros, for each token of the first argument.
    n_outputs: 0 for a tensor, else the length of the tuple that the module returns, of which the first is the tensor.
    """

    passes: int | str | None
    width: int
    n_outputs: int


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of a layer: names are of modules in the layer.

    writers: whose outputs are added to the residual stream, in the order they run. scales: what each is multiplied by,
    or None where that depends on weights. stubs: what takes the place of each module when the sublayer is dropped.
    core: the module that mixes tokens and owns the KV cache, or the first writer of an MLP. matrix: the matrix that the
    only writer ends with, or None.
    """

    writers: tuple[str, ...]
    scales: tuple[float, ...] | None
    stubs: dict[str, Stub]
    core: str
    matrix: str | None


@dataclass(frozen=True)
class Split:
    """The proven sum of a layer. carry: what x is multiplied by, or None where that depends on weights.

    attn, mlp: None where the layer has no such sublayer. parallel: attention and MLP read the same x. n_outputs: 0
    where the layer returns the stream, else the length of the tuple that it is the first of. overwrites: whether the
    layer writes into x or into what its modules gave.
    """

    attn: Sublayer | None
    mlp: Sublayer | None
    carry: float | None
    parallel: bool
    n_outputs: int
    overwrites: bool

    def in_common_with(self, other: "Split") -> "Split":
        """What does not depend on weights or depth, from the splits of two layers of one kind.

        Raises NotAdditive where more than that differs.
        """
        parts = {}
        for kind in ("attn", "mlp"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if mine and theirs and mine.scales != theirs.scales:
                mine, theirs = replace(mine, scales=None), replace(theirs, scales=None)
            if mine != theirs:
                raise NotAdditive("layers of its kind differ in what their attention and MLP are made of")
            parts[kind] = mine
        return replace(self, carry=self.carry if self.carry == other.carry else None, **parts)

    @property
    def writers(self) -> tuple[str, ...]:
        return tuple(name for sublayer in (self.attn, self.mlp) if sublayer for name in sublayer.writers)


def first_tensor(value) -> torch.Tensor | None:
    """The tensor, or the first of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def with_first(value, tensor: torch.Tensor):
    """A module's output with another tensor in the first place."""
    return type(value)([tensor, *value[1:]]) if isinstance(value, tuple | list) else tensor


# ---- copies with random weights


def random_copy(module: nn.Module, replaced: dict[nn.Module, nn.Module] | None = None, seed: int = 0) -> nn.Module:
    """A copy on the CPU, in float32, without hooks, whose weights are random, whatever holds them in the module.

    Weights of a shape share their numbers, and of many matrices in one tensor there is one: the copy of a layer with
    hundreds of experts is small. replaced: modules that others take the place of, in the copy.
    """
    generator = torch.Generator().manual_seed(seed)
    memo: dict = {id(old): new for old, new in (replaced or {}).items()}
    inside = {id(m) for old in replaced or () for m in old.modules()}
    made: dict[tuple, torch.Tensor] = {}
    alive = []  # what the memo goes by must not be freed

    def weight(name: str, shape: torch.Size) -> nn.Parameter:
        key = (name if len(shape) < 2 else "", shape)
        if key not in made:
            is_large = shape.numel() > 2**24
            own = shape[-2:] if is_large else shape  # of experts, one
            numbers = torch.randn(own, generator=generator)
            if len(own) > 1:
                numbers *= 0.6 / own[-1] ** 0.5
            else:
                numbers = 0.1 * numbers + (0.0 if "bias" in name else 1.0)
            made[key] = numbers.expand(shape)
        return nn.Parameter(made[key], requires_grad=False)

    for part in module.modules():
        if id(part) in inside:
            continue
        for name, value in vars(part).items():
            if "hook" in name and isinstance(value, dict) and id(value) not in memo:
                memo[id(value)] = type(value)()
        for name in ("forward", "_hf_hook", "_old_forward"):  # accelerate's
            if name in vars(part):
                memo[id(vars(part)[name])] = None
        if isinstance(part, nn.Embedding):  # every token alike: the table of a large vocabulary is one row
            row = torch.randn(1, part.embedding_dim, generator=generator)
            memo[id(part.weight)] = nn.Parameter(row.expand(part.num_embeddings, -1), requires_grad=False)
        if hasattr(part, "in_features") and not _is_plain(part):
            memo[id(part)] = _plain(part, weight)
            continue
        if type(part) is nn.Linear and part.weight.numel() > LARGE:
            memo[id(part)] = _Folded(part, generator)
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in memo:  # an embedding's table is
                memo[id(parameter)] = weight(name, parameter.shape)
        for buffer in part.buffers(recurse=False):
            memo[id(buffer)] = _buffer(buffer, generator)
            alive.append(buffer)
    new = copy.deepcopy(module, memo)
    for part in new.modules():
        for name in ("forward", "_hf_hook", "_old_forward"):
            vars(part).pop(name, None)
        config = vars(part).get("config")  # not that of a layer behind a probe
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(config, name, None) is not None:
                setattr(config, name, "eager")
    return new.eval()


class _Folded(nn.Linear):
    """A random matrix as large as another, but quick to multiply: what it reads is folded, what it gives repeated."""

    def __init__(self, large: nn.Linear, generator: torch.Generator):
        super().__init__(large.in_features, large.out_features, bias=False, device="meta")
        self.fold = math.gcd(large.in_features, 256)
        self.small = torch.randn(self.fold, self.fold, generator=generator) * 0.6 / large.in_features**0.5
        self.signs = torch.randn(large.in_features, generator=generator).sign()
        self.sizes = 0.5 + torch.rand(large.out_features, generator=generator)
        self.shift = None if large.bias is None else 0.1 * torch.randn(large.out_features, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folded = (x * self.signs).unflatten(-1, (-1, self.fold)).sum(-2) @ self.small
        times = -(-self.out_features // self.fold)
        y = folded.repeat(*[1] * (x.ndim - 1), times)[..., : self.out_features] * self.sizes
        return y if self.shift is None else y + self.shift


def _is_plain(matrix: nn.Module) -> bool:
    weight = getattr(matrix, "weight", None)
    return weight is not None and weight.is_floating_point() and weight.ndim == 2


def _plain(matrix: nn.Module, weight: Callable) -> nn.Linear:
    """A linear layer for one whose weights are packed."""
    new = nn.Linear(1, 1)
    new.in_features, new.out_features = matrix.in_features, matrix.out_features
    new.weight = weight("weight", torch.Size([matrix.out_features, matrix.in_features]))
    new.bias = None if getattr(matrix, "bias", None) is None else weight("bias", matrix.bias.shape)
    return new


def _buffer(buffer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A buffer on the CPU; numbers are moved a little, so that what depends on them shows."""
    if buffer.is_meta:
        buffer = torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")
    if not buffer.is_floating_point():
        return buffer.cpu().clone()
    return buffer.float().cpu() * (1 + 0.2 * torch.rand(buffer.shape, generator=generator))


# ---- the proof


@dataclass
class _Run:
    """What one run of the layer gave: y, [B, T, C], and of each module watched its calls' first tensors."""

    y: torch.Tensor
    n_outputs: int
    gave: dict[str, list] = field(default_factory=dict)  # what it computes, whatever is put in its place
    read: dict[str, list] = field(default_factory=dict)  # its first argument
    calls: dict[str, tuple] = field(default_factory=dict)  # args, kwargs and output of its last call
    overwrites: bool = False  # whether the layer writes into its input or into what a module gave


class _Layer:
    """A layer to run again and again with outputs of modules held or moved. x: [1, T, C]."""

    def __init__(self, layer: nn.Module, call: Call):
        self.layer = layer
        self.call = call
        self.names: list[str] = []
        self._look_into("")

    def _look_into(self, name: str) -> None:
        for child, module in self.layer.get_submodule(name).named_children():
            path = f"{name}.{child}".lstrip(".")
            if isinstance(module, nn.ModuleList | nn.ModuleDict):  # does not run itself
                self._look_into(path)
            elif not isinstance(module, nn.Dropout):  # does nothing here
                self.names.append(path)

    def descend(self, name: str) -> bool:
        """Watch the children of a module in its place. False where it has none."""
        self.names.remove(name)
        self._look_into(name)
        return any(True for _ in self.layer.get_submodule(name).children())

    def run(
        self,
        x: torch.Tensor,
        held: dict[str, torch.Tensor] | None = None,
        moved: dict[str, torch.Tensor] | None = None,
        shaken: str | None = None,
        also: Iterable[str] = (),
    ) -> _Run:
        """held: outputs that take the place of a module's own. moved: what is added to an output. shaken: a module all
        of whose outputs change. also: other modules to watch."""
        held = held or {}
        moved = moved or {}
        out = _Run(x, 0)
        raw = [x.clone()]  # what the layer may write into, and what it was
        kept = [x]

        def watch(name: str) -> Callable:
            def hook(module, args, kwargs, value):
                tensor = first_tensor(value)
                if tensor is not None:
                    raw.append(tensor)
                    tensor = tensor.clone()
                    kept.append(tensor)
                reads = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
                out.gave.setdefault(name, []).append(tensor)
                out.read.setdefault(name, []).append(None if reads is None else reads.clone())
                if name in held or name in moved:
                    tensor = held.get(name, tensor).clone()
                    value = with_first(value, tensor + moved[name].view_as(tensor) if name in moved else tensor)
                if name == shaken:
                    value = tree_map(_shaken, value)
                out.calls[name] = args, kwargs, value
                return value

            return hook

        args, kwargs = self.call
        with ExitStack() as hooks:
            for name in (*self.names, *also):
                module = self.layer.get_submodule(name)
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
            y = self.layer(raw[0], *_fresh(args), **_fresh(kwargs))
        out.y = first_tensor(y)
        out.n_outputs = len(y) if isinstance(y, tuple | list) else 0
        out.overwrites = not all(torch.equal(a, b) for a, b in zip(raw, kept, strict=True))
        return out


def _shaken(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value + value.abs().mean() * torch.arange(value.numel(), dtype=value.dtype).sin().view_as(value)


def _fresh(values):
    """A copy of a call's arguments: layers may write into them."""
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, values)


def prove(layer: nn.Module, call: Call, shape: torch.Size) -> Split:
    """The split of a layer, of which this is a random copy.

    call: how the decoder calls it; shape: of the stream that it reads, [1, T, C]. Raises NotAdditive, saying why, for a
    layer without a residual split.
    """
    with torch.no_grad():
        return _Proof(layer, call, shape).split()


class _Proof:
    def __init__(self, layer: nn.Module, call: Call, shape: torch.Size):
        self.run = _Layer(layer, call)
        self.generator = torch.Generator().manual_seed(1)
        self.x = self.random(*shape)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def split(self) -> Split:
        run = self.run
        while True:
            writers = self.find_writers()
            delta = self.random(*self.x.shape)
            held = {name: self.base.gave[name][0] for name in writers}
            carry = _factor(run.run(self.x + delta, held).y - self.base.y, delta)
            if carry is None:
                raise NotAdditive("it does not add to its input: with all that is added held still, y is not c * x")
            if carry.abs().max() > 0:
                break
            through = next(iter(reversed(writers)), None)  # the first to run: the stream passes through it
            module = type(run.layer.get_submodule(through)).__name__ if through else None
            if through is None or not run.descend(through):
                where = f"passes through {through} ({module})" if through else "is lost"
                raise NotAdditive(f"the residual sum {where}: the layer normalizes, or adds a bias, after its sum")
        writers = dict(reversed(writers.items()))  # as they run
        self.check_sum(writers, carry)
        return self.sort(writers, carry)

    def find_writers(self) -> dict[str, torch.Tensor]:
        """{name: scale}, the last to run first."""
        self.base = self.run.run(self.x)
        if self.base.y is None or self.base.y.shape != self.x.shape:
            raise NotAdditive("it does not return a residual stream of the shape that it reads")
        if not self.base.y.isfinite().all():
            raise NotAdditive("it gives values that are not finite on random weights")
        self.once = [name for name, values in self.base.gave.items() if len(values) == 1 and values[0] is not None]
        writers: dict[str, torch.Tensor] = {}
        held: dict[str, torch.Tensor] = {}
        for name in reversed(self.once):
            output = self.base.gave[name][0]
            if output.numel() != self.x.numel() or output.shape[-1] != self.x.shape[-1]:
                continue
            delta = self.random(*self.x.shape)
            change = self.run.run(self.x, held, {name: delta}).y - self.base.y
            scale = _factor(change, delta)
            if scale is None:
                module = type(self.run.layer.get_submodule(name)).__name__
                raise NotAdditive(f"what {name} ({module}) gives is not added to its input times a number")
            if scale.abs().max() > 0:
                writers[name] = scale
                held[name] = output
        return writers

    def check_sum(self, writers: dict[str, torch.Tensor], carry: torch.Tensor) -> None:
        for x in (self.x, self.random(*self.x.shape)):
            run = self.run.run(x)
            terms = [carry * x, *(scale * run.gave[name][0].view_as(x) for name, scale in writers.items())]
            largest = max(term.abs().max() for term in terms)
            if (sum(terms) - run.y).abs().max() > TOLERANCE * len(terms) * largest:
                raise NotAdditive(f"its output is not the sum of its input and of {', '.join(writers)}")

    def sort(self, writers: dict[str, torch.Tensor], carry: torch.Tensor) -> Split:
        """Tell attention from MLP, and which modules belong to which."""
        base = self.base
        held = {name: base.gave[name][0] for name in writers}
        delta = torch.zeros_like(self.x)
        delta[:, TOUCHED] = self.random(self.x.shape[-1])
        touched = self.run.run(self.x + delta, held)
        mixes = {name for name in self.once if self.reaction(touched, name)[1]}
        if any(self.reaction(touched, name)[2] for name in writers):
            raise NotAdditive("its attention looks ahead: an encoder, or no causal mask")
        reacts: dict[str, set[str]] = {}  # by writer, those that read it without another in between
        for name in writers:
            run = self.run.run(self.x, held, {name: delta})
            reacts[name] = {other for other in writers if other != name and any(self.reaction(run, other))}
            mixes |= {other for other in reacts[name] if self.reaction(run, other)[1]}
        kind = {name: "attn" if name in mixes else "mlp" for name in writers}
        names = {of: [name for name in writers if kind[name] == of] for of in ("attn", "mlp")}
        for name in names["attn"]:
            after = reacts[name] & set(names["attn"])
            if after:
                raise NotAdditive(f"it has two attentions, one after the other: {name} and {', '.join(sorted(after))}")
        for name in names["mlp"]:
            after = reacts[name] & set(names["attn"])
            if after:
                raise NotAdditive(f"its MLP ({name}) runs before its attention ({', '.join(sorted(after))})")
        sequential = any(reacts[name] & set(names["mlp"]) for name in names["attn"])

        belongs: dict[str, list[str]] = {of: list(of_kind) for of, of_kind in names.items()}
        for name in base.gave:
            if name in writers or base.gave[name][0] is None or name not in self.once:
                continue
            run = self.run.run(self.x, held, shaken=name)
            fed = {kind[writer] for writer in writers if any(self.reaction(run, writer))}
            if len(fed) == 1:
                belongs[fed.pop()].append(name)
        unused = [
            name
            for name in self.run.names
            if name not in base.gave and any(True for _ in self.run.layer.get_submodule(name).parameters())
        ]
        if unused:
            raise NotAdditive(
                f"it has {', '.join(unused)} besides, which did not run; merge adapters and remove wrappers"
            )
        sublayers: dict[str, Sublayer | None] = {"attn": None, "mlp": None}
        for of, of_kind in names.items():
            if not of_kind:
                continue
            scales = [_number(writers[name]) for name in of_kind]
            members = [name for name in base.gave if name in belongs[of]]
            core = of_kind[0]
            if of == "attn":
                core = next((name for name in members if self.reaction(touched, name)[1]), core)
            stubs = self.stubs(members, of_kind)
            sublayers[of] = Sublayer(
                writers=tuple(of_kind),
                scales=None if None in scales else tuple(scales),
                stubs=stubs,
                core=next((name for name in stubs if core.startswith(f"{name}.")), core),
                matrix=self.matrix(of_kind),
            )
        self.check_dropping(sublayers)
        parallel = bool(names["attn"] and names["mlp"] and not sequential)
        return Split(
            **sublayers, carry=_number(carry), parallel=parallel, n_outputs=base.n_outputs, overwrites=base.overwrites
        )

    def reaction(self, run: _Run, name: str) -> tuple[bool, bool, bool]:
        """Whether what a module gives moved at all, at tokens after TOUCHED, and at tokens before it."""
        after, before = run.gave[name][0], self.base.gave[name][0]
        if after is None or not after.is_floating_point() or after.shape != before.shape:
            return False, False, False
        moved = (after - before).abs() > REACTION * before.abs().max()
        by_token = moved.reshape(-1, moved.shape[-1])
        if len(by_token) != self.x.shape[1]:  # with heads or experts in front
            return bool(moved.any()), False, False
        tokens = by_token.any(-1)
        return bool(tokens.any()), bool(tokens[TOUCHED + 1 :].any()), bool(tokens[:TOUCHED].any())

    def stubs(self, members: list[str], writers: list[str]) -> dict[str, Stub]:
        out = {}
        for name in members:
            output = self.base.calls[name][2]
            n_outputs = len(output) if isinstance(output, tuple | list) else 0
            gave, read = self.base.gave[name][0], self.base.read[name][0]
            is_same = read is not None and read.shape == gave.shape
            out[name] = Stub(0 if is_same and name not in writers else None, gave.shape[-1], n_outputs)
        return self.collapsed(out, members, writers)

    def collapsed(self, stubs: dict[str, Stub], members: list[str], writers: list[str]) -> dict[str, Stub]:
        """One stub for a module of which everything is gone but the stream that passes through."""
        parents = {name.rpartition(".")[0] for name in members} - {""}
        for parent in parents:
            inside = [name for name in self.run.names if name.startswith(f"{parent}.")]
            if not {name for name in inside if name in self.base.gave} <= set(members):
                continue
            zeros = {name: torch.zeros_like(self.base.gave[name][0]) for name in writers}
            args, kwargs, output = self.run.run(self.x, zeros, also=[parent]).calls[parent]
            given = [*enumerate(args), *kwargs.items()]
            result = first_tensor(output)
            place = next((k for k, v in given if isinstance(v, torch.Tensor) and torch.equal(v, result)), None)
            if place is None:
                continue
            for name in inside:
                stubs.pop(name, None)
            stubs[parent] = Stub(place, result.shape[-1], len(output) if isinstance(output, tuple | list) else 0)
        return stubs

    def matrix(self, writers: list[str]) -> str | None:
        """The matrix whose output is the only writer's, whatever comes in between."""
        if len(writers) > 1:
            return None
        top = self.run.layer.get_submodule(writers[0])
        inside = [f"{writers[0]}.{name}".rstrip(".") for name, module in top.named_modules() if _is_matrix(module)]
        also = [name for name in inside if name not in self.run.names]
        run = self.run.run(self.x, also=also)
        result = run.gave[writers[0]][0]
        for name in inside:
            outputs = run.gave.get(name, [])
            same = len(outputs) == 1 and outputs[0].numel() == result.numel()
            if same and torch.equal(outputs[0].reshape(-1), result.reshape(-1)):
                return name
        return None

    def check_dropping(self, sublayers: dict[str, Sublayer | None]) -> None:
        """Without each sublayer, the layer must give the sum without its writers."""
        for of, sublayer in sublayers.items():
            if sublayer is None:
                continue
            zeros = {name: torch.zeros_like(self.base.gave[name][0]) for name in sublayer.writers}
            expected = self.run.run(self.x, zeros).y
            former = {name: self.run.layer.get_submodule(name) for name in sublayer.stubs}
            try:
                for name, stub in sublayer.stubs.items():
                    self.run.layer.set_submodule(name, Gone(former[name], stub.passes, stub.width, stub.n_outputs))
                kept, self.run.names = self.run.names, []
                y = self.run.run(self.x).y
            except (RuntimeError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
                raise NotAdditive(f"it does not run without its {of} ({type(error).__name__}: {error})") from error
            finally:
                self.run.names = kept
                for name, module in former.items():
                    self.run.layer.set_submodule(name, module)
            if (y - expected).abs().max() > TOLERANCE * 4 * max(1, expected.abs().max()):
                raise NotAdditive(f"without its {of} it does not give what it gives when that adds nothing")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _factor(change: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | None:
    """f, [C], where change = f * delta at every token; zeros where nothing changed; None where that is not so."""
    if change.abs().max() <= 1e-5 * delta.abs().max():
        return torch.zeros(change.shape[-1])
    factor = (change * delta).flatten(0, -2).sum(0) / (delta * delta).flatten(0, -2).sum(0)
    if (change - factor * delta).abs().max() > 1e-4 * change.abs().max():
        return None
    return factor


def _number(factor: torch.Tensor) -> float | None:
    """The factor where it is one number for all channels."""
    value = float(factor.double().mean())
    if (factor - value).abs().max() > 1e-4 * abs(value):
        return None
    return round(value, 5) if abs(round(value, 5) - value) < 1e-6 else value


def measured_scales(layer: nn.Module, split: Split, x: torch.Tensor, call: Call) -> tuple:
    """(c, scales of the attention's writers, of the MLP's), each [C], of a layer whose weights decide them.

    The layer itself runs on ones and zeros: c is what it gives for x = 1 where nothing is added, s_w what it gives for
    x = 0 where w adds 1. x: [B, T, C], of which the shape and type count.
    """
    args, kwargs = call
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}

    def response(to: str | None) -> torch.Tensor:
        with ExitStack() as hooks:
            for name in split.writers:
                value = 1.0 if name == to else 0.0
                held = partial(_held, value)
                hooks.callback(layer.get_submodule(name).register_forward_hook(held).remove)
            y = layer.forward(torch.full_like(x, 1.0 if to is None else 0.0), *args, **kwargs)
        return first_tensor(y)[0, 0]

    of_kind = [[response(name) for name in part.writers] if part else [] for part in (split.attn, split.mlp)]
    return response(None), *of_kind


def _held(value: float, module: nn.Module, args: tuple, output):
    return with_first(output, torch.full_like(first_tensor(output), value))


# ---- what stands for modules that are gone


class Gone(nn.Module):
    """Stands where a module was: adds nothing to the residual stream, or passes it on. Has no parameters.

    passes, width, n_outputs: as of `Stub`. Plain attributes of the module (is it a sliding layer? which number?) stay,
    for decoders that ask.
    """

    def __init__(self, former: nn.Module, passes: int | str | None, width: int, n_outputs: int):
        super().__init__()
        for name, value in vars(former).items():
            if not name.startswith("_") and isinstance(value, str | int | float | None) and name != "training":
                setattr(self, name, value)
        self.passes = passes
        self.width = width
        self.n_outputs = n_outputs
        self.stands_for = getattr(former, "stands_for", type(former))
        for name, buffer in former.named_buffers(recurse=False):
            if name in former._non_persistent_buffers_set:  # constants, which some models fill by name
                self.register_buffer(name, buffer, persistent=False)
        weight = getattr(former, "weight", None)
        if isinstance(weight, torch.Tensor) and "weight" not in self._buffers:  # some layers ask a norm for its type
            device = "cpu" if weight.is_meta else weight.device
            self.register_buffer("weight", torch.empty(0, dtype=weight.dtype, device=device), persistent=False)

    def forward(self, *args, **kwargs):
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None:
            hidden = next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        if self.passes is None:
            out = hidden.new_zeros(*hidden.shape[:-1], self.width)  # some layers add to it in place
        elif isinstance(self.passes, str):
            out = kwargs[self.passes]
        else:
            out = hidden if self.passes == 0 else args[self.passes]
        return (out, *[None] * (self.n_outputs - 1)) if self.n_outputs else out


def is_gone(module: nn.Module) -> bool:
    """Whether this stands for a module that is gone: a `Gone`, also the one that a checkpoint's own file brings."""
    return hasattr(module, "stands_for")


def has_gone(module: nn.Module) -> bool:
    """Whether anything in this module is gone, or all of it."""
    return any(is_gone(part) for part in module.modules())


# ---- what stands for a layer while it is watched


class StandIn(nn.Module):
    """Stands for a layer in its list for a while: what decoders ask a layer, the layer answers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        vars(self)["layer"] = layer  # not as a child

    def __getattr__(self, name: str):
        return getattr(vars(self)["layer"], name)


def as_output(stream: torch.Tensor, n_outputs: int) -> torch.Tensor | tuple:
    """A residual stream in the form in which a layer gives it; n_outputs: as of `Split`."""
    return (stream, *[None] * (n_outputs - 1)) if n_outputs else stream
