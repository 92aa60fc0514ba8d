"""Is an export in an engine the same model, and how much faster is it there?"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from ..checkpoints.save import save_model
from ..plan import DropPlan
from ..prune import dropped
from ..speed.measure import in_rounds, measure_speed
from . import llama_cpp, vllm_engine

VERSION = 2  # raised when the numbers of this module change
FORMATS = {"transformers": "hf", "llama.cpp": "gguf", "vLLM": "nemotron-nas"}


def engines() -> dict[str, str]:
    """The engines that are here and their versions: transformers, and llama.cpp and vLLM where they are installed."""
    versions = {"transformers": transformers.__version__}
    versions |= {"llama.cpp": llama_cpp.installed(), "vLLM": vllm_engine.installed()}
    return {name: version for name, version in versions.items() if version}


def commands(path: str = "dropped") -> list[dict[str, str]]:
    """How each engine is started on an export: rows of engine, format, command."""
    vllm = f"python -m vllm.entrypoints.openai.api_server --model {path}"  # `vllm serve` fails in the CPU wheel
    rows = [
        ("llama.cpp (xllamacpp)", "gguf", f"llmdrop serve {path}.gguf --port 8080"),
        ("llama.cpp", "gguf", f"llama-server --model {path}.gguf --port 8080"),
        ("Ollama", "gguf", f"echo FROM ./{path}.gguf > Modelfile && ollama create {path} && ollama run {path}"),
        ("vLLM, llmdrop beside it", "nemotron-nas", vllm),
        ("vLLM alone", "nemotron-nas", f"{vllm} --trust-remote-code"),
        ("transformers", "hf", f"AutoModelForCausalLM.from_pretrained('{path}', trust_remote_code=True)"),
    ]
    return [dict(zip(("engine", "format", "command"), row, strict=True)) for row in rows]


def export(
    engine: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plan: DropPlan,
    folder: str | Path,
    weights: str = "f32",
) -> Path:
    """Write one plan of an undropped model in the form `engine` reads; weights: of a GGUF. ValueError if it cannot."""
    settings = {"format": FORMATS[engine]} | ({"weights": weights} if engine == "llama.cpp" else {})
    with dropped(model, plan):
        return save_model(model, tokenizer, Path(folder, "m.gguf" if engine == "llama.cpp" else "m"), **settings)


class Transformers:
    """Transformers without llmdrop, in the shape of an engine: a checkpoint loaded by the file it brings."""

    def __init__(self, path: Path, device: torch.device):
        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto").eval().to(device)
        settings = {"return_dict_in_generate": True, "output_logits": True}
        self.model.generation_config = GenerationConfig(pad_token_id=0, **settings)  # no end of text ends it

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 1) -> list[dict]:
        """Greedy continuations with a KV cache: tokens, top (for each {token: log-probability} of the likeliest)."""
        answers: list[dict] = [{} for _ in prompts]
        for length in {len(prompt) for prompt in prompts}:  # those of one length are one batch
            batch = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[i] for i in batch], device=self.model.device)
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
            best = torch.stack(out.logits, 1).float().log_softmax(-1).topk(top)  # [batch, new_tokens, top]
            for row, i in enumerate(batch):
                steps = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                top_of_steps = [dict(zip(tokens, values, strict=True)) for tokens, values in steps]
                answers[i] = {"tokens": out.sequences[row, length:].tolist(), "top": top_of_steps}
        return answers


@contextmanager
def start(engine: str, path: Path, device: torch.device, **settings) -> Iterator:
    """Run an export in an engine in a `with` block. device: of transformers; settings: of the others' `serve`.

    What it yields has complete(prompts, new_tokens, top) and, but for transformers, kv_bytes.
    """
    if engine == "transformers":
        yield Transformers(path, device)
    else:
        serve = llama_cpp.serve if engine == "llama.cpp" else vllm_engine.serve
        with serve(path, **settings) as running:
            yield running


# -- the same numbers -------------------------------------------------------------------------------------------------
def check_export(
    engine: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plan: DropPlan,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    threads: int = 1,
) -> list[dict]:
    """`compare` one plan of an undropped model in one engine: rows of setting and what `compare` returns.

    Settings are "exact", float32 throughout, and for llama.cpp also "default": flash attention and a float16 cache, as
    people serve, but float32 weights all the same. A plan that the engine cannot have gives one row {"refused": why}.
    """
    length = max(map(len, prompts)) + new_tokens
    how = {"threads": threads, "parallel": len(prompts), "context": _rounded_up(length, 64)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export(engine, model, tokenizer, plan, folder)
        except ValueError as error:
            return [{"refused": str(error)}]
        for setting in ("exact", "default") if engine == "llama.cpp" else ("exact",):
            with start(engine, path, model.device, exact=setting == "exact", **how) as running, dropped(model, plan):
                rows.append({"setting": setting} | compare(running, model, prompts, new_tokens))
    return rows


def compare(engine, model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 20) -> dict:
    """How near a running engine's greedy text is to a transformers model's, which must be dropped from alike.

    Along the engine's own text, both log-probabilities of its `top` likeliest tokens are compared at each step. Returns
    n_tokens, n_equal (tokens which are also the model's choice), max_difference (natural log), and max_loss, the most
    that the model gives away by the engine's choice: where it is below max_difference, unequal tokens are ties. Ends of
    text, which llama.cpp rates but may not choose here, are no choice for the model either.
    """
    equal = 0
    difference = 0.0
    loss = 0.0
    for ids, out in zip(prompts, engine.complete(prompts, new_tokens, top), strict=True):
        sequence = torch.tensor([list(ids) + out["tokens"]], device=model.device)
        with torch.inference_mode():
            logits = model(sequence, use_cache=False, logits_to_keep=new_tokens + 1).logits
        logprobs = logits[0, :-1].float().log_softmax(-1).cpu()  # [new_tokens, V]
        for of_model, token, likely in zip(logprobs, out["tokens"], out["top"], strict=True):
            known = {t: value for t, value in likely.items() if value > -30}  # llama.cpp says -inf as a large number
            difference = max(difference, *(abs(float(of_model[t]) - value) for t, value in known.items()), 0)
            ends = [t for t, value in known.items() if value > known.get(token, 0)]  # rated above its own choice
            of_model[ends] = -torch.inf
            equal += int(of_model.argmax()) == token
            loss = max(loss, float(of_model.max() - of_model[token]))
    n_tokens = new_tokens * len(prompts)
    return {"n_tokens": n_tokens, "n_equal": equal, "max_difference": difference, "max_loss": loss}


# -- faster, and a smaller cache --------------------------------------------------------------------------------------
def compare_serving(
    engine: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, DropPlan],
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int = 3,
    threads: int = 1,
    weights: str = "q8_0",
) -> list[dict]:
    """Time several plans of one model in one engine, in turn, `rounds` times: a drifting machine hits all alike.

    Returns one row per round and plan that the engine can have: engine, plan, round, prefill_seconds, decode_seconds,
    kv_bytes, what the engine says it needs for prompt and new tokens, and file_bytes.
    """
    how = {"threads": threads, "parallel": 1, "context": _rounded_up(len(prompt) + new_tokens, 256)}
    runs: dict[str, Callable[[int], dict]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, plan in plans.items():
            if engine == "transformers":
                runs[name] = partial(_time_in_place, model, plan, len(prompt), new_tokens)
                continue
            try:
                path = export(engine, model, tokenizer, plan, Path(folder, name), weights)
            except ValueError as error:
                print(f"{engine} cannot have {name}: {error}")
                continue
            running = stack.enter_context(start(engine, path, model.device, **how))
            files = path.rglob("*") if path.is_dir() else [path]
            file_bytes = sum(file.stat().st_size for file in files)
            runs[name] = partial(_time_engine, running, prompt, new_tokens, file_bytes)
        if not runs:
            return []
        in_rounds(runs, 1)  # warms up
        rows = in_rounds(runs, rounds)
    columns = ["plan", "round", "prefill_seconds", "decode_seconds", "kv_bytes", "file_bytes"]
    rows = rows.rename(columns={"name": "plan"})[columns]
    return [{"engine": engine} | row for row in rows.to_dict("records")]


def _time_engine(running, prompt: Sequence[int], new_tokens: int, file_bytes: int, turn: int) -> dict[str, float]:
    (out,) = running.complete([prompt], new_tokens)
    return out | {"kv_bytes": running.kv_bytes, "file_bytes": file_bytes}


def _time_in_place(model, plan: DropPlan, prompt_len: int, new_tokens: int, turn: int) -> dict[str, float]:
    """The same in transformers, by one plan of a model that all plans share; file_bytes are those of the weights."""
    with dropped(model, plan):
        out = measure_speed(model, 1, prompt_len, new_tokens, repeats=1, warm_up=False)
        return out | {"file_bytes": sum(p.nbytes for p in model.parameters())}


def _rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step
