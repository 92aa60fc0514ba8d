"""Which decoder types of the installed transformers llmdrop can handle, tried on a tiny random model of each.

    .venv/bin/python benchmarks/families.py [type ...] [--jobs 2] [--out docs/families.md]

For each type: is a residual split proven; does `score` run; is dropping the same as adding nothing, for eight kinds of
plans; is generation with a cache the same as without one, dynamic, static and padded on the left; can texts share rows
in evaluation; is what is saved what is loaded; is a model without a block an ordinary checkpoint. Or why not. Takes
minutes and writes the table that docs show.
"""

import argparse
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import decoders  # noqa: E402

from llmdrop import Calibration, DropPlan, dropped, find_anatomy, save_model, score  # noqa: E402
from llmdrop.checkpoints.load import load_weights  # noqa: E402
from llmdrop.evaluation.sweep import Item, loglikelihoods  # noqa: E402
from llmdrop.proof import first_tensor, with_first  # noqa: E402
from llmdrop.prune import apply_plan  # noqa: E402

COLUMNS = ("score", "drop", "cache", "static", "padded", "packed", "save", "block")
TOLERANCE = 1e-4  # of logits in float32
NEW_TOKENS = 20
YES = "yes"


def plans(n: int) -> dict[str, DropPlan]:
    """Kinds of plans for a model of n layers."""
    last = n - 1
    return {
        "first attention": DropPlan([0]),
        "first and last attention": DropPlan([0, last]),
        "all attention but the last": DropPlan(range(last)),
        "all attention but the first": DropPlan(range(1, n)),
        "all attention": DropPlan(range(n)),
        "first and last MLP": DropPlan([], [0, last]),
        "first block": DropPlan([0], [0]),
        "a mixture": DropPlan([0, 1], [1, 2]),
    }


@contextmanager
def adding_nothing(model, plan: DropPlan) -> Iterator[None]:
    """The reference for dropping: the whole model, with what the plan's sublayers give multiplied by zero."""
    parts = find_anatomy(model)
    hooks = []
    for i in plan.blocks:
        hooks.append(parts.layers[i].register_forward_hook(_passed_on, with_kwargs=True))
    for kind in ("attn", "mlp"):
        for i in getattr(plan, kind):
            sublayer = parts.sublayer(kind, i)
            for name in sublayer.writers if sublayer and i not in plan.blocks else ():
                hooks.append(parts.layers[i].get_submodule(name).register_forward_hook(_zeroed))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeroed(module, args, output):
    return with_first(output, first_tensor(output) * 0)


def _passed_on(module, args, kwargs, output):
    return with_first(output, args[0] if args else kwargs["hidden_states"])


def possible(model) -> dict[str, DropPlan]:
    """The plans that leave something of this model, and no reader without what it reads."""
    found = {}
    for name, plan in plans(find_anatomy(model).n_layers).items():
        try:
            with dropped(model, plan):
                found[name] = plan
        except ValueError:
            continue
    return found


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def check_score(model, ids) -> str:
    scores = score(model, Calibration(ids, "random"), progress=False)
    live = find_anatomy(model).live("attn")
    return YES if torch.tensor(scores.attn[live]).isfinite().all() else "not finite"


def check_drop(model, ids) -> str:
    whole = logits(model, ids)
    for name, plan in possible(model).items():
        with adding_nothing(model, plan):
            expected = logits(model, ids)
        with dropped(model, plan):
            off = float((logits(model, ids) - expected).abs().max())
        if not off <= TOLERANCE:
            return f"{name}: off by {off:.1g}"
        if not torch.equal(logits(model, ids), whole):
            return f"{name}: not restored"
    return YES


def check_generation(model, ids, mask=None, **settings) -> str:
    for name, plan in {"nothing dropped": DropPlan(), **possible(model)}.items():
        mask = torch.ones_like(ids) if mask is None else mask
        with dropped(model, plan):
            how = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
            plain = model.generate(ids, use_cache=False, **how)
            try:
                cached = model.generate(ids, disable_compile=True, **settings, **how)
            except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                reason = ", refused" if "use_cache=False" in str(error) else f": {type(error).__name__}"
                return name + reason
        if not torch.equal(plain, cached):
            return f"{name}: differs"
    return YES


def check_packed(model, ids) -> str:
    """Also that log-likelihoods are the model's own, whichever way they are computed."""
    items = [Item(tuple(row.tolist()), 4) for row in ids]
    plan = DropPlan([0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sums, _ = loglikelihoods(model, [plan], items, progress=False)
    with dropped(model, plan):
        logp = logits(model, ids).log_softmax(-1)[:, -5:-1].gather(-1, ids[:, -4:, None]).sum((1, 2))
    if not torch.allclose(torch.tensor(sums[0]), logp.double(), atol=1e-3):
        return "wrong"
    return "rows of their own" if any("share rows" in str(warning.message) for warning in said) else YES


def check_stock(model, ids) -> str:
    """Whether transformers loads what it saves of the whole model, without which there is nothing to ask of ours."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        except (ValueError, KeyError) as error:
            return f"nothing dropped: {type(error).__name__}"
    same = torch.allclose(logits(stock, ids), logits(model, ids), atol=TOLERANCE)
    return YES if same else "nothing dropped: differs"


def check_save(model, ids) -> str:
    stock = check_stock(model, ids)
    if stock != YES:
        return stock
    plan = DropPlan([0, 2], [1])
    with tempfile.TemporaryDirectory() as folder:
        with dropped(model, plan):
            expected = logits(model, ids)
            save_model(model, None, Path(folder) / "m")
        loaded = load_weights(Path(folder) / "m", dtype=torch.float32)
        same = torch.allclose(logits(loaded, ids), expected, atol=TOLERANCE)
    return YES if same and find_anatomy(loaded).plan == plan else "differs"


def check_block(model, ids) -> str:
    if check_stock(model, ids) != YES:
        return ""
    plan = DropPlan([1], [1])
    with tempfile.TemporaryDirectory() as folder:
        expected = logits(apply_plan(model, plan), ids)
        save_model(model, None, Path(folder) / "m")
        if (Path(folder) / "m" / "modeling_llmdrop.py").exists():
            return "own format"
        loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "m").eval()
        return YES if torch.allclose(logits(loaded, ids), expected, atol=TOLERANCE) else "differs"


CHECKS = {
    "score": check_score,
    "drop": check_drop,
    "cache": check_generation,
    "static": lambda model, ids: check_generation(model, ids, cache_implementation="static"),
    "padded": lambda model, ids: check_generation(model, *_padded(ids)),
    "packed": check_packed,
    "save": check_save,
    "block": check_block,
}


def _padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids * mask, mask


def row(kind: str) -> dict[str, str]:
    """The table's row of one type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    out = {"type": kind}
    try:
        model = decoders.tiny_decoder(kind)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        return out | {"reason": f"no tiny model of it was made: {_line(error)}"}
    try:
        find_anatomy(model)
    except ValueError as error:
        return out | {"reason": _line(error).partition("can be proven: ")[2] or _line(error)}
    ids = torch.randint(3, decoders.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    for column, check in CHECKS.items():
        try:
            with torch.no_grad():
                out[column] = check(model, ids)
        except Exception as error:  # whatever it is, it is the row's news
            where = traceback.extract_tb(error.__traceback__)[-1]
            out[column] = f"{type(error).__name__}: {_line(error)[:100]} ({Path(where.filename).name})"
    return out


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).replace("|", "/")[:240]


def passes(found: dict[str, str]) -> bool:
    """Scored, dropped exactly, and generating with a cache as without one."""
    return all(found.get(column) == YES for column in ("score", "drop", "cache"))


def table(rows: list[dict[str, str]]) -> str:
    proven = [found for found in rows if "reason" not in found]
    refused = [found for found in rows if "reason" in found]
    lines = [
        "# Decoder types",
        "",
        f"Made by `make families` with transformers {transformers.__version__}, on tiny random models of the "
        f"{len(rows)} types that it lists as causal language models (parts of encoder-decoders left out). A residual "
        f"split can be proven in {len(proven)}; {sum(map(passes, rows))} of these are scored, dropped from exactly, "
        "and generate with a cache what they generate without one. The others are refused, each with the reason.",
        "",
        "- `score`: scoring runs.",
        "- `drop`: the dropped model computes what the model does with those outputs at zero. Tried without the first, "
        "the last, all but one and all attention layers; without an MLP, a block, and a mixture.",
        "- `cache`, `static`, `padded`: with a dynamic cache, with a static one, and with padded prompts, generation "
        "gives what it gives without a cache.",
        "- `packed`: evaluation puts several texts into one row, or gives each a row of its own.",
        "- `save`: what is loaded is what was saved.",
        "- `block`: without a block, the checkpoint is an ordinary one of its type, or in llmdrop's own format.",
        '- "nothing dropped: ..." in a cell: transformers itself does this, without llmdrop.',
        "",
        f"| type | {' | '.join(COLUMNS)} |",
        f"|---{'|---' * len(COLUMNS)}|",
    ]
    for found in proven:
        lines.append(f"| {found['type']} | {' | '.join(found.get(column, '') for column in COLUMNS)} |")
    lines += ["", "## Refused", "", "| type | why |", "|---|---|"]
    lines += [f"| {found['type']} | {found['reason']} |" for found in refused]
    return "\n".join(lines) + "\n"


def some_rows(kinds: list[str], jobs: int) -> list[dict[str, str]]:
    """Rows of a few types, in processes of their own: where one is killed, each type is tried by itself."""
    try:
        with ProcessPoolExecutor(jobs) as pool:
            return list(pool.map(row, kinds))
    except BrokenProcessPool:
        if len(kinds) == 1:
            return [{"type": kinds[0], "reason": "its process was killed (out of memory?)"}]
        return [found for kind in kinds for found in some_rows([kind], 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds = args.types or decoders.decoder_types()
    rows = []
    for start in range(0, len(kinds), 4 * args.jobs):
        for found in some_rows(kinds[start : start + 4 * args.jobs], args.jobs):
            rows.append(found)
            print(found, flush=True)
    print(f"{sum(map(passes, rows))} of {len(rows)} types are scored, dropped exactly and generate with a cache")
    if args.out:
        args.out.write_text(table(rows))


if __name__ == "__main__":
    main()
