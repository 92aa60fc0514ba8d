"""What `make gpu` checks first: that a real GPU gives the CPU's numbers, and what only a real one can show.

Every check is a function of the device that returns (holds, what was found); one that raises does not hold.
"""

import tempfile
import time
from collections.abc import Callable

import device_cases
import numpy as np
import torch
from tiny import random_ids, tiny
from torch.nn.functional import scaled_dot_product_attention

from llmdrop import Calibration, DropPlan, apply_plan, score
from llmdrop.checkpoints.load import load_weights
from llmdrop.compress import search
from llmdrop.compress.shortened_llama import block_taylor
from llmdrop.speed.geometry import Int4Linear
from llmdrop.speed.measure import greedy_tokens
from llmdrop.streaming.score import score_checkpoint

Found = tuple[bool, str]
NEW_TOKENS = 32  # of a text that is decoded in two ways


def run_all(device: str) -> list[dict]:
    """A row per check: check, holds, found."""
    checks: dict[str, Callable[[str], Found]] = {}
    for family, act in device_cases.cases(device_cases.ONE_GPU):
        checks[f"{family}, {device_cases.name_of(act)}"] = _as_on_the_cpu(family, act)
    checks |= {
        "gradients": gradients,
        "streaming": streaming,
        "padding in bfloat16": padding,
        "graph": lambda device: decoding(device, "graph"),
        "compiled": lambda device: decoding(device, "compiled"),
        "int4 kernel": int4_kernel,
        "cuDNN attention": cudnn_attention,
    }
    if torch.cuda.device_count() > 1:
        checks["balanced"] = balanced
    rows = []
    for name, function in checks.items():
        try:
            holds, found = function(device)
        except Exception as error:  # one more thing to report, and the others go on
            holds, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append({"check": name, "holds": bool(holds), "found": found})
        print(f"{'holds' if holds else 'DIFFERS':8} {name}: {found}", flush=True)
    return rows


def _as_on_the_cpu(family: str, act: Callable) -> Callable[[str], Found]:
    def compare(device: str) -> Found:
        expected = np.asarray(act(tiny(family, "sdpa")), dtype=float)
        found = np.asarray(act(tiny(family, "sdpa").to(device)), dtype=float)
        return _close(found, expected)

    return compare


def _close(found: np.ndarray, expected: np.ndarray) -> Found:
    """Kernels sum in another order than the CPU's."""
    difference = float(np.nanmax(np.abs(found - expected), initial=0.0))
    same = np.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    return same, f"largest difference {difference:.1e}"


def gradients(device: str) -> Found:
    """Taylor's importance of sublayers and of blocks: the pretended GPU has no backward pass."""
    text = Calibration(random_ids(4, 24))
    values = []
    for where in ("cpu", device):
        model = tiny("llama", "sdpa").to(where)
        order = [i for _, i in search.taylor(model, text, "joint").order]
        values.append(np.array([*block_taylor(model, text), *order]))
    return _close(values[1], values[0])


def streaming(device: str) -> Found:
    """From pinned memory, the next layer read by threads while one computes."""
    text = Calibration(random_ids(6, 24))
    model = tiny("llama", "sdpa")
    expected = score(model, text, 2, progress=False).to_frame()["score"]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model", max_shard_size="20KB")
        settings = {"device": device, "stream_on": "host", "work_dir": f"{folder}/work", "progress": False}
        got = score_checkpoint(f"{folder}/model", text, 2, **settings).to_frame()["score"]
    return _close(got.to_numpy(), expected.to_numpy())


def _larger(device: str, dtype: torch.dtype):
    """A Llama with heads as wide as real ones', and two KV heads, fewer than eight."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    return tiny("llama", "sdpa", **shape, head_dim=64, max_position_embeddings=2048).to(device, dtype)


@torch.no_grad()
def padding(device: str) -> Found:
    """Logits of a prompt in a left-padded batch against those of the prompt alone."""
    model = _larger(device, torch.bfloat16)
    ids = random_ids(4, 96).to(device)
    mask = torch.ones_like(ids)
    for row, gap in enumerate((0, 13, 40, 71)):
        mask[row, :gap] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
    alone = torch.cat([model(ids[k : k + 1, mask[k].bool()]).logits[:, -1].float() for k in range(4)])
    difference = float((together - alone).abs().max() / alone.std())
    return bool(together.isfinite().all()) and difference < 0.1, f"{difference:.1e} of the spread"


def decoding(device: str, how: str) -> Found:
    """Tokens of a static cache against those of single steps with a growing one, whole and dropped."""
    same = []
    for dtype in (torch.float32, torch.bfloat16):
        for plan in (DropPlan(), DropPlan(attn=[0, 3], mlp=[2])):
            model = apply_plan(_larger(device, dtype), plan)
            prompt = random_ids(2, 64).to(device)
            expected = greedy_tokens(model, prompt, NEW_TOKENS)
            same.append(float((greedy_tokens(model, prompt, NEW_TOKENS, "static", how) == expected).float().mean()))
    # in 16 bits another order of sums turns near ties, after which texts differ
    return min(same[:2]) == 1, f"same tokens, float32 {min(same[:2]):.3f}, bfloat16 {min(same[2:]):.3f}"


def int4_kernel(device: str) -> Found:
    """The kernel against its 16-bit copy where all codes are the same, so that their order does not matter."""
    linear = Int4Linear(256, 512, torch.device(device).type).to_empty(device=device)
    linear.codes.view(torch.uint8).fill_(0x99)
    linear.scales.normal_(std=0.02, generator=torch.Generator(linear.scales.device).manual_seed(0))
    x = torch.randn(16, 256, device=device).bfloat16()
    expected = x.float() @ linear.dequantized().float().T
    difference = float((linear(x).float() - expected).abs().max() / expected.std())
    return difference < 0.05, f"{difference:.1e} of the spread"


def cudnn_attention(device: str) -> Found:
    """What switching it off costs, at one shape again and again and at new ones; numbers with it on against without."""
    former = torch.backends.cuda.cudnn_sdp_enabled()
    times = {}
    outputs = {}
    try:
        for is_on in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(is_on)
            for what, lengths in (("one shape", [2048] * 21), ("new shapes", range(1024, 2048, 49))):
                seconds = []
                for k, length in enumerate(lengths):
                    generator = torch.Generator(device).manual_seed(k)
                    q = torch.randn(2, 8, length, 128, device=device, generator=generator).bfloat16()
                    torch.cuda.synchronize(device)
                    start = time.perf_counter()
                    out = scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
                    torch.cuda.synchronize(device)
                    seconds.append(time.perf_counter() - start)
                times[what, is_on] = 1000 * float(np.median(seconds[1:]))
                outputs[what, is_on] = out.float()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(former)
    differences = [
        float((outputs[what, True] - outputs[what, False]).abs().max()) for what in ("one shape", "new shapes")
    ]
    found = ", ".join(f"{what} {times[what, True]:.2f} ms on, {times[what, False]:.2f} off" for what, on in times if on)
    return max(differences) < 0.05, f"{found}; largest difference {max(differences):.1e}"


def balanced(device: str) -> Found:
    """A model over two GPUs by accelerate's hooks."""
    worst = 0.0
    for family in device_cases.FAMILIES:
        expected = tiny(family, "sdpa")
        with tempfile.TemporaryDirectory() as folder:
            expected.save_pretrained(folder)
            spread = load_weights(folder, device="balanced")
        for act in (device_cases.scored, device_cases.perplexities, device_cases.searched):
            found, of_cpu = np.asarray(act(spread), float), np.asarray(act(expected), float)
            worst = max(worst, float(np.nanmax(np.abs(found - of_cpu))))
    return worst < 1e-3, f"largest difference {worst:.1e}"
