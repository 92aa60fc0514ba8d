"""Run a GGUF in llama.cpp, out of the wheel xllamacpp (vLLM: serving_vllm.py; measurements: serving_checks.py).

As a program, `python serving.py model.gguf --port 8080` is an OpenAI-compatible server. It imports nothing of llmdrop,
so that it starts at once.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

INSTALL = "pip install llmdrop[serve] (34 MB, prebuilt: llama.cpp in the wheel xllamacpp)"


def installed() -> str | None:
    """Version of llama.cpp's wheel, or None where it is not installed."""
    return version("xllamacpp") if importlib.util.find_spec("xllamacpp") else None


def commands(path: str = "dropped") -> list[dict]:
    """How each engine is started on an export: rows of engine, format, command."""
    vllm = f"python -m vllm.entrypoints.openai.api_server --model {path}"  # `vllm serve` fails in the CPU wheel
    rows = [
        ("llama.cpp (xllamacpp)", "gguf", f"python -m llmdrop.serving {path}.gguf --port 8080"),
        ("llama.cpp", "gguf", f"llama-server --model {path}.gguf --port 8080"),
        ("Ollama", "gguf", f"echo FROM ./{path}.gguf > Modelfile && ollama create {path} && ollama run {path}"),
        ("vLLM, llmdrop beside it", "nemotron-nas", vllm),
        ("vLLM alone", "nemotron-nas", f"{vllm} --trust-remote-code"),
        ("transformers", "hf", f"AutoModelForCausalLM.from_pretrained('{path}', trust_remote_code=True)"),
    ]
    return [dict(zip(("engine", "format", "command"), row, strict=True)) for row in rows]


@dataclass(frozen=True)
class Engine:
    """A running llama.cpp server with one model."""

    address: str  # http://host:port
    log: Path  # what it says about itself
    path: Path  # the model's file
    parallel: int = 1  # requests it works on at the same time

    def complete(self, ids: Sequence[int], new_tokens: int, top: int = 1) -> dict:
        """Greedy continuation of token ids, exactly new_tokens long (an end of text is passed over).

        Returns tokens, top (for each {token: log-probability} of the `top` likeliest; empty where the engine keeps
        them to itself, for tokens that are no whole UTF-8), prefill_seconds and decode_seconds by the engine's clock.
        """
        request = {"prompt": list(map(int, ids)), "n_predict": new_tokens, "temperature": 0, "n_probs": top}
        request |= {"cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        out = _post(f"{self.address}/completion", request)
        likeliest = _aligned(out["tokens"], out.get("completion_probabilities", []))
        return {
            "tokens": out["tokens"],
            "top": likeliest,
            "prefill_seconds": out["timings"]["prompt_ms"] / 1000,
            "decode_seconds": out["timings"]["predicted_ms"] / 1000,
        }

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the engine's own tokenizer, special tokens in the text recognised."""
        return _post(f"{self.address}/tokenize", {"content": text, "parse_special": True})["tokens"]

    @property
    def file_bytes(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that the engine says it reserved for its context."""
        sizes = re.findall(r"KV buffer size *= *([\d.]+) MiB", self.log.read_text(errors="replace"))
        return round(sum(map(float, sizes)) * 2**20)


@contextmanager
def serve(path, threads: int = 1, context: int = 1024, exact: bool = False, parallel: int = 1) -> Iterator[Engine]:
    """A llama.cpp server on the GGUF `path`, for the length of a `with` block.

    context: tokens its KV cache is made for, shared out among `parallel` requests. exact: float32 cache and no flash
    attention, the numbers nearest to transformers; otherwise float16 and flash attention, as people serve (and without
    it, llama.cpp gives every layer room for values, also those without attention). Raises ImportError without the
    engine, ValueError if it refuses.
    """
    if installed() is None:
        raise ImportError(f"serving a GGUF needs an engine: {INSTALL}")
    command = [sys.executable, __file__, str(path), "--threads", str(threads), "--context", str(context)]
    command += ["--parallel", str(parallel)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log = Path(folder, "log")
        process = subprocess.Popen(
            command + ["--verbose", "--attached"] + ["--exact"] * exact,
            stdout=subprocess.PIPE,
            stderr=stack.enter_context(log.open("w")),
            stdin=subprocess.PIPE,  # it ends when this closes, so also when this process dies
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        line = next((line for line in process.stdout if line.startswith("serving at ")), None)
        if line is None:
            errors = [
                entry for entry in log.read_text(errors="replace").splitlines() if " E " in entry or "rror" in entry
            ]
            raise ValueError(f"llama.cpp does not load {path}: {' | '.join(errors[:3])[:500] or 'it says nothing'}")
        yield Engine(line.split()[-1], log, Path(path), parallel)


def _aligned(tokens: list[int], entries: list[dict]) -> list[dict]:
    """For each token {token: log-probability} out of its entry; {} if it has none, or it is not certain which."""

    def positions(tokens, entries):  # greedily, the first token that each entry can stand for
        found, at = [], 0
        for entry in entries:
            at = tokens.index(entry["id"], at) + 1
            found.append(at - 1)
        return found

    first = positions(tokens, entries)
    last = [len(tokens) - 1 - i for i in positions(tokens[::-1], entries[::-1])][::-1]
    sure = {i: entry for i, j, entry in zip(first, last, entries, strict=True) if i == j}
    return [{x["id"]: x["logprob"] for x in sure[i]["top_logprobs"]} if i in sure else {} for i in range(len(tokens))]


def _post(address: str, request: dict) -> dict:
    data = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(data, timeout=600) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="an OpenAI-compatible server on one GGUF")
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--parallel", type=int, default=1, help="requests at the same time, which share the context")
    parser.add_argument("--exact", action="store_true", help="float32 KV cache, no flash attention")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--attached", action="store_true", help="end when standard input does")
    args = parser.parse_args()
    if sys.path[0] == str(Path(__file__).parent):
        sys.path.pop(0)  # modules of llmdrop are no top-level modules
    try:
        import xllamacpp as engine
    except ImportError:
        sys.exit(f"no engine here: {INSTALL}")
    params = engine.CommonParams()
    params.model.path, params.port, params.n_ctx = args.path, args.port, args.context
    params.n_parallel, params.warmup, params.verbosity = args.parallel, False, 4 if args.verbose else 1
    if args.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    flash = engine.llama_flash_attn_type
    params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if args.exact:
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    server = engine.Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    with suppress(KeyboardInterrupt):
        sys.stdin.read() if args.attached else signal.pause()
    del server


if __name__ == "__main__":
    main()
