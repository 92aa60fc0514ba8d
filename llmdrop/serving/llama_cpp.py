"""Run a GGUF in llama.cpp, out of the wheel xllamacpp, in a process of its own.

That process runs this very file as a program, which imports nothing of llmdrop, so that it starts at once; so does
`llmdrop serve model.gguf --port 8080`.
"""

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

INSTALL = "pip install llmdrop[serve] (34 MB, prebuilt: llama.cpp in the wheel xllamacpp)"


def installed() -> str | None:
    """Version of llama.cpp's wheel, or None where it is not installed."""
    return version("xllamacpp") if importlib.util.find_spec("xllamacpp") else None


@dataclass(frozen=True)
class LlamaCpp:
    """A running llama.cpp server with one model."""

    address: str  # http://host:port
    log: Path  # what it says about itself
    parallel: int = 1  # requests it works on at the same time

    def complete(self, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 1) -> list[dict]:
        """Greedy continuations of token ids, exactly new_tokens long (an end of text is passed over).

        Each has tokens, top (for each {token: log-probability} of the `top` likeliest; empty where the engine keeps
        them to itself, for tokens that are no whole UTF-8), prefill_seconds and decode_seconds by the engine's clock.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda ids: self._complete(ids, new_tokens, top), prompts))

    def _complete(self, ids: Sequence[int], new_tokens: int, top: int) -> dict:
        request = {
            "prompt": list(map(int, ids)),
            "n_predict": new_tokens,
            "n_probs": top,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        out = _post(f"{self.address}/completion", request)
        return {
            "tokens": out["tokens"],
            "top": _aligned(out["tokens"], out.get("completion_probabilities", [])),
            "prefill_seconds": out["timings"]["prompt_ms"] / 1000,
            "decode_seconds": out["timings"]["predicted_ms"] / 1000,
        }

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the engine's own tokenizer, special tokens in the text recognized."""
        return _post(f"{self.address}/tokenize", {"content": text, "parse_special": True})["tokens"]

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that the engine says it reserved for its context."""
        sizes = re.findall(r"KV buffer size *= *([\d.]+) MiB", self.log.read_text(errors="replace"))
        return round(sum(map(float, sizes)) * 2**20)


@contextmanager
def serve(path, threads: int = 1, context: int = 1024, exact: bool = False, parallel: int = 1) -> Iterator[LlamaCpp]:
    """A llama.cpp server on the GGUF `path`, for the length of a `with` block.

    context: tokens of one request that its KV cache has room for. parallel: requests at the same time. exact: float32
    cache and no flash attention, the numbers nearest to transformers; otherwise float16 and flash attention, as people
    serve (and without it, llama.cpp gives every layer room for values, also those without attention).
    Raises ImportError without the engine, ValueError if it refuses.
    """
    if installed() is None:
        raise ImportError(f"serving a GGUF needs an engine: {INSTALL}")
    command = [sys.executable, __file__, str(path), "--threads", str(threads), "--context", str(context * parallel)]
    command += ["--parallel", str(parallel), "--attached"] + ["--exact"] * exact
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory()), "log")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it ends when this closes, so also when this process dies
            stdout=subprocess.PIPE,
            stderr=stack.enter_context(log.open("w")),
            text=True,
        )
        stack.enter_context(process)  # closes its pipes and waits for it
        stack.callback(process.kill)
        line = next((line for line in process.stdout if line.startswith("serving at ")), None)
        if line is None:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if " E " in line or "rror" in line]
            raise ValueError(f"llama.cpp does not load {path}: {' | '.join(errors[:3])[:500] or 'it says nothing'}")
        yield LlamaCpp(line.split()[-1], log, parallel)


def _aligned(tokens: list[int], entries: list[dict]) -> list[dict[int, float]]:
    """For each token {token: log-probability} out of its entry; {} if it has none, or it is not certain which."""
    first = _positions(tokens, entries)
    last = [len(tokens) - 1 - i for i in _positions(tokens[::-1], entries[::-1])][::-1]
    top: list[dict[int, float]] = [{} for _ in tokens]
    for i, j, entry in zip(first, last, entries, strict=True):
        if i == j:
            top[i] = {likely["id"]: likely["logprob"] for likely in entry["top_logprobs"]}
    return top


def _positions(tokens: list[int], entries: list[dict]) -> list[int]:
    """The first token that each entry can stand for, greedily."""
    positions = []
    start = 0
    for entry in entries:
        positions.append(tokens.index(entry["id"], start))
        start = positions[-1] + 1
    return positions


def _post(address: str, request: dict) -> dict:
    data = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(data, timeout=600) as answer:
        return json.load(answer)


def main() -> None:
    """The server, as a program."""
    parser = argparse.ArgumentParser(description="an OpenAI-compatible server on one GGUF")
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--parallel", type=int, default=1, help="requests at the same time, which share the context")
    parser.add_argument("--exact", action="store_true", help="float32 KV cache, no flash attention")
    parser.add_argument("--attached", action="store_true", help="for programs: log all, end when standard input does")
    args = parser.parse_args()
    try:
        import xllamacpp as engine
    except ImportError:
        sys.exit(f"no engine here: {INSTALL}")
    params = engine.CommonParams()
    params.model.path = args.path
    params.port = args.port
    params.n_ctx = args.context
    params.n_parallel = args.parallel
    params.warmup = False
    params.verbosity = 4 if args.attached else 1
    if args.threads:
        params.cpuparams.n_threads = args.threads
        params.cpuparams_batch.n_threads = args.threads
    flash = engine.llama_flash_attn_type
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if args.exact:
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    try:
        server = engine.Server(params)
    except RuntimeError as error:
        sys.exit(f"llama.cpp does not load {args.path} ({error}); what it says of the file stands above")
    print(f"serving at {server.listening_address}", flush=True)
    with suppress(KeyboardInterrupt):
        if args.attached:
            sys.stdin.read()
        else:
            signal.pause()
    del server


if __name__ == "__main__":
    main()
