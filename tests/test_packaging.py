"""The package as others install it: built in isolation, with a compiler and without one."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(folder, **environment):
    """Names of the files in the wheel that `pip wheel` builds from a copy of what git tracks."""
    source = folder / "source"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={source}/"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    return wheel, zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds what git tracks")
class TestWheel:
    def test_with_a_compiler(self, tmp_path):
        wheel, names = build_wheel(tmp_path)
        assert any(name.startswith("ewa_kernels/_C.") and name.endswith((".so", ".pyd")) for name in names)
        assert "ewa_kernels/py.typed" in names
        assert "ewa_kernels/surgery/replace.py" in names
        assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel],
            check=True,
        )
        code = "import ewa_kernels.kernels.cpp_rows as c; assert c.WHY_NOT is None; print(c.__file__)"
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert str(tmp_path) in result.stdout

    def test_without_a_compiler(self, tmp_path):
        _, names = build_wheel(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
        assert "ewa_kernels/reference.py" in names
        assert not any(name.endswith((".so", ".pyd")) for name in names)
