"""A safetensors checkpoint on disk: checked before anything is read, then read tensor by tensor, each byte once.

The safetensors library checks the files. It maps them into memory and does not say where in them a tensor lies; here
bytes are read where they are needed, so that memory stays that of one layer, or copied from file to file unseen.
"""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..anatomy import weights_on_meta
from ..checkpoints.blocks import renumber
from ..checkpoints.load import hub_reason, is_renumbered, locate, stock_class, undropped_config
from ..plan import DropPlan
from ..prune import apply_plan, drop_recorded

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")  # config, index and tokenizer of a hub repository
AGAIN = "Copy or download it again"
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

    def tensor(self, pin_memory: bool = False) -> torch.Tensor:
        """All of it, in memory of its own."""
        flat = torch.empty(self.n_bytes, dtype=torch.uint8, pin_memory=pin_memory)
        self.read(flat)
        return flat.view(DTYPES[self.dtype]).view(self.shape)


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
    weights that do not fit the config, quantized weights and unknown architectures.
    """
    folder = _local(str(name))
    config, record, llm_drop = _config(folder)
    shards = _read_headers(folder)
    entries = {raw: entry for file in shards.values() for raw, entry in file.items()}
    kinds = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        raise ValueError(f"{folder} holds weights of types {', '.join(sorted(kinds))}; expected one of {list(DTYPES)}")
    settings = {"dtype": getattr(torch, dtype) if dtype else DTYPES[kinds.pop()]}
    if attn_implementation:
        settings["attn_implementation"] = attn_implementation
    with weights_on_meta():
        model = AutoModelForCausalLM.from_config(config, **settings).eval()
    model.tie_weights()  # what is tied is one parameter again
    model.name_or_path = str(name)
    if record:
        drop_recorded(model, record)
    before = model.state_dict(keep_vars=True)
    with ExitStack() as undo:
        if record and is_renumbered(record):
            renumber(undo, model)
        in_file = dict(zip(before, model.state_dict(), strict=True))
    if llm_drop:  # files with the undropped model's numbers, with or without the dropped weights
        apply_plan(model, llm_drop)
    names = {}
    for old, new in renamed(before, model).items():
        name = in_file[old]
        bare = name.removeprefix(f"{model.base_model_prefix}.")  # as in a bare decoder's checkpoint
        spellings = [spelling for spelling in (name, bare, FORMER_NAMES.get(name)) if spelling in entries]
        if spellings:
            names[new] = spellings[0]

    parameters = model.state_dict(keep_vars=True)
    there = {id(parameters[name]) for name in names}  # tied ones have two names
    missing = [name for name, parameter in parameters.items() if id(parameter) not in there]
    shapes = {name: (entries[raw].shape, tuple(parameters[name].shape)) for name, raw in names.items()}
    reshaped = [f"{name}: {got}, not {expected}" for name, (got, expected) in shapes.items() if got != expected]
    if missing or reshaped:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: missing {missing[:3]}, of another shape "
            f"{reshaped[:3]} ({len(missing)} and {len(reshaped)} in all). Copy or download config and weights again, "
            "from one revision"
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
    """The checkpoint's directory; a hub repository's config, tokenizer and the weights that are read are downloaded."""
    path, revision = locate(name)
    if os.path.isdir(path):
        return Path(path)
    try:
        folder = _download(path, revision, BESIDE_WEIGHTS)
        # of the same commit; not every *.safetensors: some repositories hold the weights twice (consolidated ones)
        return _download(path, folder.name, _shard_names(folder))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = hub_reason(error) or " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"cannot get {name!r}: {reason} | Allowed: a directory with config.json and safetensors, or a hub id "
            "(optionally @revision) that this machine can reach"
        ) from error


def _download(repo: str, revision: str | None, patterns: Iterable[str]) -> Path:
    folder = snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*")
    return Path(folder)


def _config(folder: Path) -> tuple[PretrainedConfig, dict, DropPlan]:
    """Config of the undropped model; the record of one of our checkpoints; what one of LLM-Drop's has dropped."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise ValueError(f"{folder}/config.json cannot be read: {' '.join(str(error).split())[:300]}") from error
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"{folder} holds quantized weights ({method}); this reads plain ones ({', '.join(DTYPES)})")
    if "model_type" not in raw:
        raise ValueError(f"{folder}/config.json has no model_type; expected the config of a transformers model")
    config, record, llm_drop = undropped_config(raw)
    stock_class(config)
    return config, record, llm_drop


def _shard_names(folder: Path) -> list[str]:
    """The files that hold the weights: those the index lists, or the only one."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return [SINGLE]
    return sorted(set(_index(folder).values()))


def _index(folder: Path) -> dict[str, str]:
    """{tensor: file}."""
    try:
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        if not all(isinstance(file, str) for file in listed.values()):
            raise TypeError("a file's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
    return listed


def _read_headers(folder: Path) -> dict[Path, dict[str, Entry]]:
    """File by file, the tensors in it; files and index must agree."""
    names = _shard_names(folder)
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of its {len(names)} safetensors shards: {absent}. Copy or download them; "
            "pickled weights (.bin) are not read, convert them with save_pretrained"
        )
    shards = {folder / name: _read_header(folder / name) for name in names}
    if names != [SINGLE]:
        homes = {(raw, file.name) for file, entries in shards.items() for raw in entries}
        for raw, name in sorted(homes ^ set(_index(folder).items())):
            raise ValueError(
                f"{folder / INDEX} and its shards disagree on {raw}: it is in {name} by one, where it is not by the "
                f"other. {AGAIN}"
            )
    return shards


def _read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one file by name, in the order in which they lie."""
    try:
        with safe_open(path, "pt"):  # checks that every byte of the file belongs to one tensor
            pass
    except SafetensorError as error:
        what = "is cut short or no safetensors file, or has a damaged header"
        raise ValueError(f"{path} {what}: {error}. {AGAIN}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    real = path.resolve()  # a file of the hub's cache is a link
    entries = {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in value["data_offsets"])
        entries[name] = Entry(real, value["dtype"], tuple(value["shape"]), start, stop)
    return entries
