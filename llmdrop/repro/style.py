"""One look for every figure: final size in inches, 8 pt, and one fixed color, marker and line per method.

    with style.use():
        fig, ax = plt.subplots(figsize=(style.COLUMN, 2.2))

Colors are Okabe and Ito's, told apart with any color vision; marker and line repeat the difference in gray.
"""

from contextlib import ExitStack
from pathlib import Path

import matplotlib as mpl

COLUMN = 3.25  # inches, one column of a two-column page
PAGE = 6.75  # inches, both columns
METHODS = {
    "Attention": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "MLP": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "Block": {"color": "#009E73", "marker": "s", "linestyle": "-."},
    "Joint": {"color": "#CC79A7", "marker": "D", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "Consecutive Block": {"color": "#E69F00", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
    "Baseline": {"color": "#000000", "marker": "P", "linestyle": (0, (4, 2))},
    "Random": {"color": "#7F7F7F", "marker": "x", "linestyle": ":"},
}
KINDS = {"attn": "Attention", "mlp": "MLP", "block": "Block", "joint": "Joint", "consecutive": "Consecutive Block"}
RETAINED, DROPPED = "#FFF3B0", "#9E1B32"  # light yellow and dark red: apart in lightness too
PAPER_EDGE = "#222222"  # hollow markers of published values where no method color applies


def use() -> ExitStack:
    """Apply the style: for good as a statement, for a block in `with style.use():`."""
    before = dict(mpl.rcParams.copy())
    before.pop("backend", None)  # choosing a backend is not ours to undo
    mpl.style.use(Path(__file__).with_name("llmdrop.mplstyle"))
    stack = ExitStack()
    stack.callback(mpl.rcParams.update, before)
    return stack


def name(method: str) -> str:
    """A method's name in METHODS, from that name, its kind ("attn") or a plan label ("Attn-8", "Block-4")."""
    key = str(method).split("-")[0].strip().lower()
    known = {long.lower(): long for long in METHODS} | KINDS
    if key not in known:
        raise ValueError(f"no color for method {method!r}; known: {', '.join(METHODS)} (or {', '.join(KINDS)})")
    return known[key]


def method(method: str) -> dict:
    """Color, marker and line of a method, by any name that `name` understands."""
    return dict(METHODS[name(method)])
