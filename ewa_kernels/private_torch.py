"""Every private name of torch that this package uses, once: what it answers, and why the public ones cannot.

Each is looked up where it is called, so that a version of torch without it fails there alone, by its name.
`tests/test_private_torch.py` holds each to its meaning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch._functorch import config as functorch_config

# --- who stands between eager code and a kernel ---


def _keys(*names: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


# Of tensors whose values are where they say, and are what memory holds: of those made in inference mode too.
_PLAIN_KEYS = {
    keys.raw_repr()
    for device in ("CPU", "CUDA")
    for keys in (
        _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"),
        _keys(device, f"Autocast{device}"),
    )
}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
# Of a thread in which nothing is on; inference mode leaves one out.
_PLAIN_THREADS = {_keys("BackendSelect", "ADInplaceOrView").raw_repr(), _keys("BackendSelect").raw_repr()}


def is_watched(tensors: Iterable[Tensor | None] = (), *, profiler: bool = True) -> bool:
    """Whether somebody must see the operation itself, and not only what it computes.

    Those are: a compiler, `torch.jit.trace`, an exporter, function and dispatch modes (fake tensors, FlopCounterMode,
    selective checkpointing), transforms of torch.func, autograd's own vmap, forward-mode AD, a profiler unless
    `profiler` is False; and tensors that are no plain ones: subclasses, those of meta or of other devices than CPU and
    CUDA, views that are yet to be negated.
    """
    core = torch._C
    if (
        torch.compiler.is_compiling()
        or core._len_torch_dispatch_stack() > 0
        or core._is_torch_function_mode_enabled()
        or is_jit_traced()
        or core._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (profiler and core._autograd._profiler_enabled())
        or core._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_THREADS
    ):
        return True
    keys_of = core._dispatch_keys
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or keys_of(tensor).raw_repr() not in _PLAIN_KEYS):
            return True
    return False


def is_jit_traced() -> bool:
    """Whether torch.jit.trace records what is called now."""
    return torch._C._get_tracing_state() is not None


def tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """Whose `check(*tensors)` tells whether tensors still have the type, dispatch keys, dtype, device, sizes and
    strides that these have; None in a version of torch without them. They guard what torch.compile has made.
    """
    guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    return None if guards is None else guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def has_values(tensor: Tensor) -> bool:
    """Whether its values are at hand: neither on another device nor yet to come."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.func.vmap maps over it."""
    return torch._C._functorch.is_batchedtensor(tensor)


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, at any level, takes the gradient with respect to it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


# --- autograd ---


def apply_straight(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for plain tensors: it looks for what torch.func has left, and at defaults of `forward`."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def is_in_backward() -> bool:
    """Whether this thread computes gradients now, as when activations are checkpointed."""
    return torch._C._current_graph_task_id() != -1


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether something runs as soon as its gradient is there, as an optimizer's step may, torch's own too."""
    return hasattr(parameter, "_in_backward_optimizers") or bool(parameter._post_accumulate_grad_hooks)


def below_autograd() -> Any:
    """A context in which operations are not recorded: for an implementation of the Autograd key."""
    return torch._C._AutoDispatchBelowAutograd()


# --- what the compiler traces ---


def is_traced() -> bool:
    """Whether make_fx, as the compiler uses it, records operations now."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def activation_memory_budget() -> float:
    """Of the region that is traced, else the compiler's. With 0 it computes again whatever it can."""
    region = fx_traceback.current_meta.get("custom", {}).get("_region_activation_memory_budget")
    return functorch_config.activation_memory_budget if region is None else region


def traced_meta() -> dict[str, Any]:
    """What nodes that are recorded from now on are marked with."""
    return fx_traceback.current_meta


# --- GPUs ---


def multiprocessor_carveout() -> int:
    """How many multiprocessors torch's own kernels leave free, by its experimental switch."""
    return torch._C._get_sm_carveout_experimental() or 0


def parameters_being_reduced() -> list[tuple[Tensor, int]] | None:
    """Within what `FSDPModule.set_custom_reduce_scatter` was given: the parameters whose gradients are in the input, in
    its order, and of each how many elements a rank's shard has. They are local names of FSDP2's function, which hands
    on one tensor. None elsewhere, or without these names.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "foreach_reduce":
        frame = frame.f_back
    if frame is None or not {"fsdp_params", "padded_unsharded_sizes", "world_size"} <= frame.f_locals.keys():
        return None
    names = frame.f_locals
    where = [parameter._module_info for parameter in names["fsdp_params"]]
    parameters = [getattr(info.module, info.param_name) for info in where]
    sizes = [size.numel() // names["world_size"] for size in names["padded_unsharded_sizes"]]
    return list(zip(parameters, sizes, strict=True))
