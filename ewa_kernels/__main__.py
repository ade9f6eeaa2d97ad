"""`python -m ewa_kernels`: what this machine is, which backend each operation will use, and why no faster one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import ewa_kernels.backends as backends
from ewa_kernels.kernels import extension
from ewa_kernels.version import VERSION


def report() -> str:
    """The whole report, as text."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    lines = [
        f"ewa_kernels  {VERSION}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}, "
        + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"),
        f"cpu          {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"cuda         {_cuda()}",
        f"triton       {triton}",
        f"extension    {_extension()}",
    ]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        lines.append(f"\non {device}, backend='auto' is")
        for row in backends.table(torch.device(device)):
            lines.append("  {:20} {:10} {}".format(*row))
    return "\n".join(lines)


def _extension() -> str:
    if extension.WHY_NOT is not None:
        return extension.WHY_NOT
    if extension.WHY_NOT_CUDA is not None:
        return f"C++ for the CPU; {extension.WHY_NOT_CUDA}"
    return f"C++ for the CPU, CUDA for sm_{', sm_'.join(str(extension.CUDA_ARCHITECTURES).split())}"


def _cuda() -> str:
    if not torch.version.cuda:
        return "none: this torch was built without it"
    if not torch.cuda.is_available():
        return "none: torch finds no usable GPU"
    return ", ".join(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )


if __name__ == "__main__":
    print(report())
