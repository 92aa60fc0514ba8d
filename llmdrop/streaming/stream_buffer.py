"""Where the residual stream of all samples waits between two layers, so that a killed run goes on where it was."""

import io
import os
import time
from pathlib import Path
from zipfile import BadZipFile
from zlib import crc32

import numpy as np
import torch

from ..files import write_atomic
from .extra import import_extra

PLACES = ("auto", "device", "host", "file")


class StreamBuffer:
    """The residual stream of all samples, [n, T, C], between two layers: read and written batch by batch.

    A layer reads x and writes y; `save` after the layer makes y the next x. place: "device", "host" (pinned memory
    where there is CUDA), "file" (two memory-mapped files), or "auto", the first of these of whose free memory it takes
    at most a quarter.

    It outlives a killed process: its state on disk is a record (the number of finished layers, their sums, which of two
    files goes with them) and that file; the other one is written meanwhile. In memory it is copied to disk after a
    layer, unless the last copy took longer than 0.2 s and copies would take more than a tenth of the time. Copies carry
    a checksum instead of waiting for the disk: what a power failure left half-written is not taken up.
    """

    RECORD = "progress.npz"

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: str):
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.n_bytes = int(np.prod(shape)) * dtype.itemsize
        self.place = self._roomy_place() if place == "auto" else place
        self.slot = 0  # the file that goes with the record
        self.saved_at = 0.0
        self.save_seconds = 0.0
        if self.place == "file":
            for slot in (0, 1):
                self._reserve(slot)
            self.x, self.y = self._map(0), self._map(1)
        elif self.place == "device":
            self.x = self.y = torch.empty(shape, dtype=dtype, device=device)
        else:
            self.x = self.y = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def _roomy_place(self) -> str:
        if self.device.type == "cuda" and self.n_bytes <= torch.cuda.mem_get_info(self.device)[0] / 4:
            return "device"
        return "host" if self.n_bytes <= import_extra("psutil").virtual_memory().available / 4 else "file"

    def get(self, rows: slice) -> torch.Tensor:
        """Samples of the stream before the layer, on the device."""
        return self.x[rows].to(self.device, non_blocking=True)

    def put(self, where: slice | tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
        """Set a part of the stream after the layer."""
        self.y[where] = values.to(self.y.device)

    def save(self, n_done: int, sums: torch.Tensor) -> None:
        """After a layer (or the embedding, n_done=0): what was put is what is got from now on. OSError: disk full."""
        next_slot = 1 - self.slot
        start = time.monotonic()
        is_slow = self.save_seconds > 0.2 and start - self.saved_at < 10 * self.save_seconds
        if self.place != "file" and is_slow:
            return
        record = io.BytesIO()
        try:
            checksum = self._flush(next_slot) if self.place == "file" else self._copy(next_slot)
            np.savez(record, n_done=n_done, slot=next_slot, sums=sums.numpy(), place=self.place, checksum=checksum)
            write_atomic({self.folder / self.RECORD: record.getvalue()})
        except OSError as error:
            raise self._no_room(error) from error
        self.x, self.y = self.y, self.x
        self.slot = next_slot
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def resume(self) -> tuple[int | None, torch.Tensor | None]:
        """What the last run had finished: (number of layers, sums), the stream as it was then; (None, None) if new."""
        try:
            with np.load(self.folder / self.RECORD) as record:
                n_done = int(record["n_done"])
                slot = int(record["slot"])
                sums = torch.from_numpy(record["sums"])
                is_copy = str(record["place"]) != "file"
                checksum = int(record["checksum"])
            file = self._file(slot)
            if file.stat().st_size != self.n_bytes or (is_copy and _checksum(file) != checksum):
                return None, None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None, None
        self.slot = slot
        if self.place == "file":
            self.x, self.y = self._map(slot), self._map(1 - slot)
        else:
            self.x.copy_(self._map(slot))
        return n_done, sums

    def _file(self, slot: int) -> Path:
        return self.folder / f"stream-{slot}.bin"

    def _map(self, slot: int) -> torch.Tensor:
        flat = torch.from_file(str(self._file(slot)), shared=True, size=int(np.prod(self.shape)), dtype=self.dtype)
        return flat.view(self.shape)

    def _flush(self, slot: int) -> int:
        with open(self._file(slot), "rb+") as file:
            os.fsync(file.fileno())
        return 0  # no checksum: it is on the disk

    def _copy(self, slot: int) -> int:
        """Write the stream into a file; returns its checksum."""
        checksum = 0
        with open(self._file(slot), "wb") as file:
            for sample in self.x:
                content = memoryview(sample.cpu().view(torch.uint8).numpy()).cast("B")
                file.write(content)
                checksum = crc32(content, checksum)
        return checksum

    def _reserve(self, slot: int) -> None:
        """Take the room now: a write to a mapped file on a full disk would kill the process."""
        try:
            with open(self._file(slot), "ab") as file:
                os.posix_fallocate(file.fileno(), 0, self.n_bytes)
        except OSError as error:
            self._file(slot).unlink(missing_ok=True)
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"cannot keep the residual stream (2 x {self.n_bytes / 1e9:.2f} GB) in {self.folder}: {error.strerror}. "
            "Make room there, name another directory with work_dir=, or take fewer samples; finished layers are kept",
        )


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = crc32(chunk, value)
    return value
