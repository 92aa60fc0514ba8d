"""A safetensors checkpoint on disk: checked before anything is read, then read tensor by tensor, each byte once.

The safetensors library maps files into memory and does not say where in them a tensor lies. Here bytes are read into
buffers that are used again, so that memory stays that of one layer, or copied from file to file unseen.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .models import _locate, _stock_class, saved_record
from .plan import DropPlan
from .prune import apply_plan, drop_recorded

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX's files keep what transformers 4 called it


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, stop) of a file. dtype: as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start

    def read(self, out: torch.Tensor, offset: int = 0) -> None:
        """Fill the uint8 tensor `out` with this tensor's bytes from `offset` on. OSError where the file ends early."""
        view = memoryview(out.numpy())
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + offset)
            while view:
                n = file.readinto(view)  # at most 2 GiB at a time
                if not n:
                    raise OSError(f"{self.file} became shorter while it was being read")
                view = view[n:]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are whole and fit its config; no weight of it is in memory.

    model: parameters on "meta", buffers real, in eval mode, without what the checkpoint has dropped. names: of each
    name in the model's state dict the one in the files (of tied tensors one may do for both). shards: file by file, in
    order, the tensors in it by their names there.
    """

    folder: Path
    model: nn.Module
    names: dict[str, str]
    shards: dict[Path, dict[str, Entry]]

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name in the model's state dict."""
        raw = self.names[name]
        return next(entries[raw] for entries in self.shards.values() if raw in entries)


def open_checkpoint(
    name: str | os.PathLike, dtype: str | None = None, attn_implementation: str | None = None
) -> Checkpoint:
    """Check a checkpoint's files without reading a weight. name: as in `load_model`; hub models are downloaded first.

    dtype: of the model, None for the checkpoint's own. Raises FileNotFoundError for what is not there, also a shard
    that the index names; ValueError for files that are cut short or damaged, an index that its shards contradict,
    weights that do not fit the config, quantised weights and unknown architectures.
    """
    folder = _local(str(name))
    config, record, theirs = _config(folder)
    shards = _read_headers(folder)
    entries = {raw: entry for file in shards.values() for raw, entry in file.items()}
    kinds = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        raise ValueError(f"{folder} holds weights of types {', '.join(sorted(kinds))}; expected one of {list(DTYPES)}")
    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    settings["dtype"] = getattr(torch, dtype) if dtype else DTYPES[kinds.pop()]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **settings).eval()
    model.tie_weights()  # what is tied is one parameter again
    model.name_or_path = str(name)
    if record:
        drop_recorded(model, record)
    before = model.state_dict(keep_vars=True)
    if theirs:  # files with the undropped model's numbers, with or without the dropped weights
        apply_plan(model, theirs)
    prefix, names = f"{model.base_model_prefix}.", {}
    for old, new in renamed(before, model).items():
        spellings = old, old.removeprefix(prefix), FORMER_NAMES.get(old)  # a bare decoder's checkpoint has no prefix
        raw = next((spelling for spelling in spellings if spelling in entries), None)
        if raw:
            names[new] = raw
    after = model.state_dict(keep_vars=True)
    there = {id(after[new]) for new in names}
    missing = [new for new, parameter in after.items() if id(parameter) not in there]
    other = [f"{n}: {entries[r].shape}, not {tuple(after[n].shape)}" for n, r in names.items()
             if entries[r].shape != tuple(after[n].shape)]  # fmt: skip
    if missing or other:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: missing {missing[:3]}, of another shape {other[:3]} "
            f"({len(missing)} and {len(other)} in all). Copy or download config and weights again, from one revision"
        )
    return Checkpoint(folder, model, names, shards)


def renamed(before: dict[str, torch.Tensor], model: nn.Module) -> dict[str, str]:
    """{old name: new name} of the parameters that are left, after `model` had layers dropped or renumbered in place.

    before: its state_dict(keep_vars=True) from then; parameters are known by being the same objects.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), []).append(name)  # tied ones have two
    return {old: names[id(parameter)].pop(0) for old, parameter in before.items() if names.get(id(parameter))}


def _local(name: str) -> Path:
    path, revision = _locate(name)
    if os.path.isdir(path):
        return Path(path)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise FileNotFoundError(
            f"cannot get {name!r}: {' '.join(str(error).split())[:300]} | Allowed: a directory with config.json and "
            "safetensors, or a hub id (optionally @revision) that this machine can reach"
        ) from error


def _config(folder: Path) -> tuple[PretrainedConfig, dict, DropPlan]:
    """Config of the undropped model; the record of one of our checkpoints; what one of LLM-Drop's has dropped."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise ValueError(f"{folder}/config.json cannot be read: {' '.join(str(error).split())[:300]}") from error
    raw.pop("auto_map", None)  # remote code never runs
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"{folder} holds quantised weights ({method}); this reads plain ones ({', '.join(DTYPES)})")
    record = saved_record(raw, folder)
    if "model_type" not in raw:
        raise ValueError(f"{folder}/config.json has no model_type; expected the config of a transformers model")
    config = AutoConfig.for_model(**raw | record.get("undropped", {}))
    _stock_class(config)
    if "undropped" in record:
        config.llmdrop = None
        return config, record, DropPlan()
    return config, {}, DropPlan.from_llm_drop(raw, getattr(config, "num_hidden_layers", None))


def _read_headers(folder: Path) -> dict[Path, dict[str, Entry]]:
    index, single, damaged = folder / INDEX, folder / "model.safetensors", "Copy or download it again"
    if single.exists():
        return {single: _read_header(single)}
    if not index.exists():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {INDEX}; pickled weights (.bin) are not read, convert them "
            "with save_pretrained"
        )
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = {name: folder / name for name in sorted(set(listed.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}). {damaged}") from error
    if absent := [name for name, file in files.items() if not file.exists()]:
        raise FileNotFoundError(f"{folder} lacks {len(absent)} of {len(files)} shards that its index lists: {absent}")
    shards = {file: _read_header(file) for file in files.values()}
    if wrong := [raw for raw, name in listed.items() if raw not in shards[files[name]]]:
        raise ValueError(f"{index} says {wrong[0]} is in {listed[wrong[0]]}, where it is not. {damaged}")
    homes = [(raw, file.name) for file, entries in shards.items() for raw in entries]
    if wrong := [(raw, name) for raw, name in homes if listed.get(raw) != name]:
        raise ValueError(f"{wrong[0][1]} holds {wrong[0][0]}, which {INDEX} has elsewhere or not at all. {damaged}")
    return shards


def _read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one file by name, in the order in which they lie; every byte of the file must be accounted for."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"{path} is cut short or no safetensors file ({size} bytes). Copy or download it again")
        text = file.read(length)
    real = path.resolve()  # a file of the hub's cache is a link
    try:
        header = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        begin, entries = 8 + length, {}
        for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = value["data_offsets"]
            width = DTYPES[value["dtype"]].itemsize if value["dtype"] in DTYPES else None
            expected = last - first if width is None else math.prod(value["shape"]) * width
            if begin != 8 + length + first or expected != last - first:
                raise ValueError(f"{name} is not where its shape says")
            begin += last - first
            entries[name] = Entry(real, value["dtype"], tuple(value["shape"]), begin - (last - first), begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header ({error}). Copy or download it again") from error
    if begin != size:
        raise ValueError(f"{path} is {'cut short' if size < begin else 'too long'}: {size} bytes instead of {begin}. "
                         "Copy or download it again")  # fmt: skip
    return entries
