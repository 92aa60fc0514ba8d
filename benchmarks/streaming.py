"""Score and drop a checkpoint that is never loaded: time and memory against disk and plain forward pass, in one run.

    .venv/bin/python benchmarks/streaming.py [--folder build/synthetic] [--samples 16] [--keep]

Writes the checkpoint of synthetic.py first (6.4 GB, removed afterwards; twice that while dropping). Every part is a
process of its own, so that peaks are its own (VmHWM), and starts with the checkpoint out of the page cache. Goals:
score in at most 1.2 x max(reading the files, plain forward pass), peak below 1.5 GB + one layer; drop at 80 % of the
rate of a plain copy (before and after it; disks slow down when much is written) or more, peak below 1 GB. The plain
forward pass has the same arithmetic, batches and threads. Of the layers, which are all of one shape, it has a quarter
in memory, and is timed on a quarter of the samples before and on a quarter after the scoring; both are scaled up.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

BATCH, LENGTH = 1, 512


def peak() -> int:
    """Peak resident set of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def uncache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ids(n: int) -> torch.Tensor:
    return torch.randint(0, 128256, (n, LENGTH), generator=torch.Generator().manual_seed(0))


def stream(args) -> dict:
    import llmdrop

    start = time.perf_counter()
    scores = llmdrop.score_checkpoint(
        args.folder, llmdrop.Calibration(ids(args.samples)), BATCH, dtype=args.dtype, work_dir=args.folder / "work"
    )
    return {"seconds": time.perf_counter() - start, "peak": peak(), "attn": scores.attn[:3].round(4).tolist()}


def forward(args) -> dict:
    from accelerate import init_empty_weights
    from synthetic import config
    from transformers import AutoModelForCausalLM

    from llmdrop.checkpoints.load import check_device

    device = check_device("auto")  # where `score_checkpoint` computes, too
    layers = max(1, args.layers // 4)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config(layers), dtype=getattr(torch, args.dtype)).eval().base_model
    weights = {name: torch.full(p.shape, 0.01, dtype=p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    model.to(device)
    timed = max(BATCH, args.samples // 4)
    batches = ids(timed).to(device).split(BATCH)
    with torch.inference_mode():
        model(batches[0], use_cache=False)  # warm up
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for batch in batches:
            model(batch, use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds * args.layers / layers * args.samples / timed / 2}  # of half of the samples


def read(args) -> dict:
    buffer = bytearray(2**24)
    n = 0
    start = time.perf_counter()
    for path in sorted(args.folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while k := file.readinto(buffer):
                n += k
    return {"seconds": time.perf_counter() - start, "bytes": n}


def copy(args) -> dict:
    """All shards, as shutil copies, each waited for until it is on the disk."""
    target = args.folder / "copy"
    target.mkdir()
    n = 0
    start = time.perf_counter()
    for path in sorted(args.folder.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())
        n += path.stat().st_size
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return {"seconds": seconds, "bytes": n}


def drop(args) -> dict:
    import llmdrop

    plan = llmdrop.DropPlan(attn=range(args.layers // 2, args.layers * 3 // 4))
    start = time.perf_counter()
    out = llmdrop.drop_checkpoint(args.folder, plan, args.folder / "dropped", link=False)
    seconds = time.perf_counter() - start
    n = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {"seconds": seconds, "bytes": n, "peak": peak()}


PARTS = {function.__name__: function for function in (stream, forward, read, copy, drop)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/synthetic"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the arithmetic; the checkpoint is bfloat16")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--only", choices=["score", "drop"])
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    if not args.folder.exists():
        from synthetic import write_checkpoint

        print(f"writing {write_checkpoint(args.folder, args.layers) / 1e9:.2f} GB to {args.folder}", flush=True)

    def part(name: str) -> dict:
        uncache(args.folder)
        settings = ["--folder", args.folder, "--layers", args.layers, "--samples", args.samples, "--dtype", args.dtype]
        command = [sys.executable, __file__, "--part", name, *map(str, settings)]
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(f"  {name}: {result}", flush=True)
        return result

    if args.only != "drop":
        disk = part("read")
        before = part("forward")
        scored = part("stream")
        after = part("forward")
        plain = before["seconds"] + after["seconds"]
        limit = max(disk["seconds"], plain)
        layer = 100_669_440 * 2
        room = 1.5e9 + layer
        print(f"disk     {disk['seconds']:.1f} s, {disk['bytes'] / disk['seconds'] / 1e6:.0f} MB/s")
        print(f"forward  {plain:.1f} s for {args.samples} x {LENGTH} tokens")
        print(f"score    {scored['seconds']:.1f} s, {scored['seconds'] / limit:.3f} x the slower of the two (goal 1.2)")
        print(f"memory   {scored['peak'] / 1e9:.2f} GB (goal {room / 1e9:.2f}: 1.5 GB and a layer in bfloat16)")
    if args.only != "score":
        copies = [part("copy")]
        dropped = part("drop")
        copies.append(part("copy"))
        rate = sum(c["bytes"] for c in copies) / sum(c["seconds"] for c in copies)
        own = dropped["bytes"] / dropped["seconds"]
        print(f"copy     {rate / 1e6:.0f} MB/s")
        print(f"drop     {own / 1e6:.0f} MB/s = {own / rate:.2f} of it (goal 0.8), peak {dropped['peak'] / 1e9:.2f} GB")
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
