"""The C++ and CUDA extension, `_C`, if it was built: see `setup.py` and `csrc/`."""

from __future__ import annotations

import importlib
from typing import Any

# After torch: the module uses the OpenMP runtime that torch has loaded, and so the same threads.
import torch  # noqa: F401

# How to get what is missing, in every message that says that it is.
HOW_TO = (
    "install it again, by `pip install --force-reinstall --no-deps .`, with a C++ compiler at hand, and nvcc for GPUs"
)

try:
    # Not by `from .. import _C`, whose error speaks of circular imports when there is no such file.
    _C: Any = importlib.import_module(f"{__package__.rpartition('.')[0]}._C")

    WHY_NOT: str | None = None
    CUDA_ARCHITECTURES, HAS_HOPPER = _C.cuda, _C.hopper
except ImportError as error:
    WHY_NOT = f"the C++ extension is not built ({error}): {HOW_TO}"
    CUDA_ARCHITECTURES, HAS_HOPPER = None, False

WHY_NOT_CUDA = WHY_NOT
if WHY_NOT is None and CUDA_ARCHITECTURES is None:
    WHY_NOT_CUDA = f"the extension is built without CUDA: {HOW_TO}"
