"""What the README and the pages of docs/ tell people to type and to open: it runs as written, and it is there."""

import re
from pathlib import Path

import pytest
from exports import TOKENIZER, wide

import llmdrop
from llmdrop import save_model

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {  # the same lines on a model that is here, with less text and fewer questions
    r'"(Qwen/Qwen3-0.6B|meta-llama/Llama-2-70b-hf)"': '"whole"',
    r'"xsum"': "[TEXT]",
    r"n_samples=16, seq_len=512": "n_samples=2, seq_len=32",
    r'"attn", (8|40)\)': '"attn", 2, keep=[0])',
    r"limit=200": "limit=2",
}


def python_of(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks)
    for written, smaller in SMALLER.items():
        text = re.sub(written, smaller, text)
    return text


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    save_model(wide(), TOKENIZER, "whole")
    exec(python_of("README.md"), {"TEXT": (ROOT / "README.md").read_text() * 2})
    assert "openbookqa" in capsys.readouterr().out
    for saved in ("smaller", "again", "smaller.gguf", "smaller-nas"):
        assert len(llmdrop.find_anatomy(llmdrop.load_model(saved, device="cpu")[0]).plan.attn) == 2


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"`((?:notebooks|figures|tests|benchmarks|llmdrop)/[\w./]+)`", page.read_text()):
            found = [ROOT / name, (ROOT / name).with_suffix(".ipynb")]
            assert any(path.exists() for path in found), f"{page.name}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
