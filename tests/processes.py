"""Whether processes that a test started have ended."""

import os
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
