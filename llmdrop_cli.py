"""The command line: `llmdrop score · plan · drop · evaluate · speed · serve · study`.

Every command is a function whose signature typer turns into arguments and options, and which returns what --json prints
and the same for people. This module stands beside the package because importing llmdrop imports torch, and --help is to
answer at once: a command imports the library when it runs.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from llmdrop import Calibration, DropPlan, ImportanceScores

UsageError = typer.BadParameter.__base__  # of every mistake in the arguments
Answer = tuple[Any, str]  # plain JSON, and text
RECONSTRUCTED_ON = "xsum multilexsum quac squad tales reviews abstracts asdiv questions stdlib".split()
QUESTION = '{"messages": [{"role": "user", "content": "Name three planets."}], "max_tokens": 64, "temperature": 0}'

app = typer.Typer(
    add_completion=False,
    epilog="Example: llmdrop drop smollm2-135m smaller/ --attn 8. Errors are one sentence; LLMDROP_TRACEBACK=1 shows "
    "where they come from.",
)


# -- what arguments mean ----------------------------------------------------------------------------------------------


def amount(text: str) -> int | float | str:
    """A number of layers, or a share of them."""
    try:
        if text.endswith("%"):
            float(text[:-1])
            return text
        return float(text) if "." in text else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of layers nor a share as 40% or 0.4") from None


def layers(text: str) -> list[int]:
    """Numbers of layers, counted from 0."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layers as 0,29") from None


def names(texts: Sequence[str]) -> list[str]:
    """Names given one by one or with commas between them."""
    return [name for text in texts for name in text.split(",") if name]


def _option(panel: str, help: str, **settings) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


WHAT = "What to drop"
ON = "Text to score on"
HOW = "Where and how it runs"
COUNT = {"parser": amount, "metavar": "N|SHARE"}

Model = Annotated[str, typer.Argument(help="smollm2-135m, a hub id (id@revision), a directory, a dropped checkpoint.")]
Attn = Annotated[str | None, _option(WHAT, "Attention layers to drop: 8, or a share as 40%.", **COUNT)]
Mlp = Annotated[str | None, _option(WHAT, "MLPs to drop.", **COUNT)]
Block = Annotated[str | None, _option(WHAT, "Whole blocks to drop.", **COUNT)]
Joint = Annotated[str | None, _option(WHAT, "Attention layers and MLPs to drop, ranked together.", **COUNT)]
Keep = Annotated[str | None, _option(WHAT, "Layers of which nothing is dropped.", parser=layers, metavar="0,29")]
PlanFile = Annotated[str | None, _option(WHAT, "Instead: what `llmdrop plan --json` printed.", metavar="FILE.json")]
Source = Annotated[str, _option(ON, "A named text, a .txt or .jsonl file, or a dataset of the hub.")]
NSamples = Annotated[int, _option(ON, "Samples; the paper takes 256.", min=1)]
SeqLen = Annotated[int, _option(ON, "Tokens in each; the paper takes 2048.", min=2)]
Seed = Annotated[int, _option(ON, "Chooses the samples.")]
DataDir = Annotated[str | None, _option(HOW, "A mirror of datasets, or hub. Default: packaged data, else the hub.")]
BatchSize = Annotated[int, _option(HOW, "Sequences at a time.", min=1)]
Dtype = Annotated[str, _option(HOW, "float32, bfloat16, float16; auto: the checkpoint's own.")]
Device = Annotated[str, _option(HOW, "cpu, cuda, cuda:1, mps, balanced (over all GPUs); auto.")]
Format = Literal["auto", "hf", "gguf", "nemotron-nas"]
Weights = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that llmdrop wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on standard output.")]


@dataclass(frozen=True)
class Choice:
    """What to drop, as asked for: so many of each target of `plan_drop`, none of the layers in keep; or a plan."""

    counts: dict[str, int | float | str | None]
    keep: list[int] | None = None
    file: str | None = None

    @property
    def is_scored(self) -> bool:
        return any(self.counts.values())

    def checked(self, is_needed: bool = True) -> "Choice":
        """Itself. Raises UsageError for what does not go together, and what `as_plan` raises for the file."""
        if self.file and (self.is_scored or self.keep):
            raise UsageError("--plan says all; leave out --attn, --mlp, --block, --joint and --keep")
        if is_needed and not self.file and not self.is_scored:
            raise UsageError("nothing to drop; give --attn, --mlp, --block or --joint a number, or a --plan")
        if self.keep and not self.is_scored:
            raise UsageError("--keep protects layers of what is dropped; give --attn, --mlp, --block or --joint")
        if self.file:
            self.read()
        return self

    def read(self, n_layers: int | None = None) -> "DropPlan":
        """The plan in the file, of a model of so many layers. ValueError names the file that is none."""
        from llmdrop.plan import as_plan

        if not self.file.endswith(".json"):
            raise UsageError(f"--plan {self.file}: give a .json file, as `llmdrop plan --json` prints it")
        try:
            plan = as_plan(self.file, n_layers)
            return plan.for_depth(n_layers) if n_layers else plan
        except ValueError as error:
            raise ValueError(f"--plan {self.file}: {error}") from error

    def by(self, scores: "ImportanceScores") -> "DropPlan":
        """The plan by these scores: the union of what was asked for."""
        import llmdrop

        plan = llmdrop.DropPlan(n_layers=len(scores.attn))
        for target, n in self.counts.items():
            if n:
                part = llmdrop.plan_drop(scores, target, n, keep=self.keep or [])
                if not part:
                    raise ValueError(
                        f"--{target} {n} of {len(scores.attn)} layers is less than half a layer; give more"
                    )
                plan |= part
        return plan

    def plan(self, model: "nn.Module", text: Callable[[], "Calibration"], batch_size: int = 8) -> "DropPlan":
        """The plan for a model, which is scored on `text()` if need be; scores are stored."""
        import llmdrop

        if self.file:
            n_layers = llmdrop.find_anatomy(model).n_layers
            return self.read(n_layers)
        if not self.is_scored:
            return llmdrop.DropPlan()
        self.check_fits(model)
        return self.by(llmdrop.Store().score(model, text(), batch_size))

    def check_fits(self, model: "nn.Module") -> None:
        """ValueError for more layers than the model has, or all of them: known before it is scored."""
        import numpy as np

        import llmdrop

        parts = llmdrop.find_anatomy(model)
        layer = np.arange(parts.n_layers, dtype=float)
        there = {kind: np.where(np.isin(layer, parts.live(kind)), layer, np.nan) for kind in ("attn", "mlp")}
        some_scores = llmdrop.ImportanceScores(**there, block=np.fmax(*there.values()), stderr={}, magnitude={})
        with llmdrop.dropped(model, self.by(some_scores)):
            pass


# -- the commands -----------------------------------------------------------------------------------------------------


def command(example: str) -> Callable:
    """Make a function a command. While it runs, what is printed goes to standard error."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        @wraps(function)
        def run(**given) -> None:
            with redirect_stdout(sys.stderr):
                record, text = function(**given)
            say(record, text, given["as_json"])

        app.command(epilog=f"Example: {example}")(run)
        return function

    return register


def say(record: Any, text: str, as_json: bool) -> None:
    """Write the answer. OSError where nobody reads it, or there is no room for it."""
    try:
        print(json.dumps(record, ensure_ascii=False, allow_nan=False) if as_json else text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more when it ends
        raise OSError(f"the answer cannot be written: {error.strerror}") from error


@app.callback(invoke_without_command=True)
def llmdrop_(is_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Which layers of a language model can you throw away, and what do you get for it?"""
    if is_version:
        print(version("llmdrop"))
        raise typer.Exit()


@command("llmdrop score smollm2-135m --json > scores.json")
def score(
    model: Model,
    calibration: Source = "xsum",
    n_samples: NSamples = 16,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Score every attention layer, MLP and block: 1 - cos(x, y), where low means redundant."""
    import llmdrop
    from llmdrop.calibration import check_source

    check_source(calibration)
    loaded, tokenizer = llmdrop.load_model(model, dtype, device)
    text = llmdrop.load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)
    scores = llmdrop.Store().score(loaded, text, batch_size)
    rows = scores.to_frame().pivot(index="layer", columns="kind", values=["score", "stderr"])
    table = rows[[(value, kind) for kind in ("attn", "mlp", "block") for value in ("score", "stderr")]]
    table.columns = ["attention", "±", "MLP", "±", "block", "±"]
    about = f"1 - cos(x, y), ± standard error, of {model} on {n_samples} x {seq_len} tokens of {text.source}"
    record = scores.to_record() | {"model": model, "calibration": text.source}
    return record, f"{table.to_string(float_format='{:.4f}'.format, na_rep='-')}\n\n{about}"


@command("llmdrop plan smollm2-135m --attn 8 --keep 0,29 --json > plan.json")
def plan(
    model: Annotated[str, typer.Argument(help="As for score; or what `llmdrop score --json` printed, as scores.json.")],
    attn: Attn = None,
    mlp: Mlp = None,
    block: Block = None,
    joint: Joint = None,
    keep: Keep = None,
    calibration: Source = "xsum",
    n_samples: NSamples = 16,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Choose the layers to drop: those that score lowest."""
    choice = Choice(dict(attn=attn, mlp=mlp, block=block, joint=joint), keep).checked()
    import llmdrop
    from llmdrop.calibration import check_source

    if model.endswith(".json"):
        chosen = choice.by(llmdrop.ImportanceScores.from_json(Path(model).read_text(encoding="utf-8")))
    else:
        check_source(calibration)
        loaded, tokenizer = llmdrop.load_model(model, dtype, device)
        chosen = choice.plan(
            loaded,
            lambda: llmdrop.load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir),
            batch_size,
        )
    return json.loads(chosen.to_json()), in_words(chosen)


def in_words(plan: "DropPlan") -> str:
    """A plan for people."""
    lines = [f"{plan.label}, layers counted from 0"]
    lines += [
        f"  {kind}: {', '.join(map(str, of))}" for kind, of in (("attention", plan.attn), ("MLP", plan.mlp)) if of
    ]
    return "\n".join(lines)


@command("llmdrop drop smollm2-135m smaller/ --attn 8")
def drop(
    model: Model,
    out: Annotated[str, typer.Argument(help="Where to save: a directory, or a file.gguf for llama.cpp.")],
    attn: Attn = None,
    mlp: Mlp = None,
    block: Block = None,
    joint: Joint = None,
    keep: Keep = None,
    plan: PlanFile = None,
    reconstruct: Annotated[
        bool, _option(WHAT, "Make up for what is gone in the matrices before it, by least squares.")
    ] = False,
    overwrite: Overwrite = False,
    format: Annotated[Format, typer.Option(help="gguf: llama.cpp; nemotron-nas: vLLM; auto: as OUT ends.")] = "auto",
    weights: Annotated[Weights | None, typer.Option(help="Of a GGUF; default: f16.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Also upload it there.", metavar="OWNER/NAME")] = None,
    calibration: Source = "xsum",
    n_samples: NSamples = 16,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Score, drop and save; say what it saves and costs, and check that what was saved is the same model."""
    choice = Choice(dict(attn=attn, mlp=mlp, block=block, joint=joint), keep, plan).checked()
    import llmdrop
    from llmdrop.calibration import check_source
    from llmdrop.checkpoints.destination import check_destination
    from llmdrop.checkpoints.push import check_can_push
    from llmdrop.compress.reconstruction import fit
    from llmdrop.compress.reconstruction import reconstruct as reconstruct_
    from llmdrop.data.texts import mixture
    from llmdrop.files import real_path

    if format == "auto":
        format = "gguf" if out.endswith(".gguf") else "hf"
    if weights and format != "gguf":
        raise UsageError(f"--weights {weights} is of a GGUF; give OUT as a file.gguf, or --dtype for a directory")
    # what would end it after the long part
    if format != "gguf":  # a GGUF is checked when it is written
        check_destination(real_path(out), overwrite)
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    if not plan:
        check_source(calibration)
    loaded, tokenizer = llmdrop.load_model(model, dtype, device)
    kind = str(loaded.dtype).removeprefix("torch.")

    @cache
    def text() -> "Calibration":
        return llmdrop.load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)

    chosen = choice.plan(loaded, text, batch_size)
    changes = {}
    if reconstruct:
        fitted_on = mixture(RECONSTRUCTED_ON, tokenizer, 5, seq_len, seed, data_dir)
        changes = fit(loaded, chosen, fitted_on, "sequential least squares", batch_size)
    measured = before_and_after(loaded, tokenizer, chosen, changes, data_dir)
    note = f"Layers chosen by {f'the plan {plan}' if plan else f'the lowest scores on {text().source}'}"
    note += ", what they wrote reconstructed by least squares." if reconstruct else "."
    if "loss" in measured:
        before, after = measured["loss"]
        note += f" Loss on held-out text: {before:.3f} nats per token before, {after:.3f} after."
    reconstruct_(loaded, chosen, changes)  # for good
    settings = {"weights": weights or "f16"} if format == "gguf" else {"note": note}
    saved_logits = logits(loaded)
    path = llmdrop.save_model(loaded, tokenizer, out, overwrite, format, push_to_hub=push_to_hub, **settings)
    del loaded  # a large model and its copy may not fit side by side
    if format == "hf" and not logits(llmdrop.load_model(path, kind, device)[0]).equal(saved_logits):
        raise RuntimeError(f"the checkpoint in {path} does not give the logits of the model that was saved there")
    record = {"path": str(path), "label": chosen.label, "plan": json.loads(chosen.to_json())}
    shown = measured.rename(columns=MEASURES).T
    shown["ratio"] = (shown["after"] / shown["before"]).map("{:.3f}".format)
    for name in ("before", "after"):
        shown[name] = [f"{value:,.0f}" if value > 100 else f"{value:.4f}" for value in shown[name]]
    checked = ", and loads with equal logits" if format == "hf" else ""
    lines = [in_words(chosen), shown.to_string(), f"saved in {path}{checked}"]
    return record | measured.to_dict("index"), "\n\n".join(lines)


MEASURES = {
    "loss": "loss on held-out text (nats per token)",
    "parameters": "parameters",
    "kv_bytes": "KV cache of 2048 tokens (bytes)",
}


def before_and_after(model: "nn.Module", tokenizer, plan: "DropPlan", changes: dict, data_dir) -> "pd.DataFrame":
    """What dropping costs and saves: rows before and after, a column for each of MEASURES that can be had."""
    import pandas as pd

    import llmdrop
    from llmdrop.compress.reconstruction import reconstructed
    from llmdrop.data.texts import held_out_texts

    texts = {}
    try:
        texts = held_out_texts(tokenizer, data_dir=data_dir)
    except (FileNotFoundError, ImportError) as error:
        print(f"llmdrop: what it costs is not measured, for want of text: {one_line(error)}")
    rows = {}
    for name, dropped, changed in (("before", llmdrop.DropPlan(), {}), ("after", plan, changes)):
        with reconstructed(model, dropped, changed):
            losses = [llmdrop.perplexity(model, text)["log_perplexity"] for text in texts.values()]
            rows[name] = {"loss": sum(losses) / len(losses)} if losses else {}
            rows[name] |= {"parameters": model.num_parameters(), "kv_bytes": llmdrop.kv_cache_bytes(model, 1, 2048)}
    return pd.DataFrame.from_dict(rows, orient="index")


def logits(model: "nn.Module") -> "torch.Tensor":
    """Of a few tokens, [1, T, V], on the CPU."""
    import torch

    ids = torch.arange(32).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.inference_mode():
        return model(ids.to(model.device)).logits.cpu()


@command("llmdrop evaluate smollm2-135m piqa openbookqa --attn 8 --limit 200")
def evaluate(
    model: Model,
    tasks: Annotated[list[str], typer.Argument(help="Tasks, groups or tags of lm-eval, or YAML files of your own.")],
    attn: Attn = None,
    mlp: Mlp = None,
    block: Block = None,
    joint: Joint = None,
    keep: Keep = None,
    plan: PlanFile = None,
    limit: Annotated[
        int | None, typer.Option(help="So many questions of each task, at random; default: all.", min=1)
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples; default: the task's own.", min=0)] = None,
    chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask in the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the questions.")] = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Ask lm-eval's benchmarks, of the model and, where something is to be dropped, of what is left."""
    choice = Choice(dict(attn=attn, mlp=mlp, block=block, joint=joint), keep, plan).checked(is_needed=False)
    import llmdrop

    loaded, tokenizer = llmdrop.load_model(model, dtype, device)
    plans = with_baseline(choice.plan(loaded, lambda: llmdrop.load_calibration("xsum", tokenizer, data_dir=data_dir)))
    rows = llmdrop.evaluate_sweep(
        loaded,
        tokenizer,
        plans,
        names(tasks),
        limit,
        data_dir,
        num_fewshot,
        batch_size,
        seed=seed,
        apply_chat_template=chat_template,
    )
    return records(rows), rows.to_string(index=False, float_format="{:.4f}".format, na_rep="-")


@command("llmdrop speed smollm2-135m --attn 8 --prompt-len 512 --new-tokens 64")
def speed(
    model: Model,
    attn: Attn = None,
    mlp: Mlp = None,
    block: Block = None,
    joint: Joint = None,
    keep: Keep = None,
    plan: PlanFile = None,
    batch_size: BatchSize = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Measurements, in turn with the whole model's.", min=3)] = 3,
    data_dir: DataDir = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Time generation on this machine, of the model and, where something is to be dropped, of what is left."""
    choice = Choice(dict(attn=attn, mlp=mlp, block=block, joint=joint), keep, plan).checked(is_needed=False)
    import llmdrop

    loaded, tokenizer = llmdrop.load_model(model, dtype, device)
    plans = with_baseline(choice.plan(loaded, lambda: llmdrop.load_calibration("xsum", tokenizer, data_dir=data_dir)))
    rows = llmdrop.compare_speed(
        loaded, plans, rounds, batch_size=batch_size, prompt_len=prompt_len, new_tokens=new_tokens
    )
    shown = rows[["plan", "tokens_per_second", "prefill_seconds", "decode_seconds"]].assign(
        **{"KV cache (MB)": rows["kv_bytes"] / 1e6, "weights (MB)": rows["weight_bytes"] / 1e6}
    )
    shown["times as fast"] = rows["speedup"]
    shown["at least"] = rows["speedup_low"]
    shown["at most"] = rows["speedup_high"]
    return records(rows), shown.to_string(index=False, float_format="{:.3f}".format, na_rep="out of memory")


def with_baseline(plan: "DropPlan") -> dict[str, "DropPlan"]:
    """The whole model, and the plan where it drops anything, by label."""
    import llmdrop

    return {each.label: each for each in (llmdrop.DropPlan(), plan)}


def records(rows: "pd.DataFrame") -> list[dict]:
    """Rows as plain JSON, null for what there is none of."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


@app.command(epilog="Example: llmdrop serve smollm2-135m --attn 8 --port 8080")
def serve(
    model: Annotated[str, typer.Argument(help="As for score; or a file.gguf, which is served as it is.")],
    attn: Attn = None,
    mlp: Mlp = None,
    block: Block = None,
    joint: Joint = None,
    keep: Keep = None,
    plan: PlanFile = None,
    port: Annotated[int, typer.Option(help="Of this machine.", min=1, max=65535)] = 8080,
    data_dir: DataDir = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Drop, export and serve with llama.cpp or vLLM, whichever is installed, by OpenAI's protocol."""
    choice = Choice(dict(attn=attn, mlp=mlp, block=block, joint=joint), keep, plan).checked(is_needed=False)
    with redirect_stdout(sys.stderr):
        import llmdrop
        from llmdrop.checkpoints.embedded import short_name
        from llmdrop.serving.launch import served_format, server_command

        if model.endswith(".gguf") and not choice.is_scored and not choice.file:
            path = Path(model).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"no file {model}; give a .gguf that is there, or a model")
            program = server_command(path, port)
        else:
            settings = served_format()
            loaded, tokenizer = llmdrop.load_model(model, dtype, device)
            dropped = choice.plan(loaded, lambda: llmdrop.load_calibration("xsum", tokenizer, data_dir=data_dir))
            llmdrop.apply_plan(loaded, dropped)
            name = short_name(model) + (f"-{dropped.label}" if dropped else "")
            path = llmdrop.build_dir() / "serve" / (f"{name}.gguf" if settings["format"] == "gguf" else name)
            program = server_command(path, port)
            path.parent.mkdir(parents=True, exist_ok=True)
            llmdrop.save_model(loaded, tokenizer, path, overwrite=True, **settings)
            if dropped:
                print(in_words(dropped))
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    ask = f"curl {url} -H 'Content-Type: application/json' -d '{QUESTION}'"
    say({"url": url, "file": str(path), "command": program}, f"{' '.join(program)}\n\nTry it:\n\n{ask}\n", as_json)
    if as_json:
        os.dup2(2, 1)  # what the server prints
    os.execv(program[0], program)


@command("llmdrop study smollm2-135m --max-loss 0.05 --out study/")
def study(
    model: Model,
    calibration: Source = "xsum",
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval to ask as well; may be repeated.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Nats per token that a plan may lose; default: 0.05.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Or how many times as fast it must be, as 1.2.")] = None,
    kv: Annotated[float | None, typer.Option(help="Or the share of the KV cache that may be left, as 0.7.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at a time, where you run it; default: 1.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of context, there; default: 1024.", min=1)] = None,
    samples: Annotated[int | None, typer.Option(help="Of text: more are surer; default: 16.", min=1)] = None,
    out: Annotated[str | None, typer.Option(help="For page and figures; default: build/study/MODEL.")] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Answer:
    """Study one model: what is redundant, what dropping it costs and brings; on one page, for any browser."""
    from llmdrop.checkpoints.extras import import_extra

    import_extra("papermill", "repro")
    from llmdrop.repro.study import study as study_

    given = dict(
        CALIBRATION=calibration,
        TASKS=names(tasks or []) or None,
        MAX_LOSS=max_loss,
        SPEEDUP=speedup,
        KV=kv,
        BATCH=batch,
        CONTEXT=context,
        SAMPLES=samples,
        DEVICE=device,
        DATA_DIR=data_dir,
    )
    page = study_(model, out, **{name: value for name, value in given.items() if value is not None})
    return {"page": str(page)}, f"written: {page}"


# -- errors -----------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:  # raised by the system, not by a sentence
        return f"{error.strerror}: {error.filename}"
    if hasattr(error, "ename"):  # of a cell of a notebook, which brings the whole traceback
        return f"{error.ename}: {' '.join(error.evalue.split())}"
    said = str(error).replace("overwrite=True", "--overwrite") if isinstance(error, FileExistsError) else str(error)
    return " ".join(said.split()) or type(error).__name__


def failed(message: str, code: int) -> int:
    print(f"llmdrop: {message}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for a mistake in the arguments, 130 if interrupted, else 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "15")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    program = typer.main.get_command(app)
    try:
        code = program(arguments or ["--help"], prog_name="llmdrop", standalone_mode=False) or 0
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "llmdrop"
        message = " ".join(error.format_message().split()).rstrip(".")
        return failed(f"{message} (see {path} --help)", 2)
    except (typer.Abort, KeyboardInterrupt):  # newer releases of typer return 130 instead
        code = 130
    except Exception as error:
        if os.environ.get("LLMDROP_TRACEBACK"):
            raise
        is_said = isinstance(error, OSError | ValueError | TypeError | ImportError | RuntimeError)
        return failed(one_line(error) if is_said else f"{type(error).__name__}: {one_line(error)}", 1)
    return failed("interrupted; what has been measured is kept", code) if code == 130 else code


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
