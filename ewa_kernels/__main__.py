"""`python -m ewa_kernels`: what this machine is, what runs each operation, and how to get what is faster.

`--json` prints the same for programs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import torch

from . import backends
from .kernels import devices, extension
from .kernels import triton as triton_kernels
from .version import VERSION


def facts() -> dict[str, Any]:
    """Versions; of each device the operations, with what "auto" picks and why nothing faster; advice."""
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "ewa_kernels": VERSION,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, "
        + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"),
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "extension": _extension(),
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": _cuda(),
        "operations": {device: backends.chosen(torch.device(device)) for device in found},
        "advice": advice(),
    }


def advice() -> list[str]:
    """What to do to get what is faster on this machine."""
    found = []
    if extension.WHY_NOT is not None:
        found.append(f"For the C++ kernels, which are the fastest on a CPU: {extension.HOW_TO}.")
    if torch.version.cuda and not torch.cuda.is_available():
        found.append("This PyTorch is built for CUDA and finds no GPU that it can use: see its driver.")
    if torch.version.hip or not torch.cuda.is_available():
        return found
    if triton_kernels.WHY_NOT is not None:
        found.append(f"For the layer in one launch, by Triton: {triton_kernels.WHY_NOT}.")
    if extension.WHY_NOT_CUDA is not None:
        found.append(f"For the CUDA kernels, which average and step in one launch: {extension.HOW_TO}.")
    elif (old := devices.old_driver()) is not None:
        found.append(f"For the CUDA kernels, which average and step in one launch: {old}.")
    return found


def report() -> str:
    """All of it in words."""
    of = facts()
    lines = [
        f"{name:12} {of[name]}" for name in ("ewa_kernels", "python", "torch", "triton", "extension", "cpu", "cuda")
    ]
    for device, operations in of["operations"].items():
        lines.append(f"\nOn {device} backend='auto' takes")
        for operation, chosen in operations.items():
            lines.append(f"  {operation:20} {chosen['backend']:10} {chosen['what']}")
            lines += [f"  {'':20} not {name}: {reason}" for name, reason in chosen["why_not"].items()]
    lines.append("\nNothing faster is missing on this machine." if not of["advice"] else "\nTo get what is faster:")
    return "\n".join([*lines, *(f"  {sentence}" for sentence in of["advice"])])


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ewa_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    print(json.dumps(facts(), indent=1) if parser.parse_args().json else report())


if __name__ == "__main__":
    main()
