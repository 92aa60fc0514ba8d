"""Files and directories that are complete or absent, and locks: one of each, for the whole library."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def build_dir() -> Path:
    """Where converted models, data and results live: $LLMDROP_BUILD, a checkout's build/, or ~/.cache/llmdrop."""
    if os.environ.get("LLMDROP_BUILD"):
        return Path(os.environ["LLMDROP_BUILD"])
    checkout = Path(__file__).resolve().parent.parent
    return checkout / "build" if (checkout / "pyproject.toml").exists() else Path.home() / ".cache" / "llmdrop"


def real_path(path: str | os.PathLike) -> Path:
    """The absolute path without ~ and links: what is written there replaces a link's target, and the link stays."""
    return Path(os.path.expanduser(path)).resolve()


@contextmanager
def locked(file: Path, waiting: str | None = None, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `file` for the length of a `with` block; its directory is made if need be.

    Where another process holds it: with `refusal`, RuntimeError of that text at once; else wait, and print `waiting`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if refusal is not None:
            raise RuntimeError(refusal) from None
        if waiting is not None:
            print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A hidden directory beside `target` that becomes `target` on success: it is complete or absent, whatever happens.

    One process at a time: another gets RuntimeError. What a killed process left is removed by the next one.
    """
    partial = target.with_name(f".{target.name}.partial")
    former = target.with_name(f".{target.name}.former")
    lock = partial / ".lock"
    with locked(lock, refusal=f"another process is writing {target}; wait for it"):
        if former.exists():  # killed after the first of the two renames below, or after the second
            if target.exists():
                shutil.rmtree(former)
            else:
                former.rename(target)
        try:
            for leftover in partial.iterdir():
                if leftover != lock:
                    remove(leftover)
            yield partial
            lock.unlink()
            by_umask = partial.stat().st_mode & 0o666  # the folder was made by it; safetensors writes 0600 regardless
            for file in partial.rglob("*"):
                if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                    file.chmod(file.stat().st_mode | by_umask)
            is_current = target.exists() and target.samefile(os.curdir)
            if target.exists():
                target.rename(former)
            partial.rename(target)
            if is_current:  # else this process would stay in the former one, which goes
                os.chdir(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if target.exists():
                shutil.rmtree(former, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or a whole directory, whichever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomic(files: Mapping[str | Path, str | bytes]) -> None:
    """Write {path: content} so that a kill, an error or a full disk never leaves a part of a file under its name.

    All are written and flushed under temporary names first, then renamed: on an error none of them changes.
    """
    ready = {}
    try:
        for path, content in files.items():
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            ready[temporary] = path
            with open(temporary, "xb") as file:  # mkstemp would make it private
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in ready.items():
            os.replace(temporary, path)
    finally:
        for temporary in ready:
            temporary.unlink(missing_ok=True)
