"""The report: built from fabricated outputs, complete, the same every time, and whole in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

plt = pytest.importorskip("matplotlib.pyplot")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
report = pytest.importorskip("report", reason="the report needs llmdrop.paper")
from llmdrop.repro import paper  # noqa: E402
from llmdrop.repro.estimate import Estimate, exact  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files"
).split()


DECIDED = {  # claims with their verdicts, made up
    "fig04-norm-goes-too": "holds",
    "fig03-attn-below-mlp": "holds",
    "fig02-deep-blocks-low": "differs",
    "fig03-deep-attn-low": "undecided",
    "tab01-attn8-above-mlp8": "holds",
}


def record_made_up(figures: Path) -> None:
    paper.record_claim(figures, "fig04-norm-goes-too", exact(0), "made up")
    paper.record_claim(figures, "fig03-attn-below-mlp", Estimate(0.49876, 0.4642, 0.5333, 64, "samples", "bootstrap"))
    paper.record_claim(figures, "fig02-deep-blocks-low", Estimate(1.1111, 1.0707, 1.1515, 64, "samples", "bootstrap"))
    paper.record_claim(figures, "fig03-deep-attn-low", Estimate(0.98, 0.9, 1.06, 64, "samples", "bootstrap"))
    paper.record_claim(figures, "fig03-choice-transfers", None, "one set only")
    paper.record_claim(figures, "tab01-attn8-above-mlp8", Estimate(2.3, 2.1, 2.5, 64, "samples", "paired bootstrap"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A profile, two executed notebooks, one failed one, two figures, two tables and some claims: all made up."""
    root = tmp_path_factory.mktemp("project")
    figures, done = root / "figures" / "embedded", root / "executed"
    (figures / "claims").mkdir(parents=True)
    done.mkdir()
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "notebooks" / "profiles" / "embedded.yaml").write_text(
        "about: a model that was made up\ncommon: {}\nneeds: {}\n"
        "quickstart: {}\nfig02_03_importance: {}\nfig05_drop_curves: {}\ntab01_03_drop_modules: {}\n"
    )
    for written in ("fig02_03_importance", "tab04_kv_cache"):
        (root / "notebooks" / f"{written}.ipynb").write_text("{}")
    provenance = json.dumps({"commit": "0123abc", "dirty": False, "versions": {"torch": "2.13.0"}, "out": str(ROOT)})
    for stem, caption in {
        "fig02_03_importance": "Importance of every layer. The last MLP stands out.",
        "fig05_drop_curves": "Accuracy against the number of dropped modules, made up.",
        "quickstart_speed": "Tokens per second before and after.",
    }.items():
        fig, ax = plt.subplots(figsize=(6.75, 2.4))
        ax.plot([0, 4, 8], [0.65, 0.64, 0.6], "o-")
        fig.savefig(figures / f"{stem}.png", dpi=300)
        fig.savefig(figures / f"{stem}.pdf")
        plt.close(fig)
        (figures / f"{stem}.csv").write_text("n,accuracy\n0,0.65\n4,0.64\n")
        (figures / f"{stem}.txt").write_text(caption + "\n")
        (figures / f"{stem}.json").write_text(provenance)
    columns = ["Model", "Method", "Source", "ARC-C", "BoolQ", "HellaSwag", "MMLU", "OBQA", "PIQA", "RTE", "WinoGrande"]
    lines = ["made up", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for method in ("Baseline", "Attn-4", "Attn-8"):
        low = "▽ " if method == "Attn-8" else ""
        lines.append(f"| SmolLM2 | {method} | ours |" + f" 64.0 ± 3.4 {low}|" * (len(columns) - 3))
        lines.append(f"| *Llama-2-13B* | *{method}* | *paper* |" + " *68.2* |" * (len(columns) - 3))
    (figures / "tab01_03_drop_modules.md").write_text("\n".join(lines) + "\n\nItalics: as printed in the paper.\n")
    (figures / "tab01_03_drop_modules.csv").write_text("method,avg\nBaseline,64.0\n")
    (figures / "tab01_03_drop_modules.txt").write_text("made up\n")
    (figures / "tab05_settings.csv").write_text("task,num_fewshot\npiqa,0\n")
    record_made_up(figures)
    cell = nbformat.v4.new_code_cell("print(1)")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=f"saved in {ROOT}/figures <object at 0x7f00deadbeef>\n"),
        nbformat.v4.new_output("stream", name="stdout", text="measuring score: SmolLM2 ..."),
        nbformat.v4.new_output("stream", name="stderr", text="a progress bar\n"),
        nbformat.v4.new_output("stream", name="stdout", text=" 12.3 s\nkept\n"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Importance\nA claim."), cell])
    nbformat.write(notebook, done / "fig02_03_importance.ipynb")
    nbformat.write(notebook, done / ".fig05_drop_curves.ipynb")  # left by a killed run
    cell.outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no such task", traceback=[])]
    nbformat.write(notebook, done / "fig05_drop_curves.failed.ipynb")
    rebuild(root)
    return root


def rebuild(root):
    profile = root / "notebooks/profiles/embedded.yaml"
    page = report.build(profile, root / "executed", root / "figures/embedded")
    report.overview(profile.parent, root / "figures")
    return page


def test_every_item_of_the_paper_is_there(project):
    page = (project / "figures" / "embedded" / "index.html").read_text()
    places = [page.index(f'id="{kind}{n:02d}"') for kind in ("fig", "tab") for n in range(1, 13)]
    assert places == sorted(places)
    assert page.index('id="claims"') < page.index('id="errata"') < places[0]
    sections = dict(re.findall(r'<section class="item[^>]*id="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert 'src="fig02_03_importance.png"' in sections["fig02"]
    assert "notebooks/fig02_03_importance.html" in sections["fig02"] and "0123abc" in sections["fig02"]
    assert "torch: 2.13.0" in sections["fig02"] and "{" not in sections["fig02"]
    assert "/fig02_03_importance.ipynb" in sections["fig02"] and "/fig05_drop_curves.ipynb" not in sections["fig05"]
    assert 'href="#fig02"' in sections["fig03"]
    assert "failed: ValueError: no such task" in sections["fig05"]
    assert "Later" in sections["fig07"]
    assert "Not part of this profile" in sections["tab04"]
    assert "<em>68.2</em>" in sections["tab01"] and sections["tab01"].count("made up") == 1
    assert sections["tab01"].count('<tr class="low">') == 1  # gray, and only the row that is
    assert "<td>piqa</td>" in sections["tab05"]
    assert "quickstart_speed.pdf" in sections["quickstart"] and ">Quickstart<" in sections["quickstart"]


def test_not_run_names_the_command(project, tmp_path):
    (tmp_path / "executed").mkdir()
    shutil.copytree(project / "notebooks", tmp_path / "notebooks")
    page = rebuild(tmp_path).read_text()
    assert "make reproduce PROFILE=embedded ONLY=tab01_03_drop_modules" in page
    own = paper.claims()["profiles"].str.contains("embedded").sum()
    assert page.count(">not run</span>") == own and f">{own} not run</span>" in page
    assert "has not been run here. Run it: <code>make reproduce PROFILE=embedded</code>" in page


@pytest.mark.parametrize("key", [key for key, _, _ in report.ITEMS])
def test_every_item_finds_its_notebook(key):
    """By name, or by a name that begins with the item; and no notebook of a profile is left out of the page."""
    written = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    notebook = report.maker(key, dict((k, n) for k, _, n in report.ITEMS)[key], written)
    number = f"{int(key[3:]):02d}"
    assert notebook not in written or re.match(rf"{key[:3]}(\d\d_)?\d\d_", notebook), notebook
    assert report.maker(key, "none", {"quickstart", f"{key[:3]}{number}_x"}) == f"{key}_x"


def test_headings_are_the_notebooks_own():
    assert report.heading(ROOT / "notebooks/speedups.ipynb").startswith("Speed: ")
    assert report.heading(ROOT / "notebooks/none_such.ipynb") == "None such"


def test_claims_are_shown_with_all_that_makes_a_verdict(project):
    import pandas as pd

    claims = pd.read_csv(project / "figures/embedded/claims.csv").set_index("id")
    assert claims.loc[list(DECIDED), "verdict"].to_dict() == DECIDED
    assert claims["profiles"].str.contains("embedded").all(), "claims of other profiles"
    page = (project / "figures/embedded/index.html").read_text()
    shown = dict(re.findall(r'<tr id="claim-([^"]+)">(.*?)</tr>', page, re.DOTALL))
    assert set(shown) == set(claims.index)
    holds = shown["fig03-attn-below-mlp"]
    assert "0.499 [0.464, 0.533] (ratio)" in holds and "64 samples, bootstrap" in holds and "&lt; 1 (ratio)" in holds
    assert re.search(r"To decide it: about [\d,]+ more samples", shown["fig03-deep-attn-low"])
    assert 'class="verdict undecided"' in shown["fig03-deep-attn-low"]
    not_run = shown["fig03-choice-transfers"]
    assert "one set only" in not_run and "make reproduce PROFILE=paper ONLY=fig02_03_importance" in not_run
    assert ">0 parameters<br>" in shown["fig04-norm-goes-too"]
    counts = claims["verdict"].value_counts()
    assert all(
        f">{counts[verdict]} {word}</span>" in page for verdict, word in (("holds", "hold"), ("differs", "differ"))
    )


def test_claims_are_apart_by_kind_and_folded_by_figure(project):
    page = (project / "figures/embedded/index.html").read_text()
    kinds = [page.index(title) for title in paper.KINDS.values()]
    assert kinds == sorted(kinds)
    folds = re.findall(r'<details class="fold"><summary>([^<]*) <span class="soft small">([^<]*)</span>', page)
    assert ("Figure 2", "1 differs, 1 not run") in folds
    figures = [int(name.removeprefix("Figure ")) for name, _ in folds if name.startswith("Figure")]
    of_paper = figures[: figures.index(max(figures)) + 1]
    assert of_paper == sorted(set(of_paper))


def test_the_page_of_all_profiles_has_the_best_evidence(project, tmp_path):
    root = shutil.copytree(project, tmp_path / "project")
    figures = root / "figures"
    decided = Estimate(1.9, 1.7, 2.1, 640, "samples", "paired bootstrap")
    wide = Estimate(0.4, -0.8, 1.6, 64, "samples", "paired bootstrap")
    paper.record_claim(figures / "full", "tab01-attn8-above-mlp8", wide)  # undecided: the embedded profile decides it
    paper.record_claim(figures / "full", "tab01-attn8-above-block8", decided)
    rebuild(root)
    best = report.best_evidence(figures)
    assert list(best["id"]) == list(paper.claims()["id"])
    assert best.loc["tab01-attn8-above-mlp8", ["verdict", "profile"]].tolist() == ["holds", "embedded"]
    assert best.loc["tab01-attn8-above-block8", ["verdict", "profile"]].tolist() == ["holds", "full"]
    nowhere = best.loc["tab03-half-of-attn"]
    assert (nowhere["verdict"], nowhere["profile"]) == ("not run", "")
    assert nowhere["needed"] == "make reproduce PROFILE=full ONLY=tab01_03_drop_modules"
    for page in (figures / "index.html", figures / "README.md"):
        text = page.read_text()
        sections = [text.rindex(title) for title in ("Ten claims", "Importance of blocks, for", *paper.KINDS.values())]
        assert sections == sorted(sections)
        assert text.count("1.90 [1.70, 2.10] nats") == 2  # a headline, and in its place
        assert "embedded/fig02_03_importance.png" in text
        assert not re.search(r"\d\.\d{7,}|\['", text), "raw numbers or Python"


def test_pages_name_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path))
    text = f"PosixPath('{tmp_path}/quickstart'), {ROOT}/README.md, {tmp_path}x"
    assert report.impersonal(text) == f"PosixPath('./build/quickstart'), ./README.md, {tmp_path}x"


def test_the_readme_has_the_ten_claims_as_they_stand():
    text = (ROOT / "README.md").read_text()
    best = report.best_evidence(ROOT / "figures")
    assert text == report.with_headlines(text, best), "stale; run make report"
    assert sum(text.count(mark) for mark in report.MARKS) == 2


def test_the_ten_claims_go_between_the_marks_of_a_readme_alone(project, tmp_path):
    root = shutil.copytree(project, tmp_path / "project")
    before, after = "# A project\n", "\nand what follows\n"
    (root / "README.md").write_text(before + "stale".join(report.MARKS) + after)
    rebuild(root)
    first = (root / "README.md").read_text()
    assert first.startswith(before) and first.endswith(after) and "stale" not in first
    assert "| 2.30 [2.10, 2.50] nats | **holds**; > 0 nats |" in first
    assert first.count("\n| ") == 11 and first.count("**not run**") + first.count("**holds**") == 10
    rebuild(root)
    assert (root / "README.md").read_text() == first
    for other in ("no marks\n", report.MARKS[0] + "no end\n"):
        (root / "README.md").write_text(other)
        rebuild(root)
        assert (root / "README.md").read_text() == other


def test_the_headlines_are_claims():
    assert len(report.HEADLINES) == len(set(report.HEADLINES)) == 10
    assert set(report.HEADLINES) <= set(paper.claims()["id"])
    assert {kind for id, kind in paper.claims()[["id", "kind"]].to_numpy() if id in report.HEADLINES} == set(
        paper.KINDS
    )


def test_the_same_inputs_give_the_same_bytes(project):
    pages = sorted((project / "figures").rglob("*.html"))
    before = [page.read_bytes() for page in pages]
    rebuild(project)
    assert before == [page.read_bytes() for page in pages] and len(pages) == 3


def test_pages_are_impersonal_small_and_offline(project):
    for page in (project / "figures").rglob("*.html"):
        text = page.read_text()
        assert str(ROOT) not in text and f"{Path.home()}/" not in text
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text), "loads something from the network"
        assert not any(found in text for found in ("0x7f00deadbeef", "a progress bar", "measuring score", "12.3 s"))
        assert len(text) < 200_000
    assert "kept" in (project / "figures/embedded/notebooks/fig02_03_importance.html").read_text()


def in_browser(page: Path, script: str, tmp_path: Path, width: int = 1280):
    """What `script`, run on the loaded page in a frame `width` wide, returns, and the console's error lines."""
    frame = page.parent / "frame.html"
    frame.write_text(
        f"<iframe id=f src={page.name} width={width} height=900></iframe><script>"
        f"window.onload = () => {{ const w = document.getElementById('f').contentWindow, d = w.document;"
        f"document.title = JSON.stringify({script}) }}</script>"
    )
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1400,1000"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=15000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    frame.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, f"chromium gave no page: {done.stderr[-2000:]}"
    return json.loads(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(project, tmp_path, width):
    script = """{images: d.images.length, broken: [...d.images].filter(i => !i.naturalWidth).map(i => i.src),
                 wide: d.documentElement.scrollWidth - w.innerWidth}"""
    page = project / "figures" / "embedded" / "index.html"
    seen, errors = in_browser(page, script, tmp_path, width)
    assert seen == {"images": 3, "broken": [], "wide": 0} and errors == []
    seen, errors = in_browser(project / "figures" / "index.html", script, tmp_path, width)
    assert seen == {"images": 2, "broken": [], "wide": 0} and errors == []
    seen, errors = in_browser(
        project / "figures" / "embedded" / "notebooks" / "fig02_03_importance.html", script, tmp_path, width
    )
    assert seen["broken"] == [] and seen["wide"] <= 0 and errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
def test_what_names_a_row_stays_in_sight(project, tmp_path):
    """On a telephone, after scrolling a table to its end."""
    script = """(() => { const box = d.querySelector('#tab01 .scroll'); box.scrollLeft = 10000;
        const left = box.getBoundingClientRect().left;
        return [...box.querySelectorAll('tbody tr:first-child td')].slice(0, 2)
            .map(cell => Math.round(cell.getBoundingClientRect().left - left)) })()"""
    page = project / "figures" / "embedded" / "index.html"
    (model, method), _ = in_browser(page, script, tmp_path, 390)
    assert model == 0 < method < 120


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.parametrize("page", sorted((ROOT / "figures").glob("*/index.html")), ids=lambda p: p.parent.name)
def test_committed_pages_in_a_browser(page, tmp_path):
    copy = shutil.copytree(page.parent, tmp_path / "figures")
    script = "[...d.images].filter(i => !i.naturalWidth).map(i => i.src)"
    assert in_browser(copy / "index.html", script, tmp_path) == ([], [])
