"""What a result was measured on: without it a number says nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import ewa_kernels

ROOT = Path(__file__).parent.parent
VERSIONS_OF = ("torch", "triton", "numpy", "timm")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version"


def environment(device: str = "cpu") -> dict[str, str | int | dict[str, str]]:
    """Commit, device, clocks, versions and day."""
    cuda = device == "cuda"
    return {
        # The variable is for a copy without its history.
        "commit": os.environ.get("EWA_COMMIT")
        or _run("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
        or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "kind": device,
        "clocks": _gpu_clocks() if cuda else _cpu_clocks(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "python": platform.python_version(),
            "ewa_kernels": ewa_kernels.__version__,
            **{name: version for name in VERSIONS_OF if (version := _version(name)) is not None},
            **({"cuda": str(torch.version.cuda)} if cuda else {}),
        },
    }


def file_name(device_name: object) -> str:
    """A device's name as a file is called."""
    return re.sub(r"\W+", "-", str(device_name)).strip("-").lower()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    """What a command prints; empty if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _gpu_clocks() -> dict[str, str]:
    values = _run("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0")
    return dict(zip(CLOCKS.split(","), (v.strip() for v in values.split(",")), strict=False))


def _cpu_clocks() -> dict[str, str]:
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), flags=re.M)
    return {"MHz": ", ".join(sorted({str(round(float(mhz))) for mhz in found}))} if found else {}


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), flags=re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
