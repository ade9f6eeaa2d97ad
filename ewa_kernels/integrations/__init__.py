"""Trainer callbacks, and what torch.distributed needs: `fsdp`, `lightning`, `transformers`;
`transformers_experts`: the kernels in models that have experts.

Each module imports its own library, when it is first used: `ewa_kernels.integrations.fsdp` needs no import of its own.
"""

import importlib
from types import ModuleType

_MODULES = ("fsdp", "lightning", "transformers", "transformers_experts")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:  # what hasattr understands
        raise AttributeError(str(error)) from error
