"""bfloat16 copies of parameters, which the optimizer writes in its own pass and autocast needs: who may use them when.

A copy counts as long as its parameter is where it was and unchanged since, by autograd's count of changes, and the
optimizer that writes it is alive. What is done behind autograd's back is not seen: `parameter.data.copy_(…)`, and steps
of torch's own fused optimizers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import graphs


@dataclass(frozen=True)
class _Copy:
    parameter: weakref.ref[Tensor]
    owner: weakref.ref[object]
    version: int
    values: Tensor


# By the address of the parameter: what operations get to see may be another object than the parameter itself.
_copies: dict[tuple[torch.device, int], _Copy] = {}


def register(parameter: Tensor, values: Tensor, owner: object) -> None:
    """From now on, until it changes or its optimizer is gone, `values` are the parameter's, in another dtype."""
    key = (parameter.device, parameter.data_ptr())

    def forget(dead: weakref.ref[Any]) -> None:
        if key in _copies and dead in (_copies[key].parameter, _copies[key].owner):
            del _copies[key]

    _copies[key] = _Copy(weakref.ref(parameter, forget), weakref.ref(owner, forget), parameter._version, values)


def find(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy of a parameter, or of another view of all of it, in a dtype; None if there is none that is fresh."""
    copy = _copies.get((tensor.device, tensor.data_ptr()))
    if copy is None or copy.values.dtype != dtype or tensor.is_inference():
        return None
    parameter = copy.parameter()
    if parameter is None or (parameter.data_ptr(), parameter._version) != (tensor.data_ptr(), copy.version):
        return None
    same = tensor._version == copy.version and tensor.dtype == parameter.dtype and tensor.shape == copy.values.shape
    return copy.values if same and tensor.stride() == parameter.stride() else None


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without work if there is a copy. A CUDA graph casts in each replay: it could not tell when a
    copy is stale, or freed."""
    if tensor.dtype == dtype:
        return tensor
    copy = None if graphs.is_capturing(tensor.device) else find(tensor, dtype)
    return tensor.to(dtype) if copy is None else copy
