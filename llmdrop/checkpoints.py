"""Score the published checkpoints of a training run, and say how soon its final drop order is there (Figure 7)."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pandas as pd
from huggingface_hub import HfApi, snapshot_download
from scipy import stats
from transformers import AutoTokenizer

from .calibration import load_calibration
from .fingerprint import _code_digest, provenance, tokenizer_digest, version
from .models import build_dir, check_device, load_model
from .results import Store
from .scoring import ImportanceScores, score

TEXT_FILES = ["*.json", "*.txt", "*.model"]  # configuration and tokenizer


def score_checkpoints(
    model: str,
    revisions: Mapping[str, float],
    calibration: str = "c4",
    n_samples: int = 256,
    seq_len: int = 2048,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 8,
    keep: bool = True,
    store: Store | None = None,
) -> pd.DataFrame:
    """Score the checkpoints of one training run on one text: run, step, tokens, kind, layer, score, stderr, magnitude.

    model: a hub id, or a directory. revisions: {name: training tokens}, of a hub model its branches, tags or commits,
    of a directory its subdirectories. keep=False holds at most one hub checkpoint on disk, outside the hub's cache,
    and deletes it when it is scored. Each checkpoint is in the store as soon as it is scored, so a killed run goes on
    where it was, and nothing is downloaded twice.

    Raises, before any is scored: FileNotFoundError or ValueError for checkpoints that are not there, ValueError where
    their tokenizers differ, since scores on different tokens cannot be compared; then ValueError where depths differ.
    """
    device, places = check_device(device), _locate(model, revisions)
    tokenizers = {name: _tokenizer(model, name, place) for name, place in places.items()}
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in tokenizers.items()}
    last = max(revisions, key=revisions.get)
    if other := [name for name in revisions if digests[name] != digests[last]]:
        raise ValueError(
            f"{model}: the tokenizer of {', '.join(other)} is not that of {last}, so their scores cannot be compared; "
            "leave those checkpoints out"
        )
    text = load_calibration(calibration, tokenizers[last], n_samples, seq_len, seed, data_dir)
    key = {"model": model, "dtype": dtype, "device": device.split(":")[0], "calibration": text.digest}
    key |= {name: version(name) for name in ("torch", "transformers")}
    key |= {"code": {name: _code_digest(name) for name in ("scoring", "hooks", "anatomy", "models")}}
    key |= {"batch_size": None if dtype == "float32" else batch_size}
    wanted = [
        (key | {"revision": name, "place": _identity(place)}, f"{model}-{name}") for name, place in places.items()
    ]

    def compute(missing: list[int]) -> Iterator[dict]:
        for place in (list(places.values())[i] for i in missing):
            with _on_disk(model, place, keep) as where:
                loaded, _ = load_model(where, dtype, device)
                yield json.loads(score(loaded, text, batch_size).to_json())
                del loaded

    def facts() -> dict:
        return provenance(None, text) | {"model": model, "dtype": dtype, "device_type": device}

    values = (store or Store()).get_many("checkpoint", wanted, compute, facts)
    run = Path(model).name if Path(model).is_dir() else model
    frames = [
        ImportanceScores.from_json(json.dumps(value)).to_frame(run=run, step=name, tokens=revisions[name])
        for name, value in zip(places, values, strict=True)
    ]
    depths = {name: frame["layer"].nunique() for name, frame in zip(places, frames, strict=True)}
    if len(set(depths.values())) > 1:
        raise ValueError(f"{model}: these checkpoints differ in depth, so they are not of one run: {depths}")
    return pd.concat(frames, ignore_index=True).sort_values("tokens", kind="stable", ignore_index=True)


def _locate(model: str, revisions: Mapping[str, float]) -> dict[str, Path | str]:
    """Where each checkpoint is: a directory, or the commit of a hub model."""
    if len(revisions) < 2 or len(set(revisions.values())) < len(revisions):
        raise ValueError(f"revisions={dict(revisions)}: need {{name: tokens}} of at least two, no two alike in tokens")
    if Path(model).is_dir():
        there = sorted(file.parent.name for file in Path(model).glob("*/config.json"))
        if absent := [name for name in revisions if name not in there]:
            raise FileNotFoundError(
                f"{model} has no checkpoint {', '.join(absent)}; those with a config.json there: "
                f"{', '.join(there[:20]) or 'none'}. A checkpoint is a directory with config.json, weights, tokenizer"
            )
        return {name: Path(model, name) for name in revisions}
    try:
        refs = HfApi().list_repo_refs(model)
    except Exception as error:  # offline, unknown, gated, no hub id: a dozen kinds
        raise FileNotFoundError(
            f"cannot list the revisions of {model!r}: {' '.join(str(error).split())[:300]} | Give a hub id that this "
            "machine can reach (unset HF_HUB_OFFLINE), or a directory with one subdirectory per checkpoint"
        ) from error
    commits = {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}
    commits |= {name: name for name in revisions if re.fullmatch("[0-9a-f]{40}", name)}
    if absent := [name for name in revisions if name not in commits]:
        some = ", ".join(list(commits)[:20]) + (", ..." if len(commits) > 20 else "")
        raise ValueError(f"{model} has no revision {', '.join(absent)}; it has {len(commits)}: {some}")
    return {name: commits[name] for name in revisions}


def _tokenizer(model: str, name: str, place: Path | str):
    try:
        return AutoTokenizer.from_pretrained(place if isinstance(place, Path) else model, **_revision(place))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model}, checkpoint {name}: no tokenizer that loads without remote code "
            f"({' '.join(str(error).split())[:200]}); put tokenizer.json beside the weights"
        ) from error


def _revision(place: Path | str) -> dict:
    return {} if isinstance(place, Path) else {"revision": place}


def _identity(place: Path | str) -> str | list:
    """What changes when the checkpoint does: its commit, or names, sizes and times of its files."""
    if isinstance(place, str):
        return place
    files = sorted(file for file in place.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def _on_disk(model: str, place: Path | str, keep: bool) -> Iterator[str]:
    """What load_model takes; a hub checkpoint that is not to be kept is gone afterwards."""
    if isinstance(place, Path) or keep:
        yield str(place) if isinstance(place, Path) else f"{model}@{place}"
        return
    folder = build_dir() / "checkpoint" / model.replace("/", "--")
    for leftover in folder.glob("*"):  # of a killed run; the same commit goes on where its download stopped
        if leftover.name != place:
            shutil.rmtree(leftover)
    safe = any(name.endswith(".safetensors") for name in HfApi().list_repo_files(model, revision=place))
    weights = "*.safetensors" if safe else "*.bin"
    snapshot_download(model, revision=place, local_dir=folder / place, allow_patterns=[*TEXT_FILES, weights])
    try:
        yield str(folder / place)
    finally:
        shutil.rmtree(folder / place)


# ---- what Figure 7 says, as numbers; layer 0 stands apart there, and is left out of all but the claim about it


def agreement(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """How much each checkpoint's order of layers is that of its run's last one: run, kind, tokens, rank_correlation
    (Spearman), overlap (share of the n layers dropped first that they have in common)."""
    rows = []
    for (run, kind), part in scores[scores["layer"] > 0].groupby(["run", "kind"], sort=False):
        wide = part.pivot(index="layer", columns="tokens", values="score")
        alike = [_alike(wide[tokens], wide.iloc[:, -1], n) for tokens in wide]
        rows += [{"run": run, "kind": kind, "tokens": t} | found for t, found in zip(wide, alike, strict=True)]
    return pd.DataFrame(rows)


def between_runs(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """The same of the last checkpoints of each two runs: kind, first, second, rank_correlation, overlap."""
    last = scores[(scores["layer"] > 0) & (scores["tokens"] == scores["tokens"].max())]
    rows = []
    for kind, part in last.groupby("kind", sort=False):
        wide = part.pivot(index="layer", columns="run", values="score")
        for one, two in combinations(wide, 2):
            rows.append({"kind": kind, "first": one, "second": two} | _alike(wide[one], wide[two], n))
    return pd.DataFrame(rows, columns=["kind", "first", "second", "rank_correlation", "overlap"])


def _alike(one: pd.Series, two: pd.Series, n: int) -> dict[str, float]:
    common = set(one.nsmallest(n).index) & set(two.nsmallest(n).index)
    return {"rank_correlation": float(one.corr(two, method="spearman")), "overlap": len(common) / n}


def slopes(scores: pd.DataFrame, since: float) -> pd.DataFrame:
    """Change of the mean score per tenfold training tokens from `since` tokens on: kind (index), slope, halfwidth.

    A least-squares line per layer and run; halfwidth is of the 95 % t interval of their mean, layers and runs taken
    for independent. Raises ValueError where fewer than two checkpoints are left.
    """
    late = scores[(scores["layer"] > 0) & (scores["tokens"] >= max(since, 1))]
    if late["tokens"].nunique() < 2:
        raise ValueError(f"{late['tokens'].nunique()} checkpoints from {since:g} tokens on; a slope needs two")
    rows = []
    for kind, part in late.groupby("kind", sort=False):
        wide = part.pivot(index="tokens", columns=["run", "layer"], values="score")
        x = pd.Series(wide.index, wide.index).map(math.log10)
        each = wide.mul(x - x.mean(), axis=0).sum() / ((x - x.mean()) ** 2).sum()
        halfwidth = stats.t.ppf(0.975, len(each) - 1) * each.sem()
        rows.append({"kind": kind, "slope": each.mean(), "halfwidth": halfwidth})
    return pd.DataFrame(rows).set_index("kind")


def consistency(scores: pd.DataFrame, n: int, since: float) -> pd.DataFrame:
    """Figure 7's claims on one or several runs with the same checkpoints: id (index), measured, error, detail.

    n: how many layers are dropped. since: training tokens from which on a checkpoint is late, as all of the paper's
    are. error: standard deviation over runs (of slopes: half the 95 % interval), NaN where there is only one.
    """
    total, rest = scores["tokens"].max(), scores[scores["layer"] > 0]
    found: dict[str, tuple] = {}
    mean = rest.pivot_table("score", "tokens", ["kind", "run"])  # mean["attn"]: [tokens, run]
    ratio = mean["attn"] / mean["mlp"]
    stays = ratio[::-1].cummax()[::-1] < 1  # there and ever after
    where = ", ".join(f"{stays[run].idxmax():,.0f}" if stays[run].any() else "never" for run in stays)
    detail = f"below 1 for good from {where} tokens on; late at most {ratio[ratio.index >= since].max().max():.2f}"
    found["fig07-attn-low-always"] = ratio.max().max(), ratio.max().std(), detail
    wide = rest.pivot(index=["tokens", "run"], columns=["kind", "layer"], values="score")
    share = 100 * (wide["attn"] < wide["mlp"]).mean(axis=1).unstack()  # [tokens, run]
    detail = "by tokens: " + ", ".join(f"{t:,.0f} {value:.0f} %" for t, value in share.mean(axis=1).items())
    late = share[share.index >= since].mean()
    found["fig07-attn-low-share"] = late.mean(), late.std(), detail
    change = (mean.iloc[-1] - mean.iloc[0]).unstack()  # [kind, run]
    growth = change.loc["mlp"] - change.loc["attn"]
    detail = ", ".join(f"{kind} {value:+.4f}" for kind, value in change.mean(axis=1).items())
    found["fig07-mlp-grows"] = growth.mean(), growth.std(), f"first to last: {detail}"
    for kind, row in slopes(scores, since).iterrows():
        id = {"attn": "fig07-attn-stays-low", "mlp": "fig07-mlp-rises", "block": "fig07-block-rises"}[kind]
        low, high = row["slope"] - row["halfwidth"], row["slope"] + row["halfwidth"]
        found[id] = (
            row["slope"],
            row["halfwidth"],
            f"95 % interval {low:.4f} to {high:.4f}, from {since:,.0f} tokens on",
        )
    wide = scores.pivot(index=["tokens", "kind", "run"], columns="layer", values="score")
    apart = wide[0] / wide.loc[:, 1 : wide.columns[-1] - 1].max(axis=1)
    least = apart[apart.index.get_level_values("tokens") >= since].min()
    detail = f"least at {apart.idxmin()[0]:,.0f} tokens, {apart.idxmin()[1]}; late {least:.2f}"
    found["fig07-module0-apart"] = apart.min(), apart.groupby("run").min().std(), detail

    attn = agreement(scores[scores["kind"] == "attn"], n)
    rho, overlap = (attn.pivot(index="tokens", columns="run", values=c) for c in ("rank_correlation", "overlap"))
    within = rho[(rho.index >= since) & (rho.index < total)]
    detail = f"lowest at {rho.min(axis=1).idxmin():,.0f} tokens; late at least {within.min().min():.2f}"
    found["fig07-attn-ranking-stable"] = rho.min().min(), rho.min().std(), detail
    settled = 100 * (rho[::-1].cummin()[::-1] >= 0.8).idxmax() / total
    detail = "by run: " + ", ".join(f"{percent:.2f} %" for percent in settled)
    found["fig07-order-early"] = settled.mean(), settled.std(), detail
    same = 100 * overlap[overlap.index >= since].min()
    detail = f"{n} of {wide.columns[-1]} layers; by run: " + ", ".join(f"{percent:.0f} %" for percent in same)
    found["fig07-top-n-overlap"] = same.min(), same.std(), detail
    across = between_runs(scores[scores["kind"] == "attn"], n)["rank_correlation"]
    detail = (
        f"{len(across)} pairs, {across.min():.2f} to {across.max():.2f}; within runs, late: {within.mean().mean():.2f}"
    )
    detail = detail if len(across) else "one run; several SEEDS are needed"
    found["fig07-seeds-agree"] = across.mean(), across.std(), detail
    found["fig07-seeds-as-training"] = within.mean().mean() - across.mean(), across.std(), detail
    return pd.DataFrame.from_dict(found, orient="index", columns=["measured", "error", "detail"])
