"""4-bit weights for a while: `FourBits`, by bitsandbytes (NF4, FP4) or by AWQ, whichever library is installed."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calibration import Calibration
from ..checkpoints import four_bits
from ..prune import put
from . import awq
from .reconstruction import put_weights

VERSION = 1  # of the rounded weights: raised when others come out
LIBRARIES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "awq": "llmcompressor"}  # by algorithm


@dataclass(frozen=True)
class FourBits:
    """4-bit weights in the matrices of the decoder layers.

    algorithm: a key of LIBRARIES; "awq" needs calibration and tokenizer. group_size, exact, unpacked: of
    `checkpoints.four_bits.quantized`; AWQ's weights are always unpacked.
    """

    algorithm: str = "nf4"
    group_size: int = 64
    exact: bool = True
    unpacked: bool = False
    calibration: Calibration | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        available([self.algorithm])  # raises for an unknown one
        if self.algorithm == "awq" and (self.calibration is None or self.tokenizer is None):
            raise ValueError("AWQ chooses its scales on text: give calibration= and tokenizer=")

    @property
    def label(self) -> str:
        return f"{self.algorithm.upper()}, groups of {self.group_size}"

    @property
    def bits(self) -> float:
        """Bits a weight, packed, with what stands beside each group: a scale (float32), or (AWQ) 16 + 4 bits."""
        beside = 20 if self.algorithm == "awq" else 32
        return 4 + beside / self.group_size

    @property
    def key(self) -> dict:
        """What tells it from others, as plain JSON."""
        is_awq = self.algorithm == "awq"
        return {
            "algorithm": self.algorithm,
            "group_size": self.group_size,
            "exact": self.exact,
            "unpacked": self.unpacked or is_awq,
            "text": self.calibration.digest if is_awq else None,
            "library": library(self.algorithm),
            "version": VERSION,
        }

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model`, undropped, with 4-bit weights for the length of a `with` block.

        AWQ's are made once, and kept as a checkpoint. Raises ImportError without the library, and ValueError for a
        model that cannot be quantized.
        """
        with ExitStack() as undo:
            if self.algorithm == "awq":
                rounded = awq.awq_once(model, self.tokenizer, self.calibration, self.group_size)
                put_weights(undo, model, rounded)
                put(undo, model.config, "quantized_by", rounded.config.quantized_by)
            else:
                settings = (self.algorithm, self.group_size, self.exact, self.unpacked)
                undo.enter_context(four_bits.quantized(model, *settings))
            yield model


def available(algorithms: Iterable[str]) -> list[str]:
    """Those of the algorithms whose library is installed. Raises ValueError for one that is unknown."""
    algorithms = list(algorithms)
    unknown = sorted(set(algorithms) - set(LIBRARIES))
    if unknown:
        raise ValueError(f"algorithm {', '.join(unknown)} is not one of {', '.join(LIBRARIES)}")
    return [name for name in algorithms if find_spec(LIBRARIES[name])]


def library(algorithm: str) -> str:
    """What quantizes by this algorithm, with its version, or the line that installs it."""
    available([algorithm])
    name = LIBRARIES[algorithm]
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        install = awq.INSTALL if algorithm == "awq" else four_bits.INSTALL
        return f"{name}, which is missing (`{install}`)"
