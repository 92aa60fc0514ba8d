"""One look for every figure: final size in inches, 8 pt, and one fixed color, marker and line per method.

    with style.use():
        fig, ax = plt.subplots(figsize=(style.COLUMN, 2.2))

Colors are Okabe and Ito's, told apart with any color vision; marker and line repeat the difference in gray.
"""

from contextlib import ExitStack
from pathlib import Path

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
CONTENDERS = {  # how layers are chosen, and after the colon what makes up for them, if anything does
    "cosine": {"color": "#0072B2", "marker": "o"},  # the paper's Attention Drop
    "cosine: mean": {"color": "#56B4E9", "marker": "v"},
    "cosine: least squares": {"color": "#332288", "marker": "s"},
    "cosine: healed": {"color": "#117733", "marker": "P"},
    "MLP Drop": {"color": "#D55E00", "marker": "^"},
    "Block Drop": {"color": "#009E73", "marker": "s"},
    "consecutive blocks": {"color": "#E69F00", "marker": "v"},
    "Joint Drop": {"color": "#CC79A7", "marker": "D"},
    "KL greedy": {"color": "#999933", "marker": "p"},
    "KL greedy, reconstructed": {"color": "#DDCC77", "marker": "<"},
    "KL greedy, reconstructed: least squares": {"color": "#882255", "marker": "X"},
    "KL greedy, reconstructed: least squares, healed": {"color": "#AA4499", "marker": "*"},
    "KL greedy, reconstructed, latency-aware: least squares": {"color": "#CC6677", "marker": ">"},
    "KL greedy, reconstructed, latency-aware: sequential least squares": {"color": "#661100", "marker": "h"},
    "window 64": {"color": "#44AA99", "marker": "d"},
    "window 256": {"color": "#6A3D9A", "marker": "H"},
    "drops and windows": {"color": "#222222", "marker": "D"},
}
KINDS = {"attn": "Attention", "mlp": "MLP", "block": "Block", "joint": "Joint", "consecutive": "Consecutive Block"}
RETAINED, DROPPED = "#FFF3B0", "#9E1B32"  # light yellow and dark red: apart in lightness too
PAPER_EDGE = "#222222"  # hollow markers of published values where no method color applies


def use() -> ExitStack:
    """Apply the style: for good as a statement, for a block in `with style.use():`."""
    import matplotlib as mpl  # tables take names from here and draw nothing

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


def contender(method: str) -> dict:
    """Color and marker of a `selectors.Contender` by its method ("cosine: none"), of an unknown one gray.

    A window looks the same at whatever it is as fast.
    """
    plain = method.removesuffix(": none").split(": as fast for")[0]
    return dict(CONTENDERS.get(plain, {"color": "#7F7F7F", "marker": "x"}))
