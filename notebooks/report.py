"""figures/<profile>/index.html: the claims, the paper's errata, then every figure and table of the paper in its order.

Called by `make report` and at the end of `make reproduce`: report.py <profile.yaml> <executed notebooks> <figures>.
Reads what `save_figure`, `save_table` and `record_claim` left in <figures>, renders the executed notebooks beside it,
and depends on nothing else: the same inputs give the same bytes. Then puts all profiles together, in index.html and
README.md one folder up: ten claims with the best evidence there is, the figures, all claims. The ten claims also go
into the project's README.md, between two marks.
"""

import json
import os
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import yaml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

from llmdrop import build_dir
from llmdrop.repro import paper

HERE = Path(__file__).parent
ITEMS = [  # of the paper: key, title, the notebook that makes it, once it is written
    ("fig01", "Block Drop, schematic", "fig01_04_schematics"),
    ("fig02", "Importance of blocks, for four calibration sets", "fig02_03_importance"),
    ("fig03", "Importance of MLP and attention layers, for four calibration sets", "fig02_03_importance"),
    ("fig04", "Layer Drop, schematic", "fig01_04_schematics"),
    ("fig05", "Quality against the number of dropped layers", "fig05_drop_curves"),
    ("fig06", "The order in which layers are dropped", "fig06_11_dropping_order"),
    ("fig07", "Importance throughout training", "fig07_checkpoints"),
    ("fig08", "Joint Layer Drop", "fig08_joint"),
    ("fig09", "One-shot and iterative dropping", "fig09_one_shot_iterative"),
    ("fig10", "How many calibration samples the scores need", "fig10_sample_size"),
    ("fig11", "The order in which layers are dropped, further models", "fig06_11_dropping_order"),
    ("fig12", "Arithmetic in written answers against dropped attention layers", "fig12_gsm8k"),
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
HEADLINES = [  # the ten claims that the page of all profiles begins with
    "tab01-attn8-above-mlp8", "tab01-attn8-above-block8", "tab01-attn8-keeps-95", "tab03-half-of-attn",
    "tab03-speedup-half", "fig03-attn-below-mlp", "fig06-deep-first-attn", "tab06-residual-attn",
    "tab03-speed-one-gpu", "beyond-third-as-timed",
]  # fmt: skip
# in the project's README.md
MARKS = ("<!-- ten claims, written by make report -->\n", "<!-- end of the ten claims -->")
# whose evidence counts first: the paper's own models, then all questions, then what anyone can run
PROFILES = ("paper", "geometry", "pretrain_gpu", "pretrain", "full", "beyond", "embedded")


def label(key: str) -> str:
    """"fig05", "fig05-attn-flat" -> "Figure 5"."""
    return f"{'Figure' if key.startswith('fig') else 'Table'} {int(key[3:5])}"


def maker(key: str, notebook: str, written: set[str]) -> str:
    """The notebook of an item: the one of ITEMS, or, where that is not written, one whose name begins with the item."""
    return next((n for n in sorted(written) if n.startswith(key)), notebook) if notebook not in written else notebook


def heading(notebook: Path) -> str:
    """The first heading of a notebook, without its number in the paper; a name for what has none."""
    cells = json.loads(notebook.read_text()).get("cells", []) if notebook.is_file() else []
    found = re.match(r"# (.+)", "".join(cells[0]["source"])) if cells else None
    return found[1] if found else notebook.stem.replace("_", " ").capitalize()


def tally(rows: list[dict]) -> str:
    """"3 hold, 1 undecided"."""
    counts = [(sum(row["verdict"] == verdict for row in rows), verdict) for verdict in paper.VERDICTS]
    plural = {"holds": "hold", "differs": "differ"}
    return ", ".join(f"{n} {verdict if n == 1 else plural.get(verdict, verdict)}" for n, verdict in counts if n)


def as_shown(claims: pd.DataFrame) -> list[dict]:
    """Claims as pages show them, with their numbers as text."""
    rows = []
    for row in claims.to_dict("records"):
        n = None if pd.isna(row["n"]) else row["n"]
        rows.append(row | dict(text=paper.estimate_text(row), holds_if=paper.limit_text(row), n=n))
    return rows


def by_kind(claims: pd.DataFrame, notebooks: Path) -> list[dict]:
    """Kind by kind, folded by figure."""
    order = {key: k for k, (key, _, _) in enumerate(ITEMS)}
    kinds = []
    for kind, title in paper.KINDS.items():
        folds = {}
        rows = as_shown(claims[claims["kind"] == kind])
        for row in sorted(rows, key=lambda row: order.get(owner(row["id"]), len(order))):
            title_of_notebook = heading(notebooks / f"{row['notebook']}.ipynb").split(": ")[-1].capitalize()
            folds.setdefault(label(row["id"]) if owner(row["id"]) else title_of_notebook, []).append(row)
        if folds:
            shown = [dict(name=name, rows=rows, tally=tally(rows)) for name, rows in folds.items()]
            kinds.append(dict(title=title, folds=shown, tally=tally([row for rows in folds.values() for row in rows])))
    return kinds


def impersonal(text: str) -> str:
    """Without this machine's folders and memory addresses, so that a committed page is the same everywhere."""
    here = (HERE.parent.resolve(), ".")
    build = (build_dir().resolve(), "./build")  # wherever LLMDROP_BUILD puts it
    for folder, name in (here, build, (Path(sys.prefix), ".venv"), (Path.home(), "~")):
        text = re.sub(rf"{re.escape(str(folder))}(?=[/\s:;'\"<,)]|$)", name, text)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def owner(stem: str) -> str | None:
    """The item under which an output is shown: "fig02_03_importance_code" -> "fig02", None for what is no item."""
    found = re.match(r"(fig|tab)(\d\d)", stem)
    return found[0] if found and found[0] in {key for key, _, _ in ITEMS} else None


def in_words(value) -> str:
    """A fact of the provenance without brackets and quotes: "xsum, boolq", "torch: 2.13.0; python: 3.11", "yes"."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_words(part)}" for name, part in sorted(value.items())) or "–"
    if isinstance(value, list):
        return ", ".join(in_words(part) for part in value) or "–"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
        if re.search(r"<th[^>]*>Model</th>\s*<th[^>]*>Method</th>", table):  # the model alone names no row
            table = table.replace("<table", '<table class="two"', 1)
    elif "png" not in file and "csv" in file:
        table = pd.read_csv(figures / f"{stem}.csv").to_html(index=False, border=0, float_format="{:.4g}".format)
    details = [(name, impersonal(in_words(value))) for name, value in sorted(provenance.items())]
    links = [(kind, name) for kind, name in file.items() if kind != "txt"]
    image = None
    if "png" in file:  # 300 pixels an inch in the file's header, shown at 130
        header = (figures / file["png"]).read_bytes()[16:24]
        image = dict(file=file["png"], width=int.from_bytes(header[:4], "big") * 13 // 30,
                     height=int.from_bytes(header[4:], "big") * 13 // 30)  # fmt: skip
    return dict(stem=stem, caption=caption, table=table, image=image, links=links, provenance=details)


@cache
def exporter() -> HTMLExporter:
    """One for all notebooks: each compiles its templates anew."""
    return HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)


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
    numbered = {}  # pandas' styled tables have random ids
    page = exporter().from_notebook_node(notebook)[0]
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
        kinds=by_kind(claims, profile_file.parent.parent), never_run=not outputs, errata=paper.ERRATA,
        counts=claims["verdict"].value_counts().to_dict(), paper=paper.PAPER, items=items, beyond=beyond, others=others,
        notebooks=notebooks, written=written, label=label, gpu=gpu_steps(figures), **pages,
    )  # fmt: skip
    (figures / "index.html").write_text(index)
    return figures / "index.html"


def best_evidence(figures: Path) -> pd.DataFrame:
    """Every claim once, from the first of PROFILES that decides it, else that has any evidence; profile "" for none."""
    frames = [paper.joined_claims(figures / name).assign(profile=name) for name in PROFILES]
    claims = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    claims.loc[claims["verdict"] == "not run", "profile"] = ""
    rank = claims["verdict"].map({"holds": 0, "differs": 0, "undecided": 1, "not run": 3})
    for_anyone = "PROFILE=" + claims["profiles"].str.split().str[0] + " "  # the command to name where nothing was run
    rank -= [command in needed for command, needed in zip(for_anyone, claims["needed"], strict=True)]
    best = claims.loc[rank.sort_values(kind="stable").index].drop_duplicates("id").set_index("id", drop=False)
    return best.loc[[id for id in paper.claims()["id"] if id in best.index]]


def templates() -> jinja2.Environment:
    """The pages of all profiles, HTML or Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name.endswith("html.j2"),
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment


def with_headlines(readme: str, best: pd.DataFrame) -> str:
    """The text of the project's README.md with the ten claims of HEADLINES between its marks.

    best: from `best_evidence`.
    """
    rows = as_shown(best.loc[HEADLINES])
    table = templates().get_template("headlines.md.j2").render(headlines=rows)
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}"


def overview(profiles: Path, figures: Path) -> Path:
    """Write <figures>/index.html and README.md, all profiles put together; returns the path of the index.

    Where the README.md beside <figures> has room for them, the ten claims go there, too.
    """
    notebooks = profiles.parent
    best = best_evidence(figures)
    made = [name for name in reversed(PROFILES) if (figures / name / "index.html").is_file()]
    about = {name: yaml.safe_load((profiles / f"{name}.yaml").read_text())["about"] for name in made}
    drawn = []  # every figure from the profile nearest to the paper that drew it
    for key, title, _ in ITEMS:
        for name in [name for name in PROFILES if name in made]:
            stems = [file.stem for file in sorted((figures / name).glob("*.png")) if owner(file.stem) == key]
            if stems:
                outputs = [read_output(figures / name, stem) | dict(profile=name) for stem in stems]
                drawn.append(dict(key=key, label=label(key), title=title, profile=name, outputs=outputs))
                break
    shown = dict(
        title="llmdrop: all profiles", headlines=as_shown(best.loc[HEADLINES]), kinds=by_kind(best, notebooks),
        made=about, drawn=drawn, paper=paper.PAPER, counts=best["verdict"].value_counts().to_dict(),
    )  # fmt: skip
    readme = figures.parent / "README.md"
    if readme.is_file() and all(mark in readme.read_text() for mark in MARKS):
        readme.write_text(with_headlines(readme.read_text(), best))
    environment = templates()
    (figures / "README.md").write_text(environment.get_template("overview.md.j2").render(shown))
    (figures / "index.html").write_text(environment.get_template("overview.html.j2").render(shown))
    return figures / "index.html"


if __name__ == "__main__":
    profile_file, executed, figures = map(Path, sys.argv[1:])
    print(build(profile_file, executed, figures))
    print(overview(profile_file.parent, figures.parent))
