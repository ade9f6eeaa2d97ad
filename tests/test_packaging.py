"""The package as others install it: built in isolation, with nvcc and without, with a compiler and without one."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds what git tracks"),
]
USE = """
import sys
# Else an editable installation in this environment lends what the wheel lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, ewa_kernels as ewa
from ewa_kernels.kernels import extension
experts = torch.ones(4, 3)
experts[0] = 5
ewa.functional.average_experts_([experts], 0.75)
assert (experts == 2).all()
print(ewa.__file__, extension.WHY_NOT, extension.CUDA_ARCHITECTURES, sep="\\n")
"""


def checkout(folder):
    """A copy of what git tracks, in a folder with a space in its name."""
    source = folder / "a source"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={source}/"], check=True)
    return source


def build_wheel(folder, source=None, **environment):
    """The wheel that pip builds, and the names of its files."""
    source = source or checkout(folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    return wheel, zipfile.ZipFile(wheel).namelist()


def use_wheel(folder, wheel):
    """(why there is no extension, architectures), said by the wheel, installed beside this environment's torch."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", USE]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    file, why_not, architectures = result.stdout.splitlines()
    assert file.startswith(str(folder))
    return why_not, architectures


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What `make hub` makes, in the folder of its source; dist/cpu has the wheel that it is made of."""
    if sys.platform != "linux":
        pytest.skip("auditwheel is for Linux")
    source = checkout(tmp_path_factory.mktemp("hub"))
    subprocess.run(["make", "hub", f"PYTHON={sys.executable}"], cwd=source, check=True, capture_output=True, text=True)
    return source / "build" / "hub"


def test_make_wheel(tmp_path, hub):
    """One that auditwheel lets pass, for Linux of many kinds."""
    (wheel,) = (hub.parent.parent / "dist" / "cpu").glob("*.whl")
    assert "manylinux" in wheel.name
    assert use_wheel(tmp_path, wheel) == ("None", "None")


LOAD = """
import importlib, sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, sys.argv[1])
import kernels, torch
for repository in sys.argv[2:]:
    ewa = kernels.get_local_kernel(Path(repository), backend="cpu")
    facts = importlib.import_module(f"{ewa.__name__}.__main__").facts()
    assert {facts["operations"]["cpu"][name]["backend"] for name in ("moe_ffn", "average_experts_")} == {"cpp"}, facts
    operations = importlib.import_module(f"{ewa.__name__}.ops")
    assert operations.random_permutation.name() == f"{ewa.__name__}::random_permutation", "each has its own"
    layer = ewa.RandomPartitionMoE(16, 32, num_experts=4)
    x, upstream = torch.randn(2, 26, 16)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    y, expected = layer(x, seed=7), ewa.reference.moe_ffn(x, *layer.experts, seed=7)
    for ours, theirs in zip(
        [y, *torch.autograd.grad(y, leaves, upstream)],
        [expected, *torch.autograd.grad(expected, leaves, upstream)],
    ):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs)
    averaged = [parameter.detach().clone() for parameter in layer.parameters()]
    ewa.reference.average_experts_(averaged, 0.3)
    ewa.ExpertAverager(layer, share_rate=0.3).step()
    torch.testing.assert_close(list(layer.parameters()), averaged)
    print(sys.modules[f"{ewa.__name__}._C"].__file__)
assert not [name for name in sys.modules if name.startswith("ewa_kernels")]
"""


def test_make_hub(tmp_path, hub):
    """Hugging Face's kernels loads it, and another version beside it, in a process that has no other ewa_kernels."""
    (metadata,) = shutil.copytree(hub, tmp_path / "other").glob("build/*/metadata.json")
    metadata.write_text(metadata.read_text().replace('"id": "', '"id": "other'))
    # Not in this environment: where transformers finds `kernels`, it imports it.
    libraries = tmp_path / "libraries"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", libraries, "kernels==0.17.*"]
    subprocess.run(command, check=True)
    command = [sys.executable, "-I", "-c", LOAD, libraries, hub, tmp_path / "other"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = result.stdout.splitlines()
    assert files[0].startswith(f"{hub}/build/torch-stable-abi211-cpu-")
    assert files[1].startswith(f"{metadata.parent}/_C.")


def test_without_a_compiler(tmp_path):
    wheel, names = build_wheel(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert "ewa_kernels/reference.py" in names
    assert not any(name.endswith((".so", ".pyd")) for name in names)
    why_not, _ = use_wheel(tmp_path, wheel)
    assert why_not.startswith("the C++ extension is not built (No module named 'ewa_kernels._C')")
    assert "pip install" in why_not


def test_with_an_nvcc_that_fails(tmp_path):
    """The C++ part is built all the same."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    wheel, _ = build_wheel(tmp_path, CUDA_HOME=str(tmp_path), CXXFLAGS="-O0")
    assert use_wheel(tmp_path, wheel) == ("None", "None")


@pytest.fixture
def build(monkeypatch):
    """What setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_what_failed_comes_first(build, tmp_path):
    """Before what the compiler goes on to say."""
    (tmp_path / "say.sh").write_text("echo 'a.h: fatal error: no b.h'\nseq 100\nexit 1\n")
    (tmp_path / "build.ninja").write_text("rule fail\n  command = sh say.sh\nbuild x: fail\n")
    with pytest.raises(build["CompileError"], match=r"^FAILED.*\n.*fatal error: no b.h\n\d+\n") as raised:
        build["run_ninja"](tmp_path)
    assert len(str(raised.value).splitlines()) < 30


@pytest.mark.parametrize(
    ("release", "expected"), [("11.8", ["80", "90"]), ("12.0", ["80", "90", "90a"]), ("13.0", ["80", "90", "90a"])]
)
def test_architectures(build, tmp_path, monkeypatch, release, expected):
    """nvcc lists 90 alone where it knows 90a, and where it does not yet."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V{release}.1" || echo sm_80 sm_90\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("EWA_CUDA_ARCHITECTURES", "80 90 90a 120")
    assert build["architectures"](str(nvcc)) == expected


@pytest.mark.parametrize("cxx", ["g++", "ccache g++", "g++ -pthread -B /some/folder", "env A=b g++ -m64"])
def test_compiler_for_nvcc(build, cxx):
    assert build["host_compiler"](cxx) == "g++"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_with_nvcc_and_settings(tmp_path):
    """A folder with a space, options for the linker with commas, a launcher before the compiler; and where only slow
    kernels for Hopper come out, which is what ptxas says of them, the rest of the CUDA part is built."""
    home = tmp_path / "a toolkit"
    (home / "bin").mkdir(parents=True)
    nvcc, fault = home / "bin" / "nvcc", "echo '(C7510) Potential Performance Loss'"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*hopper/*) for out; do :; done; : >"$out"; {fault}; exit;; esac\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    nvcc.chmod(0o755)
    flags = {"LDFLAGS": "-Wl,-O1,--as-needed '-L/a folder'", "CXX": "env A=b c++ -pthread", "CXXFLAGS": "-O0"}
    wheel, _ = build_wheel(tmp_path, CUDA_HOME=str(home), EWA_CUDA_ARCHITECTURES="90a", **flags)
    assert use_wheel(tmp_path, wheel) == ("None", "90a")
    command = [sys.executable, "-c", USE + "assert not extension.HAS_HOPPER"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, check=True)


def test_from_an_sdist(tmp_path):
    source = checkout(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=source, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    wheel, names = build_wheel(tmp_path, archive, EWA_CUDA_ARCHITECTURES="")
    assert any(name.startswith("ewa_kernels/_C.") and name.endswith((".so", ".pyd")) for name in names)
    assert "ewa_kernels/py.typed" in names
    assert "ewa_kernels/kernels/forms.json" in names
    assert "ewa_kernels/models/replace.py" in names
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
    assert use_wheel(tmp_path, wheel) == ("None", "None")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_with_nvcc(tmp_path):
    """Compiled for every architecture, linked, loaded without a GPU; and ptxas had registers enough."""
    pytest.importorskip("triton")
    from ewa_kernels.aot import TOOLS

    wheel, names = build_wheel(tmp_path)
    assert use_wheel(tmp_path, wheel) == ("None", "80 86 89 90a 100 120")
    (module,) = (name for name in names if name.startswith("ewa_kernels/_C.") and name.endswith(".so"))
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", tmp_path / "site" / module]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    of_hopper = [name for name, *_ in kernels if "3ewa6hopper" in name]
    # Of every activation, gated, with dropout, of rows by slot and by token, and both projections in one launch.
    assert len(of_hopper) > 140, usage
    # The pass over 4, 8 or any number of experts, with AdamW or without; and what writes large tables.
    assert len(kernels) - len(of_hopper) == 6 * (2 * 3 + 1), usage
    for _, registers, stack, local in kernels:
        assert int(registers) <= 255
        assert (stack, local) == ("0", "0"), usage
    command = [TOOLS / "cuobjdump", "--list-ptx", tmp_path / "site" / module]
    assert ".ptx" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
