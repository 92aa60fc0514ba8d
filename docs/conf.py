"""Sphinx' settings for `make docs`: the pages of docs/, the README and figures/, and the API from docstrings.

The sources are build/docs-source: copies of the repository's Markdown, and api/, one page for every folder of llmdrop,
written here. On a git host the same Markdown is read as it is.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "docs-source"


def in_order(first: str, found) -> list[str]:
    """The names of files that were found: those named first in that order, then the others."""
    names = sorted(file.stem for file in found if not file.stem.startswith("_"))
    return [name for name in first.split() if name in names] + [name for name in names if name not in first.split()]


PAGES = in_order("own_model serving profiles claims beyond architecture", (ROOT / "docs").glob("*.md"))
CORE = in_order("plan proof anatomy calibration hooks scoring sublayers prune files", (ROOT / "llmdrop").glob("*.py"))
FOLDERS = in_order(
    "checkpoints data evaluation speed streaming serving compress repro",
    (file.parent for file in (ROOT / "llmdrop").glob("*/__init__.py")),
)

project = "llmdrop"
author = "The llmdrop authors"
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "api/*.rst", "figures/README.md", "figures/*/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
suppress_warnings = ["toc.not_included"]  # tables of figures/ are reached by links
html_theme = "furo"
html_title = "llmdrop"
html_show_copyright = False
html_copy_source = False
myst_heading_anchors = 3

default_role = "py:obj"  # `score` in a docstring leads to score
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}  # those that have docstrings
autodoc_mock_imports = ["vllm", "llmcompressor"]  # optional engines, where they are not installed
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False


def modules(folder: str) -> list[str]:
    """Full names of the modules of a folder; "core": of the package itself, in reading order."""
    if folder == "core":
        return [f"llmdrop.{name}" for name in CORE]
    return [f"llmdrop.{folder}.{name}" for name in in_order("", (ROOT / "llmdrop" / folder).glob("*.py"))]


def heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n\n"


def write_api_pages(app) -> None:
    """api/llmdrop.rst, the names that `import llmdrop` brings, and a page for the rest of every folder."""
    import llmdrop

    names = {
        name: value for name, value in vars(llmdrop).items() if getattr(value, "__module__", "").startswith("llmdrop.")
    }
    text = heading("llmdrop") + ".. py:module:: llmdrop\n\nWhat ``import llmdrop`` brings.\n\n"
    for name, value in names.items():
        directive = "autoclass" if isinstance(value, type) else "autofunction"
        text += f".. {directive}:: llmdrop.{name}\n\n"
    pages = {"llmdrop": text}
    for folder in ("core", *FOLDERS):
        text = heading(folder.capitalize() if folder != "core" else "The core")
        for module in modules(folder):
            public = [name for name, value in names.items() if value.__module__ == module]
            text += heading(module.removeprefix("llmdrop."), "-")
            text += f".. automodule:: {module}\n   :exclude-members: {', '.join(public)}\n\n"
            if public:
                text += "On the page of llmdrop: " + ", ".join(f"`llmdrop.{name}`" for name in public) + ".\n\n"
        pages[folder] = text
    (SOURCE / "api").mkdir(exist_ok=True)
    for name, text in pages.items():
        (SOURCE / "api" / f"{name}.rst").write_text(text)


def add_contents(app, docname: str, source: list[str]) -> None:
    """The table of contents, which a git host would show as code, is put into the first page here."""
    if docname == root_doc:
        listed = [f"docs/{page}" for page in PAGES] + ["CHANGELOG"]
        api = [f"api/{page}" for page in ("llmdrop", "core", *FOLDERS)]
        for caption, pages in (("Pages", listed), ("API", api)):
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def as_plain_text(app, what: str, name: str, value, options, lines: list[str]) -> None:
    """In docstrings stars, bars and a final underscore mean themselves, and what is indented is shown as it stands."""
    shown = []
    for line in lines:
        indented = line.startswith(" ")
        if indented and shown and not shown[-1]:
            shown += ["::", ""]
        shown.append(line if indented else re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", line))
    lines[:] = shown


def link_instead_of_download(app, doctree) -> None:
    """Links to reports lead to their copies in figures/, where their pictures are."""
    for download in list(doctree.findall(addnodes.download_reference)):
        download.replace_self(nodes.reference("", "", *download.children, refuri=download["reftarget"]))


def add_reports(app, error: Exception | None) -> None:
    """The reports of figures/ as they are, and an index.html, which is the README."""
    if error is None:
        shutil.copytree(ROOT / "figures", Path(app.outdir) / "figures", dirs_exist_ok=True)
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app) -> None:
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_plain_text)
    app.connect("doctree-read", link_instead_of_download, priority=0)  # before downloads are collected
    app.connect("build-finished", add_reports)
