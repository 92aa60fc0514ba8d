"""The published numbers of the paper we check, its errata, and our verdict on each of its claims.

Every number lives in `llmdrop/paper/*.csv` as printed in arXiv 2406.15786v6; no notebook types one by hand.
`claims.csv` there lists what the paper says that can be checked: what to measure, and which value counts as "holds".
"""

import json
import math
import numbers
import operator
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

PAPER = "He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed. arXiv 2406.15786v6"
DATA = Path(__file__).with_name("paper")

ERRATA = [
    {
        "where": "Table 2, Llama-3-70B, Attn-40, γ",
        "printed": "0.00",
        "correct": "0.04",
        "why": "the row's own numbers give (75.1 − 73.3) / 43 = 0.04",
    },
    {
        "where": "Table 4, Llama-2-13B, KV cache before and after",
        "printed": "52 GB and 26 GB",
        "correct": "50 GB and 25 GB",
        "why": "2 · 40 layers · 5,120 · 2 bytes · 2,048 tokens · 32 sequences = 53.7e9 bytes = 50.0 GiB, "
        "half of it after; the other rows are GiB",
    },
    {
        "where": "Abstract, “2.4% performance drop”",
        "printed": "2.4%",
        "correct": "2.4 points, 3.2% relative",
        "why": "Table 3, Llama-2-70B Attn-40: the average goes from 73.9 to 71.5",
    },
    {
        "where": "Published configs for Llama-2-70B with 8 and with 32 dropped attention layers",
        "printed": "the same 40-entry list in both",
        "correct": "8 and 32 entries",
        "why": "at most one of them can be the configuration evaluated in Table 3; neither is used here",
    },
]

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_VERDICT = {True: "holds", False: "differs", None: "not run"}


def table(name: str) -> pd.DataFrame:
    """One published table as printed: "table01", "table1", "tab01", "Table 1", or "figure09", "fig9"."""
    stems = sorted(p.stem for p in DATA.glob("*.csv") if p.stem != "claims")
    short = re.fullmatch(r"(tab|fig)\D*0*(\d+)", str(name).strip().lower())
    prefix = f"{dict(tab='table', fig='figure')[short[1]]}{int(short[2]):02d}_" if short else None
    for stem in stems:
        if stem == name or (prefix and stem.startswith(prefix)):
            return pd.read_csv(DATA / f"{stem}.csv")
    raise ValueError(f"no published table {name!r}; there are {', '.join(s.split('_')[0] for s in stems)}")


def drop_lists() -> dict[str, dict[str, dict[str, list[int]]]]:
    """The layers the authors dropped, in drop order: {model: {"attn-4": {"attn": [...], "mlp": [...]}, ...}}."""
    return json.loads((DATA / "published_drop_lists.json").read_text())["models"]


def gamma(avg_baseline: float, avg: float, speedup: float) -> float:
    """The paper's γ: points of average accuracy lost per percent of speedup, NaN where there is no speedup (1.0)."""
    percent = 100 * (speedup - 1)
    return (avg_baseline - avg) / percent if abs(percent) > 1e-9 else math.nan


def claims() -> pd.DataFrame:
    """Every checkable claim: id, statement, where, published, tolerance, notebook, measure.

    `measure` says which one number to record; `tolerance` begins with >=, <=, > or < and a number: the claim holds
    where the recorded number satisfies it. `measure` is written for models of any depth, L layers.
    """
    return pd.read_csv(DATA / "claims.csv", dtype=str, keep_default_na=False)


def claim_holds(id: str, measured: float) -> bool:
    """Whether this measured number satisfies the claim's tolerance."""
    compare, limit = re.match(r"(>=|<=|>|<)\s*(-?[\d.]+)", _claim(id)["tolerance"]).groups()
    return bool(_COMPARE[compare](float(measured), float(limit)))


def record_claim(out_dir, id: str, measured, error=None, holds: bool | None = None, detail: str = "") -> Path:
    """Write the verdict on one claim to `<out_dir>/claims/<id>.json`.

    With a number as `measured`, `holds` may be left out: the claim's tolerance decides. `measured=None` records
    "not run", and `detail` should say why. A `holds` that contradicts the tolerance is an error, so that the verdict
    always follows from the number and the limit shown beside it.
    """
    _claim(id)
    measured, error = _plain(measured), _plain(error)
    holds = None if holds is None else bool(holds)
    if measured is None and holds is not None:
        raise ValueError(f"claim {id!r}: holds={holds} without a measured value; pass measured, or leave holds out")
    if isinstance(measured, str) and holds is None:
        raise ValueError(
            f"claim {id!r}: measured {measured!r} is no number to compare; pass a number, or holds as well"
        )
    if isinstance(measured, float):
        by_tolerance = claim_holds(id, measured)
        if holds not in (None, by_tolerance):
            raise ValueError(
                f"claim {id!r}: holds={holds}, but measured {measured:g} against tolerance "
                f"{_claim(id)['tolerance']!r} says {by_tolerance}; check the unit, or leave holds out"
            )
        holds = by_tolerance
    row = {
        "id": id,
        "measured": measured,
        "error": error,
        "holds": holds,
        "verdict": _VERDICT[holds],
        "detail": str(detail),
    }
    path = Path(out_dir) / "claims" / f"{id}.json"
    write_atomic({path: json.dumps(row, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    return path


def joined_claims(out_dir) -> pd.DataFrame:
    """Every claim with what was measured in `out_dir`: the paper's columns, then measured, error, verdict, detail."""
    rows = []
    for claim in claims().to_dict("records"):
        path = Path(out_dir) / "claims" / f"{claim['id']}.json"
        found = {}
        if path.exists():
            try:
                found = json.loads(path.read_text())
                found = {k: found[k] for k in ("measured", "error", "verdict", "detail")}
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path} is damaged ({e}); delete it and run {claim['notebook']} again") from e
        rows.append(claim | {"measured": None, "error": None, "verdict": "not run", "detail": ""} | found)
    first = ["id", "statement", "where", "published", "measured", "error", "tolerance", "verdict", "notebook"]
    return pd.DataFrame(rows)[first + ["detail", "measure"]]


def write_atomic(files: Mapping[str | Path, str | bytes]) -> None:
    """Write {path: content} so that a kill, an error or a full disk never leaves a part of a file under its name.

    All are written and flushed under temporary names first, then renamed: on an error none of them changes.
    """
    ready = {}
    try:
        for path, content in files.items():
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            ready[temporary] = path
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes them private; committed outputs are not
        for temporary, path in ready.items():
            os.replace(temporary, path)
    finally:
        for temporary in ready:
            Path(temporary).unlink(missing_ok=True)


def _claim(id: str) -> dict:
    rows = claims()
    found = rows[rows["id"] == id].to_dict("records")
    if not found:
        near = [i for i in rows["id"] if i.split("-")[0] == str(id).split("-")[0]] or list(rows["id"])
        raise ValueError(f"no claim {id!r} in llmdrop/paper/claims.csv; near it: {', '.join(near)}")
    return found[0]


def _plain(value):
    """A value JSON can hold: numbers become floats, NaN and infinity None, the rest text."""
    if value is None:
        return None
    if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:  # also numpy and torch scalars
        value = float(value)
        return value if math.isfinite(value) else None
    return str(value)
