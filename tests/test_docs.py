"""README and the pages of docs/: examples run, links lead somewhere, pages build and have every public name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ewa_kernels as ewa
from ewa_kernels.models import experts_adapters, ffn_adapters

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NO_EXAMPLES = {"api.md", "design.md", "evidence.md", "limits.md", "performance.md", "training.md"}


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in NO_EXAMPLES], ids=lambda path: path.name)
def test_every_block_runs(path, monkeypatch):
    """One after the other, in one namespace."""
    monkeypatch.setattr(experts_adapters, "_registered", [])
    monkeypatch.setattr(ffn_adapters, "_registered", [])
    blocks = re.findall(r"```python\n(.*?)```", PAGES[path], flags=re.S)
    assert blocks
    namespace = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, path.name, "exec"), namespace)


def test_links_exist():
    for path, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
            assert (path.parent / link).exists(), f"{path.name} links {link}"


def test_files_that_pages_name_exist():
    for page, text in PAGES.items():
        for path in re.findall(r"`((?:benchmarks|examples|tests|csrc|ewa_kernels)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_pages_build_without_a_warning_and_have_every_public_name(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path]  # --quiet counts no warnings
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    ids = set(re.findall(r'id="(ewa_kernels[^"]*)"', (tmp_path / "api" / "index.html").read_text()))
    modules = {f"ewa_kernels.{name}" for name in ("functional", "integrations", "optim", "reference")}
    names = {f"ewa_kernels.{name}" for name in ewa.__all__} - modules - {"ewa_kernels.__version__"}
    names |= {f"ewa_kernels.functional.{name}" for name in ewa.functional.__all__}
    assert names <= ids, sorted(names - ids)
