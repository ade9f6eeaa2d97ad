"""Builds the extension in other ways than `setup.py` does, and runs tests with what came out.

python tests/extension_variants.py sanitized      C++ with the address and undefined-behaviour sanitizers
python tests/extension_variants.py cuda-on-host   the CUDA kernel compiled for the host: see cuda_on_host/
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent
TESTS = {
    "sanitized": (
        "experts",
        "optim",
        "optim_copies",
        "optim_plans",
        "optim_bad_input",
        "cpp",
        "products",
        "expert_linear",
        "saved",
        "exchange",
    ),
    "cuda-on-host": ("experts", "optim", "optim_copies", "optim_plans", "cuda_on_host"),
}
# Without the kernels for Hopper, which tests/hopper_model.py compiles.
CXX_SOURCES = tuple(sorted(str(path) for path in (ROOT / "csrc").rglob("*.cpp") if path.parent.name != "hopper"))
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
VARIANTS = {
    "sanitized": (f"-O1 -fopenmp {SANITIZERS}", CXX_SOURCES),
    "cuda-on-host": (
        """-O1 -I tests/cuda_on_host '-DEWA_CUDA="host"' -Wno-unknown-pragmas""",
        (*CXX_SOURCES, str(ROOT / "csrc/parameter_pass/cuda.cu")),
    ),
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def build(variant: str, folder: Path) -> Path:
    """The module's file."""
    flags, sources = VARIANTS[variant]
    includes = [f"-I{folder}" for folder in (sysconfig.get_path("include"), pybind11.get_include(), ROOT / "csrc")]
    common = [*compiler(), "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", *includes, *shlex.split(flags)]
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*common, "-x", "c++", *sources, "-o", str(target)], cwd=ROOT, check=True)
    return target


def run_tests(variant: str, *arguments: str) -> None:
    """Raises CalledProcessError if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "EWA_TEST_EXTENSION": str(build(variant, Path(folder))),
            "EWA_TEST_VARIANT": variant,
        }
        if variant == "sanitized":
            runtimes = [
                subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
                for name in ("libasan.so", "libubsan.so")
            ]
            environment["LD_PRELOAD"] = " ".join(runtime.stdout.strip() for runtime in runtimes)
            # Python and torch leave memory to the end of the process, and load C++ that does as it likes.
            environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0"
        tests = [f"tests/test_{name}.py" for name in TESTS[variant]]
        options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-k", "not triton and not cublas"]
        command = [sys.executable, "-m", "pytest", *options, *tests, *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    run_tests(*sys.argv[1:])
