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

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files"
).split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A profile, two executed notebooks, one failed one, two figures, two tables and three claims: all made up."""
    root = tmp_path_factory.mktemp("project")
    figures, done = root / "figures", root / "executed"
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
    ids = list(report.paper.claims()["id"])
    for id, measured, holds in ((ids[0], 0.98764, True), (ids[1], 0.4321, False), (ids[2], None, None)):
        row = {"measured": measured, "error": 0.0123 if measured else None, "holds": holds, "detail": "made up"}
        row |= {"id": id, "verdict": {True: "holds", False: "differs", None: "not run"}[holds]}
        (figures / "claims" / f"{id}.json").write_text(json.dumps(row))
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
    return report.build(root / "notebooks/profiles/embedded.yaml", root / "executed", root / "figures")


def test_every_item_of_the_paper_is_there(project):
    page = (project / "figures" / "index.html").read_text()
    places = [page.index(f'id="{kind}{n:02d}"') for kind in ("fig", "tab") for n in range(1, 13)]
    assert places == sorted(places)
    assert page.index('id="claims"') < page.index('id="errata"') < places[0]
    sections = dict(re.findall(r'<section class="item[^>]*id="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert 'src="fig02_03_importance.png"' in sections["fig02"]
    assert "notebooks/fig02_03_importance.html" in sections["fig02"] and "0123abc" in sections["fig02"]
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
    assert page.count(">not run</span>") == len(report.paper.claims())
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


def test_numbers_have_the_digits_of_their_errors():
    cases = {(0.98764, 0.0123): "0.988 ± 0.012", (-4.25, 3.31): "−4.2 ± 3.3", (100.4, 18.3): "100 ± 18"}
    cases |= {(0.0, 0.0): "0 ± 0", (90.0, None): "90", (None, None): "not run", (1.19, float("nan")): "1.19"}
    for (measured, error), text in cases.items():
        assert report.measured_text(dict(measured=measured, error=error)).replace("\u00a0", " ") == text


def test_a_verdict_within_the_error_is_undecided():
    claim = dict(tolerance=">= 95 % of baseline", measured=97.0, error=1.1)
    assert report.undecided(claim) and not report.undecided(claim | dict(error=0.9))
    assert not report.undecided(claim | dict(error=None)) and not report.undecided(claim | dict(measured=None))


def test_claims_are_joined(project):
    import pandas as pd

    claims = pd.read_csv(project / "figures" / "claims.csv")
    assert {"id", "statement", "where", "published", "measured", "tolerance", "verdict", "notebook"} <= set(claims)
    assert list(claims["verdict"][:3]) == ["holds", "differs", "not run"]
    page = (project / "figures" / "index.html").read_text()
    assert "0.988\u00a0±\u00a00.012" in page and ">1 hold</span>" in page and ">1 differ</span>" in page


def test_the_same_inputs_give_the_same_bytes(project):
    pages = sorted((project / "figures").rglob("*.html"))
    before = [page.read_bytes() for page in pages]
    rebuild(project)
    assert before == [page.read_bytes() for page in pages] and len(pages) == 2


def test_pages_are_impersonal_small_and_offline(project):
    for page in (project / "figures").rglob("*.html"):
        text = page.read_text()
        assert str(ROOT) not in text and f"{Path.home()}/" not in text
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text), "loads something from the network"
        assert not any(found in text for found in ("0x7f00deadbeef", "a progress bar", "measuring score", "12.3 s"))
        assert len(text) < 200_000
    assert "kept" in (project / "figures/notebooks/fig02_03_importance.html").read_text()


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
@pytest.mark.parametrize("width", [1280, 375])
def test_in_a_browser(project, tmp_path, width):
    script = """{images: d.images.length, broken: [...d.images].filter(i => !i.naturalWidth).map(i => i.src),
                 wide: d.documentElement.scrollWidth - w.innerWidth}"""
    page = project / "figures" / "index.html"
    seen, errors = in_browser(page, script, tmp_path, width)
    assert seen == {"images": 3, "broken": [], "wide": 0} and errors == []
    seen, errors = in_browser(project / "figures" / "notebooks" / "fig02_03_importance.html", script, tmp_path, width)
    assert seen["broken"] == [] and seen["wide"] <= 0 and errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
@pytest.mark.parametrize("page", sorted((ROOT / "figures").glob("*/index.html")), ids=lambda p: p.parent.name)
def test_committed_pages_in_a_browser(page, tmp_path):
    copy = shutil.copytree(page.parent, tmp_path / "figures")
    script = "[...d.images].filter(i => !i.naturalWidth).map(i => i.src)"
    assert in_browser(copy / "index.html", script, tmp_path) == ([], [])
