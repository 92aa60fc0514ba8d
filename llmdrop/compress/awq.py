"""AWQ (Lin et al. 2024), by which the paper rounds weights to 4 bits, with llm-compressor.

llm-compressor wants another transformers than the rest of llmdrop is tested with, so it lives in an environment of its
own; there this gives what accuracy and perplexity need, the rounded weights unpacked.
"""

import copy
import hashlib
import json
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..anatomy import find_anatomy
from ..calibration import Calibration
from ..checkpoints.digest import weights_digest
from ..checkpoints.load import load_model
from ..checkpoints.save import save_model
from ..files import build_dir

INSTALL = "pip install llmcompressor==0.14.0.1 transformers==5.17.0 'huggingface-hub<2'"


def awq(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    group_size: int = 128,
    batch_size: int = 8,
) -> nn.Module:
    """Round the matrices of the decoder layers by AWQ, in place, and return the model with plain matrices.

    model: undropped; quantize first, drop afterwards. calibration: of equal lengths; AWQ's authors take 128 x 512
    tokens. group_size: weights to a scale and a zero point, 128 in the paper of AWQ. Takes about ten forward passes
    over the text for every matrix. Raises ImportError without llm-compressor, ValueError for a dropped model or a
    group size that does not divide the width of every matrix.
    """
    _check_installed()
    parts = find_anatomy(model)
    if parts.plan:
        raise ValueError(f"AWQ needs all layers, and {parts.plan.label} is dropped; quantize first, drop afterwards")
    matrices = [module for layer in parts.layers for module in layer.modules() if type(module) is nn.Linear]
    widths = sorted({matrix.in_features for matrix in matrices})
    if group_size < 1 or any(width % group_size for width in widths):
        raise ValueError(f"groups of {group_size} weights do not divide this model's matrices of widths {widths}")
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *args: None  # 0.14.0.1 pins memory for a GPU, also without one
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    inside = [name for name, module in linears.items() if module in matrices]
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    groups = {"4 bits": {"targets": ["Linear"], "weights": weights}}
    rounding = QuantizationModifier(config_groups=groups, ignore=[name for name in linears if name not in inside])
    former = model.config._name_or_path
    with tempfile.TemporaryDirectory() as folder:  # it looks for a config where the model came from
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader([{"input_ids": ids} for ids in calibration.input_ids], batch_size=batch_size),
            recipe=[AWQModifier(), rounding],
            num_calibration_samples=calibration.n_samples,
            pipeline="sequential",
        )
    remove_dispatch(model)  # with a GPU, it leaves the weights in main memory behind hooks
    model.config._name_or_path = former
    vars(model).pop("save_pretrained", None)  # its own would look for packed weights
    for name in inside:
        module = model.get_submodule(name)
        scheme = module.quantization_scheme.weights
        rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme)
        with torch.device("meta"):
            new = nn.Linear(module.in_features, module.out_features, False)
        new.weight = nn.Parameter(rounded.detach(), requires_grad=False)
        new.bias = module.bias
        model.set_submodule(name, new)
    vars(model.config).pop("quantization_config", None)
    model.config.quantized_by = f"llmcompressor {version('llmcompressor')}, awq, groups of {group_size}"
    return model.eval()


def awq_once(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, group_size: int = 128
) -> nn.Module:
    """What `awq` makes of a copy of `model`, kept as a checkpoint under `build_dir()/models` and read from there."""
    _check_installed()
    dtype = str(model.dtype).removeprefix("torch.")
    key = [weights_digest(model), dtype, calibration.digest, group_size, version("llmcompressor")]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = build_dir() / "models" / f"awq-{digest}"
    if not folder.exists():
        rounded = awq(copy.deepcopy(model), tokenizer, calibration, group_size)
        save_model(rounded, tokenizer, folder)
    return load_model(folder, dtype, str(model.device))[0]


def _check_installed() -> None:
    if not find_spec("llmcompressor"):
        raise ImportError(f"AWQ needs llm-compressor, in an environment of its own: `{INSTALL}`")
