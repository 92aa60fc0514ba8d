"""The published numbers of the paper we check, its errata, and our verdict on each claim.

Every number lives in `published/*.csv` as printed in arXiv 2406.15786v6; no notebook types one by hand. `claims.csv`
there lists what can be checked: what the paper claims, audits of its printed numbers, and claims of our own;
`errata.csv` what it prints that cannot be right. A verdict is a statement about an interval, never about a point.
"""

import json
import math
import operator
import os
import re
from pathlib import Path

import pandas as pd

from ..files import write_atomic
from .estimate import Estimate

PAPER = "He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed. arXiv 2406.15786v6"
DATA = Path(__file__).with_name("published")
ERRATA = pd.read_csv(DATA / "errata.csv", dtype=str).to_dict("records")  # where, printed, correct, why
KINDS = {"paper": "What the paper claims", "audit": "Audits of its printed numbers", "ours": "Claims of our own"}
VERDICTS = ("holds", "differs", "undecided", "not run")
# what a claim's interval may be over
INTERVALS = ("exact", "samples", "questions", "rounds", "seeds", "draws", "layers")
INTERVALS += ("questions and rounds", "samples and rounds", "seeds or layers")
TESTS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le, "within": None}
_SYMBOLS = {"above": "> ", "at least": "≥ ", "below": "< ", "at most": "≤ ", "within": "within ± "}
_MOST_NEEDED = 1_000_000  # more than anyone measures
_UNEVEN = 4  # times as wide on one side as on the other


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


def claims() -> pd.DataFrame:
    """Every checkable claim, all columns text but limit.

    id; kind ("paper", "audit", "ours"); statement, as it is made; where; published; measure: the one quantity to
    record, for models of any depth L; unit; test (of TESTS) and limit: what holds; why the limit is that; interval:
    what it is over (of INTERVALS); notebook; profiles that can test it, the first named to whoever has not run it.
    """
    return pd.read_csv(DATA / "claims.csv", dtype=str, keep_default_na=False).astype({"limit": float})


def claim(id: str) -> pd.Series:
    """One row of `claims`. Raises ValueError for an unknown claim."""
    rows = claims().set_index("id", drop=False)
    if id not in rows.index:
        topic = str(id).split("-")[0]
        near = [name for name in rows.index if name.split("-")[0] == topic] or rows.index
        raise ValueError(f"no claim {id!r} in {DATA.name}/claims.csv; near it: {', '.join(near)}")
    return rows.loc[id]


def verdict(test: str, limit: float, estimate: Estimate) -> str:
    """ "holds" where the test is met by all of the interval, "differs" where by none of it, else "undecided".

    within: all of the interval, or none of it, lies between -limit and limit: an equivalence test.
    """
    if test == "within":
        inside = -limit <= estimate.low and estimate.high <= limit
        outside = estimate.low > limit or estimate.high < -limit
    else:
        met = {bool(TESTS[test](end, limit)) for end in (estimate.low, estimate.high)}
        inside = met == {True}
        outside = met == {False}
    return "holds" if inside else "differs" if outside else "undecided"


def record_claim(out_dir: str | os.PathLike, id: str, estimate: Estimate | None, detail: str = "") -> Path:
    """Write what was measured for one claim to `<out_dir>/claims/<id>.json`; returns that file.

    None records "not run", and `detail` should say why; so does a value that is not defined (NaN). Raises ValueError
    for an unknown claim, and for an estimate whose interval is missing or is over something else than the claim says:
    only what the claim calls exact has none.
    """
    expected = claim(id)["interval"]
    record = {"id": id, "detail": str(detail)}
    is_over_that = estimate is not None and estimate.over in expected.split(" or ")
    if is_over_that and math.isnan(estimate.value):  # a share of nothing
        record["detail"] = f"not defined for what was measured; {detail}".rstrip("; ")
        estimate = None
    if estimate is not None:
        numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        if not is_over_that or not all(map(math.isfinite, numbers.values())):
            found = f"[{estimate.low:.4g}, {estimate.high:.4g}] over {estimate.over or 'nothing'}"
            raise ValueError(
                f"claim {id} needs an interval over {expected}, and got {estimate.value:.4g} with {found}; see "
                f"llmdrop.repro.statistics, or record None and say in `detail` why it could not be measured"
            )
        numbers = {name: float(number) for name, number in numbers.items()}
        record |= numbers | {"n": estimate.n, "over": estimate.over, "method": estimate.method}
    path = Path(out_dir) / "claims" / f"{id}.json"
    write_atomic({path: json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"})
    return path


def joined_claims(out_dir: str | os.PathLike) -> pd.DataFrame:
    """The claims of one profile, with what was measured in `out_dir`, which is named like it.

    Those that the profile can test, and those recorded there. Columns: those of `claims`, value, low, high (6 digits),
    n, interval (what it is over, and how), verdict, needed (how much more would decide it, or the command that would
    run it) and detail. Raises ValueError for a damaged file.
    """
    profile = Path(out_dir).name
    rows = []
    for row in claims().to_dict("records"):
        path = Path(out_dir) / "claims" / f"{row['id']}.json"
        if not path.exists() and profile not in row["profiles"].split():
            continue
        estimate = None
        detail = ""
        if path.exists():
            try:
                record = json.loads(path.read_text())
                detail = record["detail"]
                if "low" in record:
                    fields = ("value", "low", "high", "n", "over", "method")
                    estimate = Estimate(*(record[name] for name in fields))
                elif record.get("measured") is not None:
                    detail = "recorded by release 0.1.0, without an interval"
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run {row['notebook']} again") from error
        rows.append(row | _judged(row, estimate, profile, path.exists()) | {"detail": detail})
    columns = ["id", "kind", "statement", "where", "published", "value", "low", "high", "n", "unit", "interval"]
    columns += ["test", "limit", "why", "verdict", "needed", "detail", "notebook", "profiles", "measure"]
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "low": float, "high": float, "n": "Int64"})


def _judged(row: dict, estimate: Estimate | None, profile: str, was_run: bool) -> dict:
    """The columns that `joined_claims` adds to a claim."""
    if estimate is None:
        able = row["profiles"].split()
        others = [name for name in able if name != profile] if was_run else able  # here it could not be measured
        chosen = profile if profile in others else (others or able)[0]
        needed = f"make reproduce PROFILE={chosen} ONLY={row['notebook']}"
        return {"value": None, "low": None, "high": None, "n": None, "verdict": "not run", "needed": needed}
    found = verdict(row["test"], row["limit"], estimate)
    rounded = {name: float(f"{getattr(estimate, name):.6g}") for name in ("value", "low", "high")}
    how = ", ".join(filter(None, (estimate.over, estimate.method)))
    needed = _needed(row["test"], row["limit"], estimate) if found == "undecided" else ""
    return rounded | {"n": estimate.n, "interval": how, "verdict": found, "needed": needed}


def _needed(test: str, limit: float, estimate: Estimate) -> str:
    """About how many more of what the interval is over would decide: its width falls with the root of their number.

    No number where that says nothing: a model has only so many layers, and an interval that is much wider on one side
    comes from a jump (another model is the best one), not from many small differences.
    """
    if estimate.over == "layers":
        return "more SEEDS, or a model of more layers"
    limits = (-limit, limit) if test == "within" else (limit,)
    inside = [end for end in limits if estimate.low <= end <= estimate.high]
    nearest = min(inside, key=lambda end: abs(estimate.value - end))
    distance = abs(estimate.value - nearest)
    below, above = estimate.value - estimate.low, estimate.high - estimate.value
    width = below if nearest < estimate.value else above
    if width > _UNEVEN * min(below, above):
        return f"more {estimate.over}; how many cannot be told from an interval this uneven"
    more = math.inf
    if distance > 0:
        more = math.ceil((estimate.n or 1) * ((width / distance) ** 2 - 1))
    if more > _MOST_NEEDED:
        return f"more than {_MOST_NEEDED:,} more {estimate.over}: what was measured is at the limit"
    if more <= 1:
        return f"one more {estimate.over.removesuffix('s')}"
    unit = 10 ** max(0, len(str(more)) - 2)  # two digits are enough
    return f"about {math.ceil(more / unit) * unit:,} more {estimate.over}"


def limit_text(row: dict | pd.Series) -> str:
    """What a claim holds at, for people: "> 95 % of baseline"."""
    return f"{_SYMBOLS[row['test']]}{row['limit']:g} {row['unit']}".replace("-", "−")


def estimate_text(row: dict | pd.Series) -> str:
    """ "0.452 [0.413, 0.491] nats": two digits of the interval's half-width; "50 %" where it has none."""
    if row["value"] is None or not math.isfinite(row["value"]):
        return "not run"
    half_width = (row["high"] - row["low"]) / 2
    if half_width == 0:
        return f"{row['value'] + 0.0:.4g} {row['unit']}".replace("-", "−")
    digits = min(max(0, 1 - math.floor(math.log10(half_width))), 6)
    value, low, high = (f"{round(row[name], digits) + 0.0:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}] {row['unit']}".replace("-", "−")


def verdicts(out_dir: str | os.PathLike, notebook: str) -> pd.DataFrame:
    """The claims of one notebook as it shows them at its end: statement, published, measured, limit, verdict, needed.

    Raises ValueError for a notebook without claims.
    """
    known = claims()
    if notebook not in set(known["notebook"]):
        raise ValueError(f"no claims of {notebook!r}; there are some of {', '.join(dict.fromkeys(known['notebook']))}")
    joined = joined_claims(out_dir)
    rows = joined[joined["notebook"] == notebook]
    records = rows.to_dict("records")
    shown = rows[["id", "statement", "published"]].assign(
        measured=[estimate_text(record) for record in records], holds_if=[limit_text(record) for record in records]
    )
    return shown.join(rows[["verdict", "needed", "detail"]])
