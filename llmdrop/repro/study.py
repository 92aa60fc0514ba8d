"""The page of a study: notebooks/my_model.ipynb, run on one's own model and written as one HTML file."""

import html
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ..checkpoints.embedded import short_name
from ..checkpoints.extras import import_extra
from ..files import build_dir, real_path, write_atomic

STYLE = """
:root { --ink: #1c2024; --soft: #5d666f; --line: #dde2e6; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
       -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; line-height: 1.3; margin-top: 2.4rem; }
img { max-width: 100%; height: auto; display: block; margin: .5rem auto; }
.anchor-link, .jp-InputArea-prompt, .jp-OutputArea-prompt { display: none; }
pre { white-space: pre-wrap; font: .84rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.jp-RenderedMarkdown pre, .highlight pre, .highlight { background: #f4f6f7; border-radius: 4px; }
.jp-RenderedMarkdown pre { padding: .7rem .8rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.4; font-variant-numeric: tabular-nums;
        overflow-wrap: normal; }
th { border-bottom: 1.5px solid var(--ink); } td { border-bottom: 1px solid var(--line); }
th, td { padding: .3rem .55rem; text-align: left; vertical-align: top; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_page(executed: str | os.PathLike, page: str | os.PathLike) -> Path:
    """Write an executed notebook as one HTML file that needs no other: text, tables and figures, without the code.

    What was printed while measuring is left out. Returns its path.
    """
    nbformat = import_extra("nbformat", "repro")
    nbconvert = import_extra("nbconvert", "repro")
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)  # progress bars, which nbconvert would write as a script
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_shown(output)]
    exporter = nbconvert.HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r"<table.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.DOTALL)
    title = re.search(r"# (.+)", notebook.cells[0].source)[1]
    parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
    if "MODEL" in parameters:
        title = html.escape(f"{Path(parameters['MODEL']).name}: {title}")
    page = real_path(page)
    write_atomic({page: PAGE.format(title=title, style=STYLE, body=body)})
    return page


def _is_shown(output) -> bool:
    """Whether an output belongs on the page: no progress bars, nothing of what was measured when."""
    if output.get("name") == "stdout":
        output.text = re.sub(r"(?m)^(another process is )?(measuring|waiting) .*\n?", "", output.text)
        output.text = re.sub(r"(?m)^ [\d.]+ s\n?", "", output.text)
        return bool(output.text.strip())
    return output.get("name") != "stderr" and not any("widget" in kind for kind in output.get("data", {}))


def notebook_file() -> Path:
    """my_model.ipynb, of the checkout or of the installed package. Raises FileNotFoundError without it."""
    here = Path(__file__).parents[2] / "notebooks" / "my_model.ipynb"
    if here.is_file():
        return here
    try:
        installed = [file.locate() for file in files("llmdrop") or [] if file.name == "my_model.ipynb"]
    except PackageNotFoundError:
        installed = []
    if not installed:
        raise FileNotFoundError("my_model.ipynb is not here: install llmdrop by pip, or run a checkout of it")
    return Path(installed[0])


def study(model: str, out: str | os.PathLike | None = None, **parameters) -> Path:
    """Run notebooks/my_model.ipynb on a model; returns the path of the page, <out>/my_model.html.

    model: see `llmdrop.load_model`. out: folder of the page, the executed notebook, figures and numbers (None: below
    `build_dir()`). parameters: others of the notebook, as CALIBRATION, TASKS, MAX_LOSS, SPEEDUP, KV, BATCH, CONTEXT,
    SAMPLES, DEVICE, DATA_DIR. What is measured is stored and never measured twice. Raises ImportError without the extra
    "repro", FileNotFoundError without the notebook, ValueError for an unknown parameter, papermill's
    PapermillExecutionError where a cell fails.
    """
    papermill = import_extra("papermill", "repro")
    known = papermill.inspect_notebook(str(notebook_file()))
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"no parameter {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    folder = real_path(out) if out else build_dir() / "study" / short_name(model)
    folder.mkdir(parents=True, exist_ok=True)
    # the interpreter that runs this, whatever else is called python3
    kernels = [f"{sys.prefix}/share/jupyter", os.environ.get("JUPYTER_PATH")]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, kernels))
    os.environ.pop("MPLBACKEND", None)  # where it names a backend without a screen, a kernel shows no figures
    executed = folder / "my_model.ipynb"
    papermill.execute_notebook(
        notebook_file(),
        executed,
        parameters | {"MODEL": model, "OUT": str(folder)},
        kernel_name="python3",
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
    )
    return write_page(executed, folder / "my_model.html")
