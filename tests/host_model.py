"""How tests compile what is in csrc/hopper: by a C++ compiler for the model of sm_90a on the host, and by nvcc."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests/cuda_on_host"
MODES = ("late", "random", "at_once", "late_products")  # of cuda_on_host/machine/trials.h


def compiler():
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def flags(csrc=ROOT / "csrc"):
    """For the model; `csrc`: where the kernels are."""
    include = [f"-I{folder}" for folder in (csrc, csrc / "hopper", MODEL / "machine")]
    return ["-std=c++17", "-Og", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *include]


def nvcc():
    """With what every compilation for the device has."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("no nvcc")
    return [found, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]


def nvcc_as_shipped():
    """`nvcc`, optimised; ptxas says what it did."""
    return [*nvcc(), "-O3", "-DNDEBUG", "-Xptxas", "-v"]
