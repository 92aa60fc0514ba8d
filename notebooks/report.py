"""figures/<profile>/index.html: the claims, the paper's errata, then every figure and table of the paper in its order.

Called by `make report` and at the end of `make reproduce`: report.py <profile.yaml> <executed notebooks> <figures>.
Reads what `save_figure`, `save_table` and `record_claim` left in <figures>, renders the executed notebooks beside it,
and depends on nothing else: the same inputs give the same bytes.
"""

import json
import math
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import yaml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

from llmdrop.repro import paper

HERE = Path(__file__).parent
ITEMS = [  # of the paper: key, title, the notebook that makes it, once it is written
    ("fig01", "Block Drop, schematic", "fig01_04_schematics"),
    ("fig02", "Importance of blocks, for four calibration sets", "fig02_03_importance"),
    ("fig03", "Importance of MLP and attention layers, for four calibration sets", "fig02_03_importance"),
    ("fig04", "Layer Drop, schematic", "fig01_04_schematics"),
    ("fig05", "Accuracy against the number of dropped modules", "fig05_drop_curves"),
    ("fig06", "The order in which layers are dropped", "fig06_11_dropping_order"),
    ("fig07", "Importance throughout training, MAP-Neo-7B checkpoints", "fig07_checkpoints"),
    ("fig08", "Joint Layer Drop", "fig08_joint"),
    ("fig09", "One-shot and iterative dropping", "fig09_one_shot_iterative"),
    ("fig10", "How many calibration samples the scores need", "fig10_sample_size"),
    ("fig11", "The order in which layers are dropped, further models", "fig06_11_dropping_order"),
    ("fig12", "GSM8K against dropped attention layers, base and math-tuned models", "fig12_gsm8k"),
    ("tab01", "Dropping blocks, MLP or attention layers: Llama-2-13B and Mistral-7B", "tab01_03_drop_modules"),
    ("tab02", "Dropping attention layers: Llama-3", "tab01_03_drop_modules"),
    ("tab03", "Dropping modules: Llama-2-70B", "tab01_03_drop_modules"),
    ("tab04", "KV cache before and after", "tab04_kv_cache"),
    ("tab05", "Evaluation settings", "tab05_settings"),
    ("tab06", "Importance with and without the residual connection", "tab06_residual"),
    ("tab07", "Ways to choose the layers", "tab07_metrics"),
    ("tab08", "Against Shortened LLaMA", "tab08_shortened_llama"),
    ("tab09", "Against Wanda", "tab09_wanda"),
    ("tab10", "What a math model answers as its attention layers go", "tab10_output_cases"),
    ("tab11", "With quantization", "tab11_quantization"),
    ("tab12", "Long contexts", "tab12_long_context"),
]


def label(key: str) -> str:
    """"fig05" -> "Figure 5"."""
    return f"{'Figure' if key.startswith('fig') else 'Table'} {int(key[3:])}"


def maker(key: str, notebook: str, written: set[str]) -> str:
    """The notebook of an item: the one of ITEMS, or, where that is not written, one whose name begins with the item."""
    return next((n for n in sorted(written) if n.startswith(key)), notebook) if notebook not in written else notebook


def heading(notebook: Path) -> str:
    """The first heading of a notebook, without its number in the paper; a name for what has none."""
    cells = json.loads(notebook.read_text()).get("cells", []) if notebook.is_file() else []
    found = re.match(r"# (.+)", "".join(cells[0]["source"])) if cells else None
    return found[1] if found else notebook.stem.replace("_", " ").capitalize()


def measured_text(claim: dict) -> str:
    """"0.757 ± 0.021": the error with two digits, the number with as many decimals."""
    value, error = claim["measured"], claim["error"]
    if not _real(value):
        return "not run"
    if not _real(error):
        return f"{value:.4g}".replace("-", "−")
    decimals = min(max(0, 1 - math.floor(math.log10(error))), 6) if error > 0 else 0 if value == round(value) else 4
    return f"{value:.{decimals}f}\u00a0±\u00a0{error:.{decimals}f}".replace("-", "−")


def undecided(claim: dict) -> bool:
    """Whether the limit of the claim is within two standard errors of what was measured."""
    limit = re.match(r"[<>]=?\s*(-?[\d.]+)", claim["tolerance"])
    known = limit and _real(claim["measured"]) and _real(claim["error"]) and claim["error"] > 0
    return bool(known and abs(claim["measured"] - float(limit[1])) < 2 * claim["error"])


def impersonal(text: str) -> str:
    """Without this machine's folders and memory addresses, so that a committed page is the same everywhere."""
    for folder, name in ((HERE.parent.resolve(), "."), (Path(sys.prefix), ".venv"), (Path.home(), "~")):
        text = re.sub(rf"{re.escape(str(folder))}(?=[/\s:'\"<,)]|$)", name, text)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def owner(stem: str) -> str | None:
    """The item under which an output is shown: "fig02_03_importance_code" -> "fig02", None for what is no item."""
    found = re.match(r"(fig|tab)(\d\d)", stem)
    return found[0] if found and found[0] in {key for key, _, _ in ITEMS} else None


def read_output(figures: Path, stem: str) -> dict:
    """One figure or table as the page shows it: caption, table as HTML, links, provenance as (name, text) pairs."""
    kinds = ("pdf", "png", "csv", "md", "tex", "json", "txt")
    file = {kind: f"{stem}.{kind}" for kind in kinds if (figures / f"{stem}.{kind}").is_file()}
    caption = (figures / f"{stem}.txt").read_text().strip() if "txt" in file else ""
    provenance = json.loads((figures / f"{stem}.json").read_text()) if "json" in file else {}
    table = ""
    if "md" in file:  # the formatted table: digits, errors and published rows as the notebook chose them
        table = markdown2html((figures / f"{stem}.md").read_text().strip().removeprefix(caption))
        table = re.sub(r"<tr>(?=(?:(?!</tr>).)*▽)", '<tr class="low">', table, flags=re.DOTALL)  # gray, as in the paper
    elif "png" not in file and "csv" in file:
        table = pd.read_csv(figures / f"{stem}.csv").to_html(index=False, border=0, float_format="{:.4g}".format)
    details = [
        (name, impersonal(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)))
        for name, value in sorted(provenance.items())
    ]
    links = [(kind, name) for kind, name in file.items() if kind != "txt"]
    image = None
    if "png" in file:  # 300 pixels an inch in the file's header, shown at 130
        header = (figures / file["png"]).read_bytes()[16:24]
        image = dict(file=file["png"], width=int.from_bytes(header[:4], "big") * 13 // 30,
                     height=int.from_bytes(header[4:], "big") * 13 // 30)  # fmt: skip
    return dict(stem=stem, caption=caption, table=table, image=image, links=links, provenance=details)


def render_notebook(source: Path) -> str:
    """The executed notebook as an HTML fragment without scripts, progress bars or anything of this machine."""
    notebook = nbformat.read(source, as_version=4)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs
                if output.get("name") != "stderr" and not any("widget" in kind for kind in output.get("data", {}))
            ]  # fmt: skip
            for before, output in pairwise(cell.outputs):
                if before.get("name") == output.get("name") == "stdout":  # a progress bar had come between them
                    before.text, output.text = "", before.text + output.text
            for output in cell.outputs:  # what the store measured in this run and what it already held look the same
                if output.get("name") == "stdout":
                    output.text = re.sub(r"(?m)^(another process is )?measuring .*\n?", "", output.text)
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    numbered = {}  # pandas' styled tables have random ids
    page = exporter.from_notebook_node(notebook)[0]
    page = re.sub(r"\bT_[0-9a-f]{5}", lambda id: numbered.setdefault(id[0], f"T_{len(numbered)}"), page)
    return impersonal(page)


def failure(notebook: Path) -> str:
    """"ValueError: …" of a failed copy, else an empty text."""
    if not notebook.is_file():
        return ""
    outputs = [o for c in nbformat.read(notebook, as_version=4).cells for o in c.get("outputs", [])]
    errors = [impersonal(f"{o.ename}: {o.evalue}") for o in outputs if o.output_type == "error"]
    return errors[0] if errors else "the kernel died"


def gpu_steps(figures: Path) -> list[dict]:
    """What `make gpu` wrote for this profile's page, step by step; [] where it was not run."""
    file = figures / "gpu.json"
    return json.loads(file.read_text()) if file.is_file() else []


def build(profile_file: Path, done: Path, figures: Path) -> Path:
    """Write <figures>/index.html, claims.csv and notebooks/*.html; returns the path of the index."""
    figures.mkdir(parents=True, exist_ok=True)
    profile, name = yaml.safe_load(profile_file.read_text()), profile_file.stem
    written = {p.stem for p in profile_file.parent.parent.glob("*.ipynb")}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")

    (figures / "notebooks").mkdir(exist_ok=True)
    pages = dict(profile=name, source=os.path.relpath(profile_file.parent.parent, figures))
    pages["highlight"] = HtmlFormatter().get_style_defs(".highlight")
    for source in sorted(done.glob("*.ipynb")):
        if not source.name.startswith(".") and not source.stem.endswith(".failed"):
            page = template.render(page=render_notebook(source), title=source.stem, **pages)
            (figures / "notebooks" / f"{source.stem}.html").write_text(page)

    notebooks = {  # those of this profile
        n: dict(failure=failure(done / f"{n}.failed.ipynb"), rendered=(figures / "notebooks" / f"{n}.html").is_file())
        for n in profile if n not in ("about", "common", "needs")
    }  # fmt: skip

    claims = paper.joined_claims(figures)
    claims.to_csv(figures / "claims.csv", index=False, lineterminator="\n")
    shown = [row | dict(text=measured_text(row), undecided=undecided(row)) for row in claims.to_dict("records")]

    outputs = {p.stem: read_output(figures, p.stem) for p in sorted(figures.glob("*.csv")) if p.stem != "claims"}
    items = []
    made_by = {key: maker(key, notebook, written) for key, _, notebook in ITEMS}
    for key, title, _ in ITEMS:
        notebook = made_by[key]
        mine = [output for stem, output in outputs.items() if owner(stem) == key]
        shared = [k for k, n in made_by.items() if n == notebook and any(owner(stem) == k for stem in outputs)]
        items.append(
            dict(key=key, label=label(key), title=title, notebook=notebook, outputs=mine,
                 shown_with=shared[0] if shared and not mine else None)
        )  # fmt: skip
    free = {stem: output for stem, output in outputs.items() if owner(stem) is None}
    beyond = []  # the profile's other notebooks, then whatever was left by none of them
    for notebook in [n for n in notebooks if n not in made_by.values()]:
        mine = [free.pop(stem) for stem in list(free) if stem.startswith(notebook)]
        title = heading(profile_file.parent.parent / f"{notebook}.ipynb")
        beyond.append(dict(key=notebook, title=title, notebook=notebook, outputs=mine))
    for stem, output in free.items():
        beyond.append(dict(key=stem, title=stem.replace("_", " ").capitalize(), notebook=None, outputs=[output]))
    profiles = [p.stem for p in sorted(profile_file.parent.glob("*.yaml")) if p.stem not in (name, "smoke")]
    others = [other for other in profiles if (figures.parent / other / "index.html").is_file()]
    index = template.render(
        page=None, title=f"llmdrop · {name}", about=profile.get("about", ""),
        claims=shown, never_run=not outputs, counts=claims["verdict"].value_counts().to_dict(), errata=paper.ERRATA,
        paper=paper.PAPER, items=items, beyond=beyond, others=others,
        notebooks=notebooks, written=written, label=label, gpu=gpu_steps(figures), **pages,
    )  # fmt: skip
    (figures / "index.html").write_text(index)
    return figures / "index.html"


def _real(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


if __name__ == "__main__":
    print(build(*map(Path, sys.argv[1:])))
