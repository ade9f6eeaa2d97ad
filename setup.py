"""Builds the C++ extension. Without a compiler the package installs without it and runs on PyTorch calls."""

import platform

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

compile_args = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
if platform.system() == "Linux":
    # Compiled for OpenMP and not linked with it: the symbols come from the runtime that torch has loaded. A second
    # runtime would bring threads of its own, which fight with torch's for the cores.
    compile_args.append("-fopenmp")
elif platform.system() == "Windows":
    compile_args = ["/O2"]

setup(
    ext_modules=[
        Pybind11Extension(
            "ewa_kernels._C",
            ["csrc/bindings.cpp", "csrc/cpu.cpp"],
            depends=["csrc/cpu.h", "csrc/activations.h"],
            cxx_std=17,
            extra_compile_args=compile_args,
            optional=True,
        )
    ]
)
