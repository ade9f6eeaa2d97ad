"""Descriptors, tiles, accumulators and stmatrix of csrc/hopper are as CUTLASS's headers have them, element by element.

The headers come with the extra `cutlass`, or from the folder that CUTLASS_INCLUDE names.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
from host_model import MODEL, nvcc


def headers():
    if "CUTLASS_INCLUDE" in os.environ:
        return Path(os.environ["CUTLASS_INCLUDE"])
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "source/include"


def test_layouts(tmp_path):
    include = headers()
    if include is None:
        pytest.skip("no headers of CUTLASS")
    assert (include / "cute/tensor.hpp").exists()
    source, binary = MODEL / "hopper_cutlass.cpp", tmp_path / "layouts"
    command = [*nvcc(), "-w", "--expt-relaxed-constexpr", f"-I{include}"]
    subprocess.run([*command, "-x", "cu", source, "-o", binary], check=True)
    said = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    # CUTLASS says of addresses in shared memory that the host has none; they are not compared.
    found = {name: (int(n), int(of)) for name, n, of in re.findall(r"^([\w, -]+): (\d+) of (\d+)$", said, re.MULTILINE)}
    assert found.pop("elements, another order")[0] > 0
    compared = {
        "descriptors, K-major": 6,
        "descriptors, MN-major": 4,
        "steps": 16,
        "elements, K-major": 256 * 64,
        "elements, MN-major": 256 * 64,
        "accumulators": 64 * (64 + 96 + 128 + 192 + 256),
        "stmatrix": 64 * 64,
    }
    assert found == {name: (0, of) for name, of in compared.items()}
