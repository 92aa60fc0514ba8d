"""Run exports in the engines people serve with, and measure them there over the OpenAI-compatible API.

As a program, `python serving.py model.gguf --port 8080` is the server: llama.cpp out of the wheel xllamacpp. It imports
nothing of llmdrop, so that it starts at once.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

INSTALL = "pip install llmdrop[serve] (34 MB, prebuilt: llama.cpp in the wheel xllamacpp)"


def installed() -> str | None:
    """Version of llama.cpp's wheel, or None where it is not installed."""
    return version("xllamacpp") if importlib.util.find_spec("xllamacpp") else None


def commands(path: str = "dropped") -> list[dict]:
    """How each engine is started on an export: rows of engine, format, command."""
    rows = [
        ("llama.cpp (xllamacpp)", "gguf", f"python -m llmdrop.serving {path}.gguf --port 8080"),
        ("llama.cpp", "gguf", f"llama-server --model {path}.gguf --port 8080"),
        ("Ollama", "gguf", f"echo FROM ./{path}.gguf > Modelfile && ollama create {path} && ollama run {path}"),
        ("vLLM, llmdrop beside it", "nemotron-nas", f"vllm serve {path}"),
        ("vLLM alone", "nemotron-nas", f"vllm serve {path} --trust-remote-code"),
        ("transformers", "hf", f"AutoModelForCausalLM.from_pretrained('{path}', trust_remote_code=True)"),
    ]
    return [dict(zip(("engine", "format", "command"), row, strict=True)) for row in rows]


@dataclass(frozen=True)
class Engine:
    """A running llama.cpp server with one model."""

    address: str  # http://host:port
    log: Path  # what it says about itself
    path: Path  # the model's file

    def complete(self, ids: Sequence[int], new_tokens: int, top: int = 1) -> dict:
        """Greedy continuation of token ids, exactly new_tokens long (an end of text is passed over).

        Returns tokens, top (for each {token: log-probability} of the `top` likeliest; empty where the engine keeps
        them to itself, for tokens that are no whole UTF-8), prefill_seconds and decode_seconds by the engine's clock.
        """
        request = {"prompt": list(map(int, ids)), "n_predict": new_tokens, "temperature": 0, "n_probs": top}
        request |= {"cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        out = _post(f"{self.address}/completion", request)
        likeliest = _aligned(out["tokens"], out["completion_probabilities"])
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
    def kv_bytes(self) -> int:
        """Bytes of KV cache that the engine says it reserved for its context."""
        sizes = re.findall(r"KV buffer size *= *([\d.]+) MiB", self.log.read_text(errors="replace"))
        return round(sum(map(float, sizes)) * 2**20)


@contextmanager
def serve(path, threads: int = 1, context: int = 1024, exact: bool = False) -> Iterator[Engine]:
    """A llama.cpp server on the GGUF `path`, for the length of a `with` block.

    context: tokens its KV cache is made for. exact: float32 cache and no flash attention, the numbers nearest to
    transformers; otherwise float16 and flash attention, as people serve (and without it, llama.cpp gives every layer
    room for values, also those without attention). Raises ImportError without the engine, ValueError if it refuses.
    """
    if installed() is None:
        raise ImportError(f"serving a GGUF needs an engine: {INSTALL}")
    command = [sys.executable, __file__, str(path), "--threads", str(threads), "--context", str(context)]
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
        yield Engine(line.split()[-1], log, Path(path))


def compare(engine: Engine, model, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 20) -> dict:
    """How near an engine's greedy text is to a transformers model's, which must be dropped from alike.

    Along the engine's own text, both log-probabilities of its `top` likeliest tokens are compared at each step. Returns
    n_tokens, n_equal (tokens which are also the model's choice), max_difference (natural log), and max_loss, the most
    that the model gives away by the engine's choice: where it is below max_difference, unequal tokens are ties. Ends of
    text, which the engine rates but may not choose here, are no choice for the model either.
    """
    import torch

    equal, difference, loss = 0, 0.0, 0.0
    for ids in prompts:
        out = engine.complete(ids, new_tokens, top)
        sequence = torch.tensor([list(ids) + out["tokens"]], device=model.device)
        with torch.inference_mode():
            logits = model(sequence, use_cache=False, logits_to_keep=new_tokens + 1).logits
        logprobs = logits[0, :-1].float().log_softmax(-1).cpu()  # [new_tokens, V]
        for step, (token, likely) in enumerate(zip(out["tokens"], out["top"], strict=True)):
            known = {t: value for t, value in likely.items() if value > -30}  # it says -inf as a large number
            difference = max(difference, *(abs(float(logprobs[step, t]) - value) for t, value in known.items()), 0)
            ends = [t for t, value in known.items() if value > known.get(token, 0)]  # rated above its own choice
            logprobs[step, ends] = -torch.inf
            equal += int(logprobs[step].argmax()) == token
            loss = max(loss, float(logprobs[step].max() - logprobs[step, token]))
    n_tokens = new_tokens * len(prompts)
    return {"n_tokens": n_tokens, "n_equal": equal, "max_difference": difference, "max_loss": loss}


def check_exports(model, tokenizer, plan, prompts, new_tokens: int, threads: int = 1) -> list[dict]:
    """Export one plan of an undropped Llama and compare each engine that is here with the model.

    Returns a row per engine: "transformers alone", which loads the checkpoint by the file it brings (max_difference of
    a logit, along the first prompt), and "llama.cpp", float32, the facts of `compare`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .models import save_model
    from .prune import dropped

    with dropped(model, plan), tempfile.TemporaryDirectory() as folder:
        path = save_model(model, tokenizer, Path(folder, "hf"))
        alone = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=model.dtype).to(model.device)
        with torch.inference_mode():
            ids = torch.tensor([prompts[0]], device=model.device)
            difference = float((alone(ids).logits - model(ids).logits).abs().max())
        rows = [{"engine": "transformers alone", "max_difference": difference}]
        if installed():
            path = save_model(model, tokenizer, Path(folder, "m.gguf"), format="gguf", weights="f32")
            with serve(path, threads, exact=True) as engine:
                rows.append({"engine": "llama.cpp"} | compare(engine, model, prompts, new_tokens))
    return rows


def compare_serving(
    model,
    tokenizer,
    plans: Mapping,
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int = 3,
    threads: int = 1,
    weights: str = "q8_0",
) -> list[dict]:
    """Speed of several plans of one model in llama.cpp, in turn, `rounds` times: a drifting machine hits all alike.

    Returns one row per plan: plan, prefill_tokens_per_second, decode_tokens_per_second, prefill_speedup and
    decode_speedup over the first plan (medians over rounds of ratios within one round), with decode_low and
    decode_high (their range), kv_bytes (as reserved by the engine for prompt and new tokens), file_bytes, and kv_share
    and file_share relative to the first plan's.
    """
    from .models import save_model
    from .prune import dropped

    rows: dict[str, list] = {name: [] for name in plans}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        context, engines = -(-(len(prompt) + new_tokens) // 256) * 256, {}
        for name, plan in plans.items():
            with dropped(model, plan):
                path = save_model(model, tokenizer, Path(folder, f"{name}.gguf"), format="gguf", weights=weights)
            engines[name] = stack.enter_context(serve(path, threads, context))
        for k in range(rounds + 1):
            for name, engine in engines.items():
                out = engine.complete(prompt, new_tokens)
                if k:  # the first round warms up
                    rows[name].append((len(prompt) / out["prefill_seconds"], new_tokens / out["decode_seconds"]))
        sizes = {name: (engine.kv_bytes, engine.path.stat().st_size) for name, engine in engines.items()}
    first, table = rows[next(iter(plans))], []
    for name, pairs in rows.items():
        prefill, decode = ([b[i] / a[i] for a, b in zip(first, pairs, strict=True)] for i in (0, 1))
        table.append(
            {
                "plan": name,
                "prefill_tokens_per_second": median(pair[0] for pair in pairs),
                "decode_tokens_per_second": median(pair[1] for pair in pairs),
                "prefill_speedup": median(prefill),
                "decode_speedup": median(decode),
                "decode_low": min(decode),
                "decode_high": max(decode),
                "kv_bytes": sizes[name][0],
                "file_bytes": sizes[name][1],
                "kv_share": sizes[name][0] / sizes[next(iter(plans))][0],
                "file_share": sizes[name][1] / sizes[next(iter(plans))][1],
            }
        )
    return table


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
    params.n_parallel, params.warmup, params.verbosity = 1, False, 4 if args.verbose else 1
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
