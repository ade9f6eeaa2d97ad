"""The shape of the project: imports go down only, files stay small, the README names what exists."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ewa_kernels
from ewa_kernels.__main__ import advice, facts, report
from ewa_kernels.kernels import devices, extension
from ewa_kernels.kernels import triton as triton_kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ewa_kernels"

# What each part may import from this package, besides `version` and itself.
LAYERS = {
    "version": set(),
    "activations": set(),
    "reference": {"codec"},
    "private_torch": set(),
    "codec": set(),
    "problem": {"codec"},
    "kernels": {"_C", "codec", "private_torch", "problem", "reference"},
    "backends": {"checks", "kernels"},
    "routed": {"calls", "checks", "functional", "modules"},
    "memory": set(),
    "checks": {"activations", "memory", "private_torch"},
    "train/shards": {"checks"},
    "flops": set(),
    "seeds": {"kernels", "private_torch"},
    "ops": {"checks", "flops", "kernels", "private_torch", "problem", "reference", "seeds"},
    "calls": {"backends", "checks", "kernels", "ops", "private_torch", "problem", "reference", "seeds"},
    "linear": {
        "backends",
        "calls",
        "checks",
        "flops",
        "kernels",
        "ops",
        "private_torch",
        "problem",
        "reference",
    },
    "functional": {
        "backends",
        "calls",
        "checks",
        "kernels",
        "linear",
        "ops",
        "private_torch",
        "problem",
        "reference",
        "seeds",
        "train/shards",
    },
    "modules": {"activations", "backends", "calls", "checks", "functional", "problem", "train/shards"},
    "train/__init__": set(),
    "train/share_rate": {"checks"},
    "train/watch": {"train/lookup", "train/shards"},
    "train/undone": {"train/lookup", "train/shards"},
    "train/attachment": {
        "kernels",
        "private_torch",
        "train/lookup",
        "train/shards",
        "train/undone",
        "train/watch",
    },
    "surgery": {"models"},
    "models": {
        "activations",
        "backends",
        "calls",
        "checks",
        "functional",
        "modules",
        "private_torch",
        "problem",
        "train/shards",
    },
    "train/lookup": set(),
    "train/found": {"models", "modules", "train/lookup"},
    "train/averager": {
        "backends",
        "checks",
        "functional",
        "kernels",
        "train/attachment",
        "train/found",
        "train/lookup",
        "train/shards",
        "train/share_rate",
        "private_torch",
    },
    "train/weight_decay": {"checks", "models", "modules"},
    "train/adamw_by_torch": set(),
    "train/adamw": {
        "backends",
        "checks",
        "functional",
        "kernels",
        "ops",
        "train/adamw_by_torch",
        "train/attachment",
        "train/averager",
        "train/lookup",
        "train/shards",
        "private_torch",
    },
    "optim": {"train/adamw"},
    "integrations": {"*"},
    "ptx": set(),
    "aot": {"kernels", "problem", "ptx"},
    "demo": {"*"},
    "__init__": {"*"},
    "__main__": {"*"},
}


def part_of(path):
    return part(*path.relative_to(PACKAGE).with_suffix("").parts)


def part(top, *rest):
    """What LAYERS knows a module by: files of `train` one by one, since what most use lies beside what uses most."""
    return f"train/{rest[0]}" if top == "train" else top


def imports_of(path):
    """(top-level package, None) or ("", part of this package) of every import in a file, nested ones too."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            module = package[: len(package) + 1 - node.level] + tuple(node.module.split(".") if node.module else ())
            yield from (("", part(*module, alias.name)) for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
class TestFiles:
    def test_imports_go_down_only(self, path):
        own = part_of(path)
        allowed = LAYERS[own] | {own, "version"}
        if "*" in allowed:
            return
        for top, imported in imports_of(path):
            triton = {"triton"} if own in ("kernels", "aot") else set()
            assert top in sys.stdlib_module_names | {"", "torch"} | triton, f"imports {top}"
            assert imported is None or imported in allowed, f"{own} imports {imported}"

    def test_does_not_import_the_package_by_its_name(self, path):
        """Hugging Face's kernels loads it by another."""
        assert "ewa_kernels" not in {top for top, _ in imports_of(path)}

    def test_is_small_and_has_a_docstring(self, path):
        assert len(path.read_text().splitlines()) <= (600 if path.name == "reference.py" else 400)
        assert path.name == "version.py" or ast.get_docstring(ast.parse(path.read_text()))


def test_the_specification_imports_only_torch():
    imported = {*imports_of(PACKAGE / "reference.py"), *imports_of(PACKAGE / "codec.py")}
    assert imported - {(name, None) for name in sys.stdlib_module_names} == {("torch", None), ("", "codec")}


def test_the_specification_is_no_production_path():
    """But for the backend "reference", and for the mask of dropout in backend "torch"."""
    importing = {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in PACKAGE.rglob("*.py")
        if "reference" in {imported for _, imported in imports_of(path)}
    }
    of_backend = {"calls", "linear", "ops", "functional", "kernels/permutation"}
    assert importing == {"__init__", *of_backend, "kernels/blocked/torch_rows", "kernels/triton/permutation"}


def test_every_public_name_exists_and_is_documented():
    for name in ewa_kernels.__all__:
        assert hasattr(ewa_kernels, name)
        if name != "__version__":
            assert getattr(ewa_kernels, name).__doc__
    assert ewa_kernels.__version__ == ewa_kernels.version.VERSION


def test_importing_brings_no_optional_library():
    optional = (
        "matplotlib",
        "sklearn",
        "rich",
        "scipy",
        "timm",
        "torchvision",
        "transformers",
        "lightning",
        "accelerate",
    )
    code = f"import sys, ewa_kernels; print([m for m in {optional} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_readme_names_only_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test", "make venv", "make bench", "make docs"):
        assert command in text
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for command in re.findall(r"`make ([a-z-]+)`", text):
        assert command in targets


def test_the_citation_has_the_version():
    assert f"version: {ewa_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_report_names_every_operation_and_the_reason():
    text = report()
    for word in (
        "torch",
        "random_permutation",
        "moe_ffn",
        "average_experts_",
        "merge_experts",
        "On cpu backend='auto'",
    ):
        assert word in text
    command = [sys.executable, "-m", "ewa_kernels"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == text
    said = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == facts()


def test_report_says_how_to_get_what_is_faster(monkeypatch):
    assert advice() == []
    monkeypatch.setattr(extension, "WHY_NOT", "the C++ extension is not built")
    (sentence,) = advice()
    assert "pip install --force-reinstall --no-deps ." in sentence
    assert sentence in report()
    moe_ffn = facts()["operations"]["cpu"]["moe_ffn"]
    assert moe_ffn["backend"] == "torch"
    assert moe_ffn["why_not"] == {"cpp": "the C++ extension is not built"}


@pytest.mark.parametrize("triton", [None, "Triton is not installed: pip install triton"])
@pytest.mark.parametrize("cuda", [None, "the extension is built without CUDA"])
@pytest.mark.parametrize("driver", [None, "the driver is for CUDA 12.0: update it"])
def test_advice_on_a_gpu(monkeypatch, triton, cuda, driver):
    """Each that is missing, and no question to the driver by an extension that has no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_kernels, "WHY_NOT", triton)
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", cuda)
    monkeypatch.setattr(devices, "old_driver", lambda: driver if cuda is None else 1 / 0)
    found = "\n".join(advice())
    assert (triton is not None) == ("by Triton: Triton is not installed" in found)
    assert (cuda is not None) == ("nvcc for GPUs" in found)
    assert (cuda is None and driver is not None) == ("the driver is for CUDA 12.0" in found)
