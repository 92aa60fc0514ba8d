"""An OpenAI-compatible server on an export, by the engine that is here."""

import shutil
import socket
import sys
from pathlib import Path

from . import llama_cpp, vllm_engine

NO_ENGINE = (
    "no engine is installed that serves dropped models; one of these is enough: "
    f"{llama_cpp.INSTALL}; llama-server on the PATH (llama.cpp's own; also in Homebrew, conda-forge, Nix); "
    f"{vllm_engine.INSTALL}"
)


def served_format() -> dict[str, str]:
    """The settings of `save_model` for what the engine that is here reads: llama.cpp where it is, else vLLM.

    Raises ImportError where there is none.
    """
    if llama_cpp.installed() or shutil.which("llama-server"):
        return {"format": "gguf", "weights": "f16"}
    if vllm_engine.installed():
        return {"format": "nemotron-nas"}
    raise ImportError(NO_ENGINE)


def server_command(path: Path, port: int) -> list[str]:
    """The program, and its arguments, that serves an export of `served_format` on a port of this machine.

    Raises ImportError where no engine reads it, OSError for a port that is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that just ended is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} cannot be had ({error.strerror}); choose another one") from error
    arguments = [str(path), "--port", str(port)]
    if path.suffix != ".gguf":
        if vllm_engine.installed() is None:
            raise ImportError(f"serving {path} needs {vllm_engine.INSTALL}")
        name = ["--trust-remote-code", "--served-model-name", path.name]
        return [*vllm_engine.program(), "--model", *arguments, *name]
    if llama_cpp.installed():
        return [sys.executable, llama_cpp.__file__, *arguments]
    llama_server = shutil.which("llama-server")
    if llama_server is None:
        raise ImportError(f"serving {path} needs llama.cpp: {llama_cpp.INSTALL}; or llama-server on the PATH")
    return [llama_server, "--model", *arguments]
