"""The residual stream of all samples between two layers: on the device, in host memory, or in memory-mapped files."""

import os
import time
from pathlib import Path
from zipfile import BadZipFile
from zlib import crc32

import numpy as np
import psutil
import torch


class Residual:
    """A tensor [n, T, C], read and written batch by batch, that outlives a killed process.

    Its state on disk is a record (the number of finished layers, their sums, which of two files goes with them) and
    that file; the other one is written meanwhile. In memory it is copied to disk after a layer, unless the last copy
    took longer than 0.2 s and copies would take more than a tenth of the time. Copies carry a checksum instead of
    waiting for the disk: what a power failure left half-written is not taken up.
    """

    RECORD = "progress.npz"

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, device, place: str = "auto"):
        self.folder, self.shape, self.dtype, self.device = folder, shape, dtype, device
        self.n_bytes = int(np.prod(shape)) * dtype.itemsize
        self.place = self._place() if place == "auto" else place
        self.slot, self.saved_at, self.seconds = 0, 0.0, 0.0
        if self.place == "file":
            self._reserve(0), self._reserve(1)
            self.x, self.y = self._map(0), self._map(1)  # a layer reads x and writes y
        else:
            where = {"device": device} if self.place == "device" else {"pin_memory": device.type == "cuda"}
            self.x = self.y = torch.empty(shape, dtype=dtype, **where)

    def _place(self) -> str:
        if self.device.type == "cuda" and self.n_bytes <= torch.cuda.mem_get_info(self.device)[0] / 4:
            return "device"
        return "host" if self.n_bytes <= psutil.virtual_memory().available / 4 else "file"

    def get(self, rows: slice) -> torch.Tensor:
        return self.x[rows].to(self.device, non_blocking=True)

    def put(self, where, values: torch.Tensor) -> None:
        self.y[where] = values.to(self.y.device)

    def save(self, n_done: int, sums: torch.Tensor) -> None:
        """After a layer (or the embedding, n_done=0): what was put is what is got from now on. OSError: disk full."""
        other = 1 - self.slot
        slow = self.seconds > 0.2 and time.monotonic() - self.saved_at < 10 * self.seconds
        if self.place != "file" and slow:
            return
        start, checksum = time.monotonic(), 0
        try:
            if self.place == "file":
                _sync(self._file(other))
            else:
                with open(self._file(other), "wb") as file:
                    for sample in self.x:
                        content = memoryview(sample.cpu().view(torch.uint8).numpy()).cast("B")
                        file.write(content)
                        checksum = crc32(content, checksum)
            temporary = self.folder / "progress.tmp"
            with open(temporary, "wb") as file:
                np.savez(file, n_done=n_done, slot=other, sums=sums.numpy(), place=self.place, checksum=checksum)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / self.RECORD)
        except OSError as error:
            raise self._no_room(error) from error
        self.x, self.y, self.slot = self.y, self.x, other
        self.saved_at = time.monotonic()
        self.seconds = self.saved_at - start

    def resume(self) -> tuple[int | None, torch.Tensor | None]:
        """What the last run had finished: (number of layers, sums), the stream as it was then; (None, None) if new."""
        try:
            with np.load(self.folder / self.RECORD) as record:
                n_done, slot, sums = int(record["n_done"]), int(record["slot"]), torch.from_numpy(record["sums"])
                copied, checksum = str(record["place"]) != "file", int(record["checksum"])
            file = self._file(slot)
            if file.stat().st_size != self.n_bytes or (copied and _checksum(file) != checksum):
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


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
