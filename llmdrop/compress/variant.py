"""Variant: a model changed in a way that can be undone. What is measured, timed and drawn are variants of one model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from ..plan import DropPlan
from ..prune import dropped
from ..speed.roofline import SpeedLimit, predict_speed
from .four_bits import FourBits
from .healing import Healing
from .reconstruction import Reconstruction, reconstructed
from .wanda import WandaMask
from .windows import Windows


@dataclass(frozen=True, eq=False)
class Variant:
    """A model with sublayers dropped, and what else is done to it. Variant() is the whole model.

    plan: the sublayers that go. reconstruction: what makes up for them in the matrices that stay. windows: attention
    layers that keep a window. mask: single weights set to zero. four_bits: 4-bit weights. healing: a short training
    after the drop. name: what it is called in tables and figures, or None for a label made of its parts.

    Raises ValueError for parts that exclude each other.
    """

    plan: DropPlan = DropPlan()
    reconstruction: Reconstruction | None = None
    windows: Windows | None = None
    mask: WandaMask | None = None
    four_bits: FourBits | None = None
    healing: Healing | None = None
    name: str | None = None

    def __post_init__(self):
        makes_up = self.reconstruction or self.healing
        if self.four_bits and (makes_up or self.mask):
            raise ValueError(
                "4-bit weights cannot be reconstructed, masked or healed here: quantize a model that was saved after it"
            )
        if self.mask and makes_up:
            raise ValueError(
                "reconstruction and healing would fill the zeros of the mask; use either without the other"
            )
        if makes_up and not self.plan:
            raise ValueError("reconstruction and healing make up for dropped sublayers, and this plan drops none")

    @property
    def _parts(self) -> dict:
        """What is done beside dropping, by the name of its field."""
        names = ("reconstruction", "windows", "mask", "four_bits", "healing")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def label(self) -> str:
        """`name`, or the plan's label and those of the other parts: "Attn-8", "Attn-8, 11 windows of 256"."""
        if self.name is not None:
            return self.name
        labels = [part.label for part in self._parts.values()]
        return ", ".join([self.plan.label, *labels] if self.plan or not labels else labels)

    @property
    def key(self) -> dict:
        """What tells it from other variants, as plain JSON; two variants of one key have the same numbers."""
        return self.plan.key | {name: part.key for name, part in self._parts.items()}

    @property
    def shape(self) -> dict:
        """What its speed depends on: how many sublayers of each kind go, windows, and what its weights are."""
        shape: dict = {"attn": len(self.plan.attn), "mlp": len(self.plan.mlp), "blocks": len(self.plan.blocks)}
        if self.windows is not None:
            shape["windows"] = [len(self.windows.layers), self.windows.window, self.windows.sinks]
        return shape | {name: part.key for name, part in self._parts.items() if name in ("mask", "four_bits")}

    @property
    def is_plan_only(self) -> bool:
        """Whether nothing but sublayers going tells it from the whole model: such variants share their measuring."""
        return not self._parts

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` so changed, for the length of a `with` block; restored on every path. Raises what the parts raise.

        A KV cache made inside must not be used outside.
        """
        changes = {}
        if self.reconstruction is not None:  # fitted on the undropped model
            changes = self.reconstruction.changes(model, self.plan)
        with ExitStack() as undo:
            for part in (self.four_bits, self.mask):
                if part is not None:
                    undo.enter_context(part.applied(model))
            if self.healing is not None:
                undo.enter_context(self.healing.applied(model, self.plan, changes))
            elif changes:
                undo.enter_context(reconstructed(model, self.plan, changes))
            elif self.plan:
                undo.enter_context(dropped(model, self.plan))
            if self.windows is not None:
                undo.enter_context(self.windows.applied(model))
            yield model

    def speed_limit(self, model: nn.Module | str, **settings) -> SpeedLimit:
        """`predict_speed` of `model` so changed, with these settings. A mask saves nothing."""
        if self.windows is not None:
            settings |= {"windowed": len(self.windows.layers), "window": self.windows.window + self.windows.sinks}
        if self.four_bits is not None:
            settings |= {"weight_bits": self.four_bits.bits}
        return predict_speed(model, self.plan, **settings)

    def predicted_speedup(self, model: nn.Module | str, **settings) -> float:
        """Over the whole model, by `predict_speed` with these settings."""
        return predict_speed(model, **settings).seconds / self.speed_limit(model, **settings).seconds
