"""Where the residual stream of all samples waits between two layers, so that a killed run goes on where it was."""

import io
import os
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from ..checkpoints.extras import import_extra
from ..files import write_atomic

PLACES = ("auto", "device", "host", "file")


class StreamBuffer:
    """The residual stream of all samples, [n, T, C], between two layers: read and written batch by batch.

    A layer reads x and writes y; `save` after the layer makes y the next x. place: "device", "host" (pinned memory
    where there is CUDA), "file" (two memory-mapped files), or "auto", the first of these of whose free memory it takes
    at most a quarter.

    It outlives a killed process: its state on disk is a record (the number of finished layers, their sums, which of two
    files goes with them) and that file; the other one is written meanwhile. In memory x and y are one, copied to disk
    after a layer, unless the last copy took longer than 0.2 s and copies would take more than a tenth of the time.
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
        self._reserve_files()
        if self.place == "file":
            self.x = self._map(0)
            self.y = self._map(1)
        else:
            on_device = self.place == "device"
            pin = not on_device and device.type == "cuda"
            self.x = torch.empty(shape, dtype=dtype, device=device if on_device else "cpu", pin_memory=pin)
            self.y = self.x

    def _roomy_place(self) -> str:
        if self.device.type == "cuda" and self.n_bytes <= torch.cuda.mem_get_info(self.device)[0] / 4:
            return "device"
        return "host" if self.n_bytes <= import_extra("psutil", "streaming").virtual_memory().available / 4 else "file"

    def get(self, rows: slice) -> torch.Tensor:
        """Samples of the stream before the layer, on the device."""
        return self.x[rows].to(self.device, non_blocking=True)

    def put(self, where: slice | tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
        """Set a part of the stream after the layer."""
        self.y[where] = values.to(self.y.device)

    def save(self, n_done: int, sums: torch.Tensor) -> None:
        """After a layer (or the embedding, n_done=0): what was put is what is got from now on."""
        start = time.monotonic()
        next_slot = 1 - self.slot
        if self.place != "file":
            if self.save_seconds > 0.2 and start - self.saved_at < 10 * self.save_seconds:
                return
            self._map(next_slot).copy_(self.x)
        with open(self._file(next_slot), "rb+") as file:
            os.fsync(file.fileno())
        record = io.BytesIO()
        np.savez(record, n_done=n_done, slot=next_slot, sums=sums.numpy())
        write_atomic({self.folder / self.RECORD: record.getvalue()})
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
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None, None
        self.slot = slot
        if self.place == "file":
            self.x = self._map(slot)
            self.y = self._map(1 - slot)
        else:
            self.x.copy_(self._map(slot))
        return n_done, sums

    def _file(self, slot: int) -> Path:
        return self.folder / f"stream-{slot}.bin"

    def _map(self, slot: int) -> torch.Tensor:
        flat = torch.from_file(str(self._file(slot)), shared=True, size=int(np.prod(self.shape)), dtype=self.dtype)
        return flat.view(self.shape)

    def _reserve_files(self) -> None:
        """Take the room now: a write to a mapped file on a full disk would kill the process."""
        for slot in (0, 1):
            try:
                with open(self._file(slot), "ab") as file:
                    os.posix_fallocate(file.fileno(), 0, self.n_bytes)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"cannot keep the residual stream (2 x {self.n_bytes / 1e9:.2f} GB) in {self.folder}: "
                    f"{error.strerror}. Make room there, name another directory with work_dir=, or take fewer samples",
                ) from error
