"""Processes that a test starts: killed where it says, and whether they have ended."""

import os
import signal
import sys
import time
from pathlib import Path


def all_end(processes: list[int]) -> bool:
    """Whether the processes are gone within half a minute."""
    deadline = time.monotonic() + 30
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(is_running, processes))


def is_running(process: int) -> bool:
    """Whether the process is there and, where /proc tells, no zombie."""
    try:
        os.kill(process, 0)
        if sys.platform != "linux":
            return True
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


class FileOperations:
    """Counts this process's file operations, and kills it before one of them.

    By count and not by the clock, so that it dies in the same place however busy the machine is.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir")

    def __init__(self, on: str = ""):
        self.on = on  # only of files whose path has this in it
        self.count = 0
        self.last: int | None = None  # the number of the one that is not survived
        sys.addaudithook(self._before)

    def _before(self, event: str, arguments: tuple) -> None:
        if event not in self.EVENTS or self.on not in str(arguments[0]):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
