"""Who stands between eager code and the kernels, and wants to see operations: where nobody does, none is dispatched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def watch(inputs: Iterable[Any]) -> bool:
    """Whether one is there: a compiler or export, `torch.jit.trace`, a dispatch mode (fake tensors, FlopCounterMode,
    selective checkpointing), a transform of torch.func, or a subclass of Tensor among the inputs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(isinstance(t, Tensor) and type(t) not in _PLAIN for t in inputs)
    )
