"""Time of an lm-eval evaluation: the limit, ours, and stock HFLM; one dense model, and a sweep of drop plans.

    .venv/bin/python benchmarks/evaluation.py [--task openbookqa] [--limit 40] [--plans 16] [--dtype float32]

The limit of the dense evaluation is the time of a plain forward pass, at the best of several batch shapes, over the
tokens that any exact evaluation must process: every distinct (context, continuation) prefix once, nothing padded. All
are timed in turn in one process; quote medians and ratios. Accuracies must be equal, log-likelihoods are compared.
"""

import argparse
import logging
import statistics
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

import llmdrop
from llmdrop.evaluation.lm_eval_models import SweepLM
from llmdrop.evaluation.sweep import Item, pack
from llmdrop.evaluation.tasks import load_tasks

# what keeps a device busy: batches of the plain forward pass, and batch sizes of stock lm-eval
SHAPES = {
    "cpu": ((1, 256), (1, 512), (4, 128), (8, 64), (8, 128)),
    "cuda": ((4, 512), (8, 512), (32, 128), (64, 128), (128, 64), (16, 1024)),
}
STOCK = {"cpu": [1, 4, 16], "cuda": [16, 64, 256]}


def timed(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def answers(lm, requests) -> np.ndarray:
    return np.array([value for value, _ in lm.loglikelihood(requests, True)])


def chosen(values: np.ndarray, requests) -> list[int]:
    """The answer picked for each question, by log-likelihood."""
    picks: dict[int, tuple[float, int]] = {}
    for value, request in zip(values, requests, strict=True):
        if request.doc_id not in picks or value > picks[request.doc_id][0]:
            picks[request.doc_id] = value, request.idx
    return [index for _, index in picks.values()]


def limit_seconds(model, n_tokens: int, rounds: int) -> tuple[float, str]:
    """Least time for n_tokens of plain forward, head included, over a few batch shapes."""
    best = (float("inf"), "")
    for batch, length in SHAPES[model.device.type]:
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
        with torch.inference_mode():
            model.base_model(ids, use_cache=False)
            seconds = min(timed(lambda ids=ids: model.base_model(ids, use_cache=False))[0] for _ in range(rounds))
        best = min(best, (seconds / ids.numel() * n_tokens, f"{batch} x {length}"))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="of stock lm-eval")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = llmdrop.load_model(args.model, args.dtype, args.device)
    task = next(iter(load_tasks([args.task], args.data_dir)[args.task].values()))
    task.build_all_requests(limit=args.limit, rank=0, world_size=1)
    requests = task.instances

    def ours(plans):
        return SweepLM(model, tokenizer, plans, progress=False)

    def stock(batch_size):
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    encoded = [ours({"": llmdrop.DropPlan()})._encode_pair(*request.args) for request in requests]
    items = [Item(tuple(context + continuation), len(continuation)) for context, continuation in encoded]
    n_tokens = sum(len(row.ids) for row in pack(items, 10**9))
    n_scored = len({(item.tokens[: len(item.tokens) - k]) for item in items for k in range(1, item.n_scored + 1)})
    print(f"{args.task}, {args.limit} questions, {len(items)} requests, {args.dtype}, {model.device}")
    print(f"distinct tokens {n_tokens}, scored positions {n_scored}, stock reads {sum(len(i.tokens) for i in items)}")

    dense = {"": llmdrop.DropPlan()}
    answers(ours(dense), requests)  # warm up
    rows: dict[str, list[float]] = {}
    shapes = set()
    for turn in range(args.rounds):
        body, shape = limit_seconds(model, n_tokens, 2)
        hidden = torch.randn(n_scored, model.config.hidden_size, device=model.device, dtype=model.dtype)
        with torch.inference_mode():
            head, _ = timed(lambda hidden=hidden: model.get_output_embeddings()(hidden))
        shapes.add(shape)
        rows.setdefault("limit", []).append(body + head)
        seconds, mine = timed(lambda: answers(ours(dense), requests))
        rows.setdefault("ours", []).append(seconds)
        for size in (
            *(args.batch_sizes or STOCK[model.device.type]),
            *(["auto"] if turn == 0 else []),
        ):  # auto takes minutes to find its size
            seconds, theirs = timed(lambda size=size: answers(stock(size), requests))
            rows.setdefault(f"stock, batch size {size}", []).append(seconds)
    median = {name: statistics.median(values) for name, values in rows.items()}
    best = min((value, name) for name, value in median.items() if name.startswith("stock") and "auto" not in name)
    print("\ndense")
    print(f"limit: forward at the best of its batch shapes ({', '.join(sorted(shapes))}), head on scored positions")
    for name, value in median.items():
        print(f"  {value:8.2f} s  x{value / median['ours']:.2f} of ours   {name}")
    limit = statistics.median(mine / bare for mine, bare in zip(rows["ours"], rows["limit"], strict=True))
    print(
        f"  ours / limit {limit:.2f} (median of rounds);  best stock ({best[1]}) / ours {best[0] / median['ours']:.2f}"
    )
    flips = sum(a != b for a, b in zip(chosen(mine, requests), chosen(theirs, requests), strict=True))
    print(
        f"  largest log-likelihood difference to stock {np.abs(mine - theirs).max():.2e}, answers that differ {flips}"
    )
    if args.dtype != "float32":
        one, many = (answers(stock(size), requests) for size in (1, 16))
        flips = sum(a != b for a, b in zip(chosen(one, requests), chosen(many, requests), strict=True))
        print(f"  stock against itself, batch 1 and 16: {np.abs(one - many).max():.2e}, answers that differ {flips}")

    text = llmdrop.load_calibration("xsum", tokenizer, 8, 256, data_dir=args.data_dir)
    scores = llmdrop.score(model, text, progress=False)
    plans = {f"Attn-{n}": llmdrop.plan_drop(scores, "attn", n) for n in range(1, args.plans + 1)}
    swept = ours(plans)
    sweep, _ = timed(lambda: answers(swept, requests))
    size = int(best[1].split()[-1])
    each, worst = [], 0.0
    for name, plan in plans.items():
        with llmdrop.dropped(model, plan):
            seconds, theirs = timed(lambda: answers(stock(size), requests))
        each.append(seconds)
        swept.current = name
        worst = max(worst, np.abs(answers(swept, requests) - theirs).max())
    print(f"\nsweep of {len(plans)} attention plans\n  {sweep:8.2f} s  ours\n  {sum(each):8.2f} s  stock, {best[1]}")
    print(f"  stock / ours {sum(each) / sweep:.2f}; largest log-likelihood difference {worst:.2e}")


if __name__ == "__main__":
    main()
