"""Time of `score` over the model's plain forward pass, and its peak memory for 16 and for 128 samples.

    .venv/bin/python benchmarks/scoring.py [--model smollm2-135m] [--device auto] [--dtype float32] [--rounds 5]

The two are timed in turn on the same batches in one process; quote the median ratio. Goal 1.05, at most 1.10.
Memory is the peak resident set of a fresh process per size (CUDA: peak allocated bytes). Goal: ratio at most 1.02.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

import llmdrop


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function, device) -> float:
    start = clock(device)
    function()
    return clock(device) - start


def peak(args, n_samples: int) -> int:
    """Peak bytes of a fresh process that scores n_samples."""
    command = [sys.executable, __file__, "--model", args.model, "--device", args.device, "--dtype", args.dtype]
    command += ["--peak-of", str(n_samples)] + (["--data-dir", args.data_dir] if args.data_dir else [])
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data-dir")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, tokenizer = llmdrop.load_model(args.model, args.dtype, args.device)
    device = model.get_input_embeddings().weight.device
    if args.peak_of:
        text = llmdrop.load_calibration("xsum", tokenizer, args.peak_of, 128, data_dir=args.data_dir)
        llmdrop.score(model, text, batch_size=args.batch_size, progress=False)
        cuda = device.type == "cuda"
        print(torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    text = llmdrop.load_calibration("xsum", tokenizer, 2 * args.batch_size, args.seq_len, data_dir=args.data_dir)
    batches = text.input_ids.to(device).split(args.batch_size)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(batch, use_cache=False)

    def scored() -> None:
        llmdrop.score(model, text, batch_size=args.batch_size, progress=False)

    forward()  # warm up
    scored()
    pairs = [(timed(scored, device), timed(forward, device)) for _ in range(args.rounds)]
    ratios = [a / b for a, b in pairs]
    print(f"score    median {statistics.median(a for a, _ in pairs):.3f} s")
    print(f"forward  median {statistics.median(b for _, b in pairs):.3f} s")
    print(f"ratio    median {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")
    small = peak(args, 16)
    large = peak(args, 128)
    print(
        f"memory   16 samples {small / 2**20:.0f} MiB, 128 samples {large / 2**20:.0f} MiB, ratio {large / small:.3f}"
    )


if __name__ == "__main__":
    main()
