"""The results store: a measurement is made once, and kept with the facts of how it was made."""

import hashlib
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import scoring
from ..calibration import Calibration
from ..files import build_dir, locked, write_atomic
from ..scoring import ImportanceScores, score
from .provenance import model_key, model_name, provenance, text_name

TIMED = ("timing", "serving", "hardware")  # kinds that the clock decides: made alone, with nothing measured beside them
_MEASURING: set[Path] = set()  # roots of the stores for which this process is measuring something


@dataclass(frozen=True)
class Entry:
    """A measurement to look up: the key, all that could change its value, and a slug for people."""

    key: dict
    slug: str = ""

    @property
    def text(self) -> str:
        """The key in one canonical spelling. Raises TypeError where JSON cannot write it."""
        return _json(self.key, "key")

    @property
    def digest(self) -> str:
        """Under which the value is found."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", self.slug).strip("-")[:100]
        return f"{slug}-{self.digest}.json" if slug else f"{self.digest}.json"


class Store:
    """Measurements as JSON files, `<root>/<kind>/<slug>-<digest>.json`; root defaults to `build_dir()/results`.

    A file holds the key (all that could change the value, hence its name), the value, the provenance and a checksum.
    It is complete or absent, also after SIGKILL or on a full disk, and processes that want the same measurement at
    the same time make it once. What the clock decides (`TIMED`) waits until no process on this machine measures
    anything else for the same store, and others wait for it. A damaged file is set aside as `*.damaged`, with a
    warning, and measured again.
    """

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root) if root is not None else build_dir() / "results"

    def get(
        self,
        kind: str,
        key: dict,
        compute: Callable[[], object],
        slug: str = "",
        facts: Callable[[], dict] = provenance,
    ) -> Any:
        """The stored value for this key, or compute() now, stored; always as JSON gives it back (lists, not tuples).

        kind: the folder. key: anything JSON can write; the order of its entries does not matter. slug: for people.
        facts: makes the provenance to store.
        Raises ValueError for a kind that is no such name, TypeError if key or value cannot be written as JSON, OSError
        if the file cannot be written.
        """
        return self.get_many(kind, [Entry(key, slug)], lambda missing: [compute()], facts)[0]

    def get_many(
        self,
        kind: str,
        entries: Sequence[Entry],
        compute: Callable[[list[int]], Iterable],
        facts: Callable[[], dict] = provenance,
    ) -> list:
        """The values of many entries at once; compute(indices of the missing ones) yields their values in order.

        Each value is stored as soon as it is yielded. Of equal keys only the first is computed. Raises as `get`.
        """
        if not re.fullmatch(r"[a-z0-9_-]+", kind):
            raise ValueError(f"kind {kind!r} names a folder; use a-z, 0-9, _ and -")
        first: dict[str, int] = {}
        for i, entry in enumerate(entries):
            first.setdefault(entry.digest, i)
        values = {digest: self._read(kind, entries[i]) for digest, i in first.items()}
        missing = sorted(digest for digest, value in values.items() if value is None)
        with ExitStack() as locks:
            if missing:
                locks.enter_context(_measuring(self.root, alone=kind in TIMED))
            for digest in missing:  # sorted, so that two processes never wait for each other
                name = entries[first[digest]].slug or digest
                lock = self.root / kind / ".locks" / f"{digest}.lock"
                locks.enter_context(locked(lock, f"another process is measuring {kind} {name}; waiting for it"))
            for digest in missing:  # another process may have measured while this one waited
                values[digest] = self._read(kind, entries[first[digest]], set_aside=True)
            indices = sorted(first[digest] for digest in missing if values[digest] is None)
            if indices:
                for i, value in self._measure(kind, entries, indices, compute, facts):
                    values[entries[i].digest] = value
        return [json.loads(values[entry.digest]) for entry in entries]

    def _measure(self, kind, entries, indices, compute, facts) -> Iterable[tuple[int, str]]:
        """Compute and store the values at these indices; yields (index, value as JSON text)."""
        names = ", ".join(entries[i].slug or entries[i].digest for i in indices)
        print(f"measuring {kind}: {names} ...", end="", flush=True)
        start = time.perf_counter()
        beside = facts()
        try:
            for i, value in zip(indices, compute(indices), strict=True):
                text = _json(value, "value")
                record = {
                    "key": json.loads(entries[i].text),
                    "value": json.loads(text),
                    "provenance": beside,
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                record["checksum"] = _checksum(record)
                self._write(self.root / kind / entries[i].file_name, record)
                yield i, text
        finally:
            print(f" {time.perf_counter() - start:.1f} s", flush=True)

    def _write(self, file: Path, record: dict) -> None:
        try:
            write_atomic({file: json.dumps(record, indent=1)})
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot store the measurement {file}: {error.strerror}. Make room there (or set LLMDROP_BUILD to "
                "another disk) and run again; what was stored before is kept",
            ) from error

    def _read(self, kind: str, entry: Entry, set_aside: bool = False) -> str | None:
        """The stored value as JSON text, or None. A damaged file is touched only by the holder of its lock."""
        for file in (self.root / kind).glob(f"*{entry.digest}.json"):
            try:
                record = json.loads(file.read_bytes())
                if record["checksum"] == _checksum(record) and _json(record["key"], "key") == entry.text:
                    return _json(record["value"], "value")
                reason = "its content does not match its checksum or its key"
            except FileNotFoundError:  # set aside by another process since the listing
                continue
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if set_aside:
                aside = file.with_name(file.name + ".damaged")
                os.replace(file, aside)
                warnings.warn(f"{file} is damaged ({reason}); set aside as {aside.name}, measuring again", stacklevel=4)
        return None

    def score(
        self,
        model: nn.Module,
        calibration: Calibration,
        batch_size: int = 8,
        with_residual: bool = True,
        gap: bool = False,
    ) -> ImportanceScores:
        """`llmdrop.score` of an undropped model, stored."""
        settings = {"with_residual": with_residual, "gap": gap}
        key = model_key(model, batch_size) | settings
        key |= {"calibration": calibration.digest, "version": scoring.VERSION}
        value = self.get(
            "score",
            key,
            lambda: score(model, calibration, batch_size, **settings).to_record(),
            f"{model_name(model)}-{text_name(calibration)}",
            partial(provenance, model, calibration, batch_size=batch_size, weights=key["weights"], **settings),
        )
        return ImportanceScores.from_record(value)

    def sample_scores(self, model: nn.Module, calibration: Calibration, batch_size: int = 8) -> dict[str, np.ndarray]:
        """The scores of every sample alone, by kind, [n_samples, n_layers], stored.

        Their mean over samples is what `llmdrop.score` gives, and samples are what its intervals are over. Raises what
        `llmdrop.score` raises, and ValueError for padded samples, whose mean would need weights.
        """
        if calibration.attention_mask is not None:
            raise ValueError(f"{calibration.source} is padded; scores by sample need samples of one length")

        def compute() -> dict[str, list]:
            sums, _ = scoring.sample_sums(model, calibration, batch_size)  # [n_layers, 6, n_samples]
            by_sample = 1 - sums.numpy() / calibration.input_ids.shape[1]
            return {kind: by_sample[:, 2 * k].T.tolist() for k, kind in enumerate(scoring.KINDS)}

        key = model_key(model, batch_size) | {"calibration": calibration.digest, "version": scoring.VERSION}
        slug = f"{model_name(model)}-{text_name(calibration)}"
        made_with = partial(provenance, model, calibration, batch_size=batch_size, weights=key["weights"])
        value = self.get("sample-scores", key, compute, slug, made_with)
        return {kind: np.array(of_samples) for kind, of_samples in value.items()}


@contextmanager
def _measuring(root: Path, alone: bool) -> Iterator[None]:
    """Hold this while something is measured, alone or beside others. A measurement may need another one inside."""
    if root in _MEASURING:
        yield
        return
    folder = root / ".locks" / platform.node()
    own = folder / f"{os.getpid()}.lock"
    with ExitStack() as held:
        turn = held.enter_context(ExitStack())
        turn.enter_context(locked(folder / "turn.lock", "something is timed alone on this machine; waiting for it"))
        if alone:
            for other in sorted(folder.glob("[0-9]*.lock")):
                with locked(other, "waiting until nothing else is measured, to time alone"):
                    other.unlink(missing_ok=True)
        else:
            held.enter_context(locked(own))
            held.callback(own.unlink, missing_ok=True)
            turn.close()
        _MEASURING.add(root)
        held.callback(_MEASURING.remove, root)
        yield


def _json(value, what: str) -> str:
    """A key in one canonical spelling (sorted, no NaN), a value in its own order."""
    try:
        return json.dumps(value, sort_keys=what == "key", allow_nan=what == "value", separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the {what} of a measurement must be plain JSON (dict, list, str, number): {error}") from error


def _checksum(record: dict) -> str:
    parts = [record["key"], record["value"], record["provenance"], record["created"]]
    return hashlib.sha256(_json(parts, "value").encode()).hexdigest()
