"""Is an export in an engine the same model, and how much faster is it there? (`notebooks/serving`)"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from . import serving, serving_vllm
from .fingerprint import model_key, provenance, speed_key
from .models import save_model
from .plan import DropPlan
from .prune import dropped
from .results import Store
from .speed import measure_speed

MODULES = "export", "gguf_export", "serving", "serving_vllm", "serving_checks", "prune"


def engines() -> dict[str, str | None]:
    """The engines that are here and their versions: transformers, and llama.cpp and vLLM where they are installed."""
    found = {"llama.cpp": serving.installed(), "vLLM": serving_vllm.installed()}
    return {"transformers": torch.__version__} | {name: version for name, version in found.items() if version}


def compare(engine, model, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 20) -> dict:
    """How near an engine's greedy text is to a transformers model's, which must be dropped from alike.

    Along the engine's own text, both log-probabilities of its `top` likeliest tokens are compared at each step. Returns
    n_tokens, n_equal (tokens which are also the model's choice), max_difference (natural log), and max_loss, the most
    that the model gives away by the engine's choice: where it is below max_difference, unequal tokens are ties. Ends of
    text, which llama.cpp rates but may not choose here, are no choice for the model either.
    """
    equal, difference, loss = 0, 0.0, 0.0
    if isinstance(engine, Alone):
        answers = engine.complete_all(prompts, new_tokens, top)
    else:
        with ThreadPoolExecutor(engine.parallel) as pool:
            answers = list(pool.map(lambda ids: engine.complete(ids, new_tokens, top), prompts))
    for ids, out in zip(prompts, answers, strict=True):
        sequence = torch.tensor([list(ids) + out["tokens"]], device=model.device)
        with torch.inference_mode():
            logits = model(sequence, use_cache=False, logits_to_keep=new_tokens + 1).logits
        logprobs = logits[0, :-1].float().log_softmax(-1).cpu()  # [new_tokens, V]
        for step, (token, likely) in enumerate(zip(out["tokens"], out["top"], strict=True)):
            known = {t: value for t, value in likely.items() if value > -30}  # llama.cpp says -inf as a large number
            difference = max(difference, *(abs(float(logprobs[step, t]) - value) for t, value in known.items()), 0)
            ends = [t for t, value in known.items() if value > known.get(token, 0)]  # rated above its own choice
            logprobs[step, ends] = -torch.inf
            equal += int(logprobs[step].argmax()) == token
            loss = max(loss, float(logprobs[step].max() - logprobs[step, token]))
    n_tokens = new_tokens * len(prompts)
    return {"n_tokens": n_tokens, "n_equal": equal, "max_difference": difference, "max_loss": loss}


def check_all(model, tokenizer, plans: Mapping[str, DropPlan], prompts, new_tokens: int, threads: int = 1, store=None):
    """`check_export` every plan in every engine that is here, through the results store.

    Returns the rows of `check_export` with engine and plan.
    """
    key, rows = model_key(model, 0, *MODULES) | {"prompts": prompts, "new_tokens": new_tokens}, []
    for engine, version in engines().items():
        for label, plan in plans.items():
            check = partial(check_export, engine, model, tokenizer, plan, prompts, new_tokens, threads)
            full = key | {"engine": [engine, version], "plan": plan.to_json()}
            facts = partial(provenance, model, engine=[engine, version])
            found = (store or Store()).get("serving-exact", full, check, f"{engine}-{label}", facts)
            rows += [{"engine": engine, "plan": label} | row for row in found]
    return pd.DataFrame(rows)


def compare_all(model, tokenizer, plans: Mapping[str, DropPlan], prompt, new_tokens: int, store=None, **settings):
    """`compare_serving` in every engine that is here, through the results store; settings: rounds, threads, weights."""
    rows, key = [], speed_key(model, *MODULES, "speed") | settings | {"prompt": prompt, "new_tokens": new_tokens}
    for engine, version in engines().items():
        run = partial(compare_serving, engine, model, tokenizer, plans, prompt, new_tokens, **settings)
        full = key | {"engine": [engine, version], "plans": {name: plan.to_json() for name, plan in plans.items()}}
        facts = partial(provenance, model, engine=[engine, version])
        rows += (store or Store()).get("serving", full, run, engine, facts)
    return pd.DataFrame(rows)


class Alone:
    """Transformers without llmdrop, in the shape of an engine: a checkpoint loaded by the file it brings."""

    def __init__(self, path, model):
        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=model.dtype)
        self.model.to(model.device).eval()

    @torch.inference_mode()
    def complete_all(self, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = 1) -> list[dict]:
        """Greedy continuations with a KV cache: tokens, top (for each {token: log-probability} of the likeliest).

        Prompts of one length are one batch.
        """
        answers = [{"tokens": [], "top": []} for _ in prompts]
        for length in sorted({len(prompt) for prompt in prompts}):
            which, past = [i for i, prompt in enumerate(prompts) if len(prompt) == length], None
            ids = torch.tensor([prompts[i] for i in which], device=self.model.device)
            for _ in range(new_tokens):
                out = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                best, past = out.logits[:, -1].float().log_softmax(-1).topk(top), out.past_key_values
                ids = best.indices[:, :1]
                for row, i in enumerate(which):
                    likeliest = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                    answers[i]["top"].append(dict(likeliest))
                    answers[i]["tokens"].append(ids[row].item())
        return answers


class InPlace:
    """Transformers for timing, in the shape of an engine: one plan of a model that all plans share."""

    def __init__(self, model, plan: DropPlan):
        self.model, self.plan, self.kv_bytes, self.file_bytes = model, plan, 0, 0

    def complete(self, ids: Sequence[int], new_tokens: int) -> dict:
        """prefill_seconds and decode_seconds of as many tokens, whichever; sets kv_bytes and file_bytes (weights)."""
        with dropped(self.model, self.plan):
            out = measure_speed(self.model, 1, len(ids), new_tokens, repeats=1, warm_up=False)
            self.kv_bytes, self.file_bytes = out["kv_bytes"], sum(p.nbytes for p in self.model.parameters())
        return out


def export(engine: str, model, tokenizer, plan: DropPlan, folder, weights: str = "f32") -> Path:
    """Write one plan of an undropped model in the form `engine` reads; weights: of a GGUF. ValueError if it cannot."""
    with dropped(model, plan):
        if engine == "llama.cpp":
            return save_model(model, tokenizer, Path(folder, "m.gguf"), format="gguf", weights=weights)
        return save_model(model, tokenizer, Path(folder, "m"), format="nemotron-nas" if engine == "vLLM" else "hf")


@contextmanager
def start(engine: str, path, model, **settings) -> Iterator:
    """Run an export in an engine in a `with` block; settings (transformers has none): as of `serving.serve`."""
    if engine == "transformers":
        yield Alone(path, model)
    else:
        with {"llama.cpp": serving, "vLLM": serving_vllm}[engine].serve(path, **settings) as running:
            yield running


def check_export(
    engine: str, model, tokenizer, plan: DropPlan, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int = 1
) -> list[dict]:
    """`compare` one plan of an undropped model in one engine: rows of setting and what `compare` returns.

    Settings are "exact", float32 throughout, and for llama.cpp also "default": flash attention and a float16 cache, as
    people serve, but float32 weights all the same. A plan that the engine cannot have gives one row {"refused": why}.
    """
    length, rows = -(-(max(map(len, prompts)) + new_tokens) // 64) * 64, []
    how = dict(threads=threads, parallel=len(prompts))
    how["context"] = length * (len(prompts) if engine == "llama.cpp" else 1)  # there all requests share it
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export(engine, model, tokenizer, plan, folder)
        except ValueError as error:
            return [{"refused": str(error)}]
        for setting in ("exact", "default") if engine == "llama.cpp" else ("exact",):
            with start(engine, path, model, exact=setting == "exact", **how) as running, dropped(model, plan):
                rows.append({"setting": setting} | compare(running, model, prompts, new_tokens))
    return rows


def compare_serving(
    engine: str,
    model,
    tokenizer,
    plans: Mapping[str, DropPlan],
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int = 3,
    threads: int = 1,
    weights: str = "q8_0",
) -> list[dict]:
    """Speed of several plans of one model in one engine, in turn, `rounds` times: a drifting machine hits all alike.

    Returns one row per plan that the engine can have: engine, plan, prefill_tokens_per_second,
    decode_tokens_per_second, prefill_speedup and decode_speedup over the first plan (medians over rounds of ratios
    within one round), with decode_low and decode_high (their range), kv_bytes (what the engine needs for prompt and new
    tokens, by its own account), file_bytes, and kv_share and file_share relative to the first plan's.
    """
    rows: dict[str, list] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        context, running, sizes = -(-(len(prompt) + new_tokens) // 256) * 256, {}, {}
        for name, plan in plans.items():
            if engine == "transformers":
                running[name] = InPlace(model, plan)
                continue
            try:
                path = export(engine, model, tokenizer, plan, Path(folder, name), weights)
            except ValueError as error:
                print(f"{engine} cannot have {name}: {error}")
                continue
            server = start(engine, path, model, threads=threads, context=context, parallel=1)
            running[name] = stack.enter_context(server)
        for k in range(rounds + 1):
            for name, server in running.items():
                out = server.complete(prompt, new_tokens)
                if k:  # the first round warms up
                    pair = len(prompt) / out["prefill_seconds"], new_tokens / out["decode_seconds"]
                    rows.setdefault(name, []).append(pair)
        for name, server in running.items():
            sizes[name] = server.kv_bytes, server.file_bytes
    base, table = next(iter(rows), None), []
    for name, pairs in rows.items():
        prefill, decode = ([b[i] / a[i] for a, b in zip(rows[base], pairs, strict=True)] for i in (0, 1))
        table.append(
            {
                "engine": engine,
                "plan": name,
                "prefill_tokens_per_second": median(pair[0] for pair in pairs),
                "decode_tokens_per_second": median(pair[1] for pair in pairs),
                "prefill_speedup": median(prefill),
                "decode_speedup": median(decode),
                "decode_low": min(decode),
                "decode_high": max(decode),
                "kv_bytes": sizes[name][0],
                "file_bytes": sizes[name][1],
                "kv_share": sizes[name][0] / sizes[base][0],
                "file_share": sizes[name][1] / sizes[base][1],
            }
        )
    return table
