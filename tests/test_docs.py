"""The examples of docs/ run."""

import re
from pathlib import Path

import pytest

from ewa_kernels.models import experts_adapters

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["models.md", "saved.md"])
def test_every_block_runs(name, registered, monkeypatch):
    """One after the other, in one namespace."""
    monkeypatch.setattr(experts_adapters, "_registered", [])
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.S)
    assert blocks
    namespace = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


def test_links_exist():
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (DOCS / link).exists(), f"{page.name} links {link}"
