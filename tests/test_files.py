"""Files and directories are complete or absent, and one process at a time makes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmdrop import files


def hold(path, what, seconds=60):
    """Another process that holds `path` by the code `what`, and says so."""
    code = f"import time\nfrom pathlib import Path\nimport files\npath = Path({str(path)!r})\n"
    code += f"with {what}:\n    print('held', flush=True)\n    time.sleep({seconds})\n"
    alone = os.environ | {"PYTHONPATH": str(Path(files.__file__).parent)}  # without the library, which imports PyTorch
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=alone)
    assert process.stdout.readline() == "held\n"
    return process


def test_write_atomic_writes_all_or_nothing(tmp_path):
    files.write_atomic({tmp_path / "a" / "x.txt": "one", str(tmp_path / "y.bin"): b"two"})
    assert (tmp_path / "a" / "x.txt").read_text() == "one" and (tmp_path / "y.bin").read_bytes() == b"two"
    with pytest.raises(TypeError):
        files.write_atomic({tmp_path / "a" / "x.txt": "new", tmp_path / "y.bin": 3})
    assert (tmp_path / "a" / "x.txt").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["a", "y.bin"] and os.listdir(tmp_path / "a") == ["x.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_who_may_read_what_is_written_is_up_to_the_umask(tmp_path, umask):
    """Also where a writer makes private files, as safetensors does."""
    before = os.umask(umask)
    try:
        files.write_atomic({tmp_path / "x.txt": "one"})
        with files.new_directory(tmp_path / "model") as folder:
            (folder / "deep").mkdir()
            for name in ("private", "deep/private"):
                os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))
            (folder / "ordinary").write_text("x")
            program = os.open(folder / "program", os.O_CREAT | os.O_WRONLY, 0o777)
            os.close(program)
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    folders = dict.fromkeys(("model", "model/deep"), 0o777 & ~umask)
    written = ("x.txt", "model/private", "model/deep/private", "model/ordinary")
    assert modes == folders | dict.fromkeys(written, 0o666 & ~umask) | {"model/program": 0o777 & ~umask}


def test_a_new_directory_is_complete_or_absent(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError, match="broken"), files.new_directory(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("broken")
    assert os.listdir(tmp_path) == []
    with files.new_directory(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert os.listdir(target) == ["whole"] and target.stat().st_mode & 0o055 == 0o055
    with pytest.raises(RuntimeError, match="broken"), files.new_directory(target) as folder:
        raise RuntimeError("broken")
    assert os.listdir(target) == ["whole"], "the former one stays where the new one fails"
    with files.new_directory(target) as folder:
        (folder / "newer").write_text("x")
    assert os.listdir(target) == ["newer"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_process_left_is_cleaned_up(tmp_path, there):
    target = tmp_path / "model"
    if there:
        target.mkdir()
        (target / "old").write_text("x")
    process = hold(target, "files.new_directory(path) as folder, open(folder / 'half', 'w')")
    with pytest.raises(RuntimeError, match="another process is writing"), files.new_directory(target):
        pass
    process.kill()
    process.wait()
    assert len(os.listdir(tmp_path)) == 1 + there
    with files.new_directory(target) as folder:
        assert [name for name in os.listdir(folder) if not name.startswith(".")] == []
        (folder / "whole").write_text("x")
    assert os.listdir(target) == ["whole"] and os.listdir(tmp_path) == ["model"]


def test_killed_between_the_renames(tmp_path):
    target, former = tmp_path / "model", tmp_path / ".model.former"
    former.mkdir()
    (former / "old").write_text("x")
    with pytest.raises(RuntimeError, match="broken"), files.new_directory(target):
        raise RuntimeError("broken")
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["model"]


def test_killed_after_the_renames(tmp_path):
    """The new directory is in place, the former one not gone yet, or only half."""
    target = tmp_path / "model"
    for name in ("model", ".model.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("x")
    with files.new_directory(target) as folder:
        (folder / "newer").write_text("x")
    assert os.listdir(target) == ["newer"] and os.listdir(tmp_path) == ["model"]


def test_a_lock_waits_or_refuses(tmp_path, capsys):
    process = hold(tmp_path / "deep" / "lock", "files.locked(path)", seconds=2)
    with pytest.raises(RuntimeError, match="busy"), files.locked(tmp_path / "deep" / "lock", refusal="busy"):
        pass
    with files.locked(tmp_path / "deep" / "lock", waiting="waiting for it"):
        assert process.wait() == 0
    assert capsys.readouterr().out == "waiting for it\n"
    with files.locked(tmp_path / "deep" / "lock", refusal="busy"):
        pass
