"""The published numbers of the paper we check, its errata, and our verdict on each of its claims.

Every number lives in `published/*.csv` as printed in arXiv 2406.15786v6; no notebook types one by hand. `claims.csv`
there lists what the paper says that can be checked, `errata.csv` what it prints that cannot be right.
"""

import json
import math
import operator
import os
import re
from pathlib import Path

import pandas as pd

from ..files import write_atomic

PAPER = "He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed. arXiv 2406.15786v6"
DATA = Path(__file__).with_name("published")
ERRATA = pd.read_csv(DATA / "errata.csv", dtype=str).to_dict("records")  # where, printed, correct, why
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_VERDICT = {True: "holds", False: "differs", None: "not run"}


def table(name: str) -> pd.DataFrame:
    """One published table as printed: "table01", "table1", "tab01", "Table 1", or "figure09", "fig9".

    Raises ValueError, with the names there are, for any other.
    """
    files = {file.stem.split("_")[0]: file for file in sorted(DATA.glob("*[0-9]_*.csv"))}
    match = re.match(r"\s*(tab|fig)\D*(\d+)", name.lower())
    kinds = {"tab": "table", "fig": "figure"}
    key = f"{kinds[match[1]]}{int(match[2]):02d}" if match else None
    if key not in files:
        raise ValueError(f"no published table {name!r}; there are {', '.join(files)}")
    return pd.read_csv(files[key])


def drop_lists() -> dict[str, dict[str, dict[str, list[int]]]]:
    """The layers the authors dropped, in drop order: {model: {"attn-4": {"attn": [...], "mlp": [...]}, ...}}."""
    return json.loads((DATA / "published_drop_lists.json").read_text())["models"]


def gamma(avg_baseline: float, avg: float, speedup: float) -> float:
    """The paper's γ: points of average accuracy lost per percent of speedup; NaN where there is no speedup.

    At a speedup of 1 or less γ would divide by nothing, or praise what is slower and worse.
    """
    percent = 100 * (speedup - 1)
    return (avg_baseline - avg) / percent if percent > 1e-9 else math.nan


def claims() -> pd.DataFrame:
    """Every checkable claim: id, statement, where, published, tolerance, notebook, measure.

    `measure` says which one number to record, for models of any depth L; `tolerance` is >=, <=, > or < and a number:
    the claim holds where the recorded number satisfies it.
    """
    return pd.read_csv(DATA / "claims.csv", dtype=str, keep_default_na=False)


def claim_holds(id: str, measured: float) -> bool:
    """Whether this measured number satisfies the claim's tolerance; ValueError for an unknown claim."""
    tolerances = claims().set_index("id")["tolerance"]
    if id not in tolerances:
        topic = str(id).split("-")[0]
        near = [name for name in tolerances.index if name.split("-")[0] == topic] or tolerances.index
        raise ValueError(f"no claim {id!r} in {DATA.name}/claims.csv; near it: {', '.join(near)}")
    symbol, limit = re.match(r"(>=|<=|>|<)\s*(-?[\d.]+)", tolerances[id]).groups()
    return bool(_COMPARE[symbol](measured, float(limit)))


def record_claim(
    out_dir: str | os.PathLike, id: str, measured: float | None, error: float | None = None, detail: str = ""
) -> Path:
    """Write the verdict on one claim, by its tolerance, to `<out_dir>/claims/<id>.json`; returns that file.

    `measured=None` (or NaN) records "not run", and `detail` should say why. Raises ValueError for an unknown claim.
    """
    holds = claim_holds(id, math.nan if measured is None else float(measured))
    measured = _finite(measured)
    record = {"id": id, "measured": measured, "error": _finite(error), "holds": None if measured is None else holds}
    record |= {"verdict": _VERDICT[record["holds"]], "detail": str(detail)}
    path = Path(out_dir) / "claims" / f"{id}.json"
    write_atomic({path: json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    return path


def _finite(value: float | None) -> float | None:
    """A number that JSON can hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def joined_claims(out_dir: str | os.PathLike) -> pd.DataFrame:
    """Every claim with what was measured in `out_dir`: the paper's columns, then measured, error, verdict, detail.

    Raises ValueError for a damaged file.
    """
    rows = []
    for claim in claims().to_dict("records"):
        path = Path(out_dir) / "claims" / f"{claim['id']}.json"
        result = {"measured": None, "error": None, "verdict": "not run", "detail": ""}
        if path.exists():
            try:
                record = json.loads(path.read_text())
                result = {name: record[name] for name in result}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run {claim['notebook']} again") from error
        rows.append(claim | result)
    first = ["id", "statement", "where", "published", "measured", "error", "tolerance", "verdict", "notebook"]
    return pd.DataFrame(rows)[[*first, "detail", "measure"]]


def verdicts(out_dir: str | os.PathLike, notebook: str) -> pd.DataFrame:
    """The claims of one notebook as it shows them at its end: statement, published, measured, verdict, detail, ...

    Raises ValueError for a notebook without claims.
    """
    joined = joined_claims(out_dir)
    if notebook not in set(joined["notebook"]):
        raise ValueError(f"no claims of {notebook!r}; there are some of {', '.join(dict.fromkeys(joined['notebook']))}")
    return joined[joined["notebook"] == notebook].drop(columns=["where", "notebook", "measure"])
