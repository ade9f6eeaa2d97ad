"""The pages of docs/: their examples run, their links lead somewhere, they build, and no public name is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ewa_kernels as ewa
from ewa_kernels.models import experts_adapters, ffn_adapters

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.S) for name, text in PAGES.items()}


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_every_block_runs(name, monkeypatch):
    """One after the other, in one namespace."""
    monkeypatch.setattr(experts_adapters, "_registered", [])
    monkeypatch.setattr(ffn_adapters, "_registered", [])
    namespace = {"__name__": "docs"}
    for block in BLOCKS[name]:
        exec(compile(block, name, "exec"), namespace)


def test_links_exist():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
            assert (DOCS / link).exists(), f"{name} links {link}"


def test_files_that_pages_name_exist():
    root = DOCS.parent
    for name, text in {**PAGES, "README.md": (root / "README.md").read_text()}.items():
        for path in re.findall(r"`((?:benchmarks|examples|tests|csrc|ewa_kernels)/[\w./-]+)`", text):
            assert (root / path).exists(), f"{name} names {path}"


def test_pages_build_without_a_warning_and_have_every_public_name(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    ids = set(re.findall(r'id="(ewa_kernels[^"]*)"', (tmp_path / "api" / "index.html").read_text()))
    modules = {f"ewa_kernels.{name}" for name in ("functional", "integrations", "optim", "reference")}
    names = {f"ewa_kernels.{name}" for name in ewa.__all__} - modules - {"ewa_kernels.__version__"}
    names |= {f"ewa_kernels.functional.{name}" for name in ewa.functional.__all__}
    assert names <= ids, sorted(names - ids)
