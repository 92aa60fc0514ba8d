"""The published numbers of the paper we check, its errata, and our verdict on each of its claims.

Every number lives in `published/*.csv` as printed in arXiv 2406.15786v6; no notebook types one by hand. `claims.csv`
there lists what the paper says that can be checked: what to measure, and which value counts as "holds"; `errata.csv`
what it prints that cannot be right.
"""

import json
import math
import numbers
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..files import write_atomic

PAPER = "He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed. arXiv 2406.15786v6"
DATA = Path(__file__).with_name("published")
ERRATA = pd.read_csv(DATA / "errata.csv", dtype=str).to_dict("records")  # where, printed, correct, why

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_VERDICT = {True: "holds", False: "differs", None: "not run"}
_RESULT = ["measured", "error", "verdict", "detail"]  # what a claim's file adds to the claim


def table(name: str) -> pd.DataFrame:
    """One published table as printed: "table01", "table1", "tab01", "Table 1", or "figure09", "fig9".

    Raises ValueError, with the names there are, for any other.
    """
    stems = sorted(file.stem for file in [*DATA.glob("table*.csv"), *DATA.glob("figure*.csv")])
    prefix = None
    short = re.fullmatch(r"(tab|fig)\D*0*(\d+)", str(name).strip().lower())
    if short:
        kind = {"tab": "table", "fig": "figure"}[short[1]]
        prefix = f"{kind}{int(short[2]):02d}_"
    for stem in stems:
        if stem == name or (prefix and stem.startswith(prefix)):
            return pd.read_csv(DATA / f"{stem}.csv")
    raise ValueError(f"no published table {name!r}; there are {', '.join(stem.split('_')[0] for stem in stems)}")


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

    `measure` says which one number to record; `tolerance` begins with >=, <=, > or < and a number: the claim holds
    where the recorded number satisfies it. `measure` is written for models of any depth, L layers.
    """
    return pd.read_csv(DATA / "claims.csv", dtype=str, keep_default_na=False)


def claim_holds(id: str, measured: float) -> bool:
    """Whether this measured number satisfies the claim's tolerance."""
    symbol, limit = re.match(r"(>=|<=|>|<)\s*(-?[\d.]+)", _claim(id)["tolerance"]).groups()
    return bool(_COMPARE[symbol](float(measured), float(limit)))


def record_claim(
    out_dir: str | os.PathLike,
    id: str,
    measured: float | str | None,
    error: float | None = None,
    holds: bool | None = None,
    detail: str = "",
) -> Path:
    """Write the verdict on one claim to `<out_dir>/claims/<id>.json`; returns that file.

    With a number as `measured`, `holds` may be left out: the claim's tolerance decides. `measured=None` records
    "not run", and `detail` should say why. Raises ValueError for an unknown claim, and for a `holds` that contradicts
    the tolerance: the verdict always follows from the number and the limit shown beside it.
    """
    tolerance = _claim(id)["tolerance"]
    measured = _plain(measured)
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
                f"claim {id!r}: holds={holds}, but measured {measured:g} against tolerance {tolerance!r} says "
                f"{by_tolerance}; check the unit, or leave holds out"
            )
        holds = by_tolerance
    record = {
        "id": id,
        "measured": measured,
        "error": _plain(error),
        "holds": holds,
        "verdict": _VERDICT[holds],
        "detail": str(detail),
    }
    path = Path(out_dir) / "claims" / f"{id}.json"
    write_atomic({path: json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    return path


def joined_claims(out_dir: str | os.PathLike) -> pd.DataFrame:
    """Every claim with what was measured in `out_dir`: the paper's columns, then measured, error, verdict, detail.

    Raises ValueError for a damaged file.
    """
    rows = [claim | _recorded(Path(out_dir), claim) for claim in claims().to_dict("records")]
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


def _recorded(out_dir: Path, claim: Mapping[str, str]) -> dict:
    """What was measured of a claim, or that nothing was."""
    path = out_dir / "claims" / f"{claim['id']}.json"
    if not path.exists():
        return {"measured": None, "error": None, "verdict": "not run", "detail": ""}
    try:
        record = json.loads(path.read_text())
        return {name: record[name] for name in _RESULT}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run {claim['notebook']} again") from error


def _claim(id: str) -> dict:
    known = claims().set_index("id", drop=False)
    if id in known.index:
        return known.loc[id].to_dict()
    topic = str(id).split("-")[0]
    near = [name for name in known.index if name.split("-")[0] == topic] or list(known.index)
    raise ValueError(f"no claim {id!r} in {DATA.name}/claims.csv; near it: {', '.join(near)}")


def _plain(value) -> float | str | None:
    """A value JSON can hold: numbers become floats, NaN and infinity None, the rest text."""
    if value is None:
        return None
    if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:  # also numpy and torch scalars
        number = float(value)
        return number if math.isfinite(number) else None
    return str(value)
