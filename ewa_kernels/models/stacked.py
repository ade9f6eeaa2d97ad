"""Experts in stacked parameters: as transformers 5 has them, through its experts interface, and in place of lists.

A module of transformers 5 has `gate_up_proj` `[E, 2F, D]` (or `up_proj` `[E, F, D]`), `down_proj` `[E, D, F]`, both
perhaps transposed or with a bias, flags that say so, and is called with tokens `[T, D]`, choices `[T, k]` and routing
weights `[T, k]`.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..modules import FFN, Experts, StackedExperts, forward_mean
from ..train import shards
from .carries import DenseProjection
from .layout import FFNLayout, copy_with_parameters, rate_in

_FLAGS = {"has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel"}

# Names of classes and functions of torch and transformers; an attribute of nn.GELU says which of two it is.
_ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation", "silu"), "silu"),
    **dict.fromkeys(("GELU", "GELUActivation", "gelu"), "gelu"),
    **dict.fromkeys(("GELUTanh", "NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("ReLU", "relu"), "relu"),
    **dict.fromkeys(("Identity", "LinearActivation"), "identity"),
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
}

TENSORS = ("up.weight", "up.bias", "down.weight", "down.bias")

IMPLEMENTATIONS = {"routed": "ewa", "random_partition": "ewa_random_partition"}

_warned: set[str] = set()  # names of classes


class Formula(NamedTuple):
    """y = down(act(up(x))), or down(act(gate) * value) if gated. With a reason, it is neither."""

    up: str
    gated: bool
    transposed: bool
    activation: str
    reason: str | None

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.up, f"{self.up}_bias", "down_proj", "down_proj_bias"

    def turned(self, tensor: Any) -> Tensor:
        return tensor.transpose(1, 2) if self.transposed and tensor.ndim == 3 else tensor

    def experts(self, module: Any) -> Experts:
        """up_weight, up_bias, down_weight and down_bias, as the functions of `ewa_kernels.functional` take them."""
        up, up_bias, down, down_bias = (getattr(module, name, None) for name in self.names)
        return self.turned(up), up_bias, self.turned(down), down_bias


def is_stacked(module: nn.Module) -> bool:
    """Whether it is a module as above."""
    return vars(module).keys() >= _FLAGS and hasattr(type(module).forward, "__wrapped__")


def formula_of(module: Any) -> Formula:
    """What the module computes, by its flags and the name of its activation."""
    up, act = "gate_up_proj" if module.has_gate else "up_proj", getattr(module, "act_fn", None)
    kind: Any = act if hasattr(act, "__name__") else type(act)
    activation = _ACTIVATIONS.get(kind.__name__, "")
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        activation = "gelu_tanh"
    # By its class: torch.compile of PyTorch 2.11 has no name of a bound method.
    has_default_gate = "_apply_gate" not in vars(module) and type(module)._apply_gate.__name__ == "_default_apply_gate"
    reason = None
    if module.has_post_expert_norm:
        reason = "has a norm after each expert"
    elif module.has_gate and not (module.is_concatenated and has_default_gate):
        reason = "does not compute act(gate) * value of two halves, but has an _apply_gate of its own"
    elif activation == "" or kind.__module__.split(".")[0] not in ("torch", "transformers"):
        reason = f"has an activation that the kernels do not know: {kind.__name__}"
    for name in (up, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or weight.element_size() < 2:
            reason = f"has no {name} of three dimensions in 16 bits or more"
    return Formula(up, bool(module.has_gate), bool(module.is_transposed), activation, reason)


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The loop over experts that the module's class was written with."""
    forward: Any = type(module).forward
    return forward.__wrapped__(module, *args, **kwargs)


def routed_forward(module: Any, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
    """y[t] = Σ_j routing_weights[t, j] · FFN_e(x[t]) with e = choices[t, j]: `[T, D]` → `[T, D]`, of x's dtype.

    What the kernels cannot express goes through the module's own loop, with one warning for its class.
    """
    formula, name = formula_of(module), type(module).__name__
    if formula.reason is not None and not torch.compiler.is_compiling() and name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} runs its own loop, not the kernels: it {formula.reason}", stacklevel=3)
    if module._is_expert_parallel or formula.reason is not None:
        return original_forward(module, x, choices, routing_weights)
    experts, options = formula.experts(module), _options(module, formula)
    permutation, expert_offsets = functional.partition_by_expert(choices, len(experts[0]))
    options |= {"permutation": permutation, "expert_offsets": expert_offsets, "routing_weights": routing_weights}
    return functional.grouped_ffn(x, *experts, **options).to(x.dtype)


def random_partition_forward(module: Any, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
    """Training: the tokens are dealt among the experts at random; eval: the mean expert. `[T, D]` → `[T, D]`.

    The router's decision is not used.

    Raises:
        NotImplementedError: the experts are sharded over processes, or compute what the kernels cannot express.
    """
    formula = formula_of(module)
    reason = "has a part of the experts only" if module._is_expert_parallel else formula.reason
    if reason is not None:
        raise NotImplementedError(f"{type(module).__name__} {reason}")
    experts = formula.experts(module)
    if not module.training:
        return forward_mean(x, experts, formula.activation, formula.gated).to(x.dtype)
    seed = functional.draw_seed(x)
    return functional.moe_ffn(x, *experts, seed=seed, **_options(module, formula)).to(x.dtype)


def _options(module: Any, formula: Formula) -> dict[str, Any]:
    how = module._ewa_switched.how if hasattr(module, "_ewa_switched") else {}
    return {"activation": formula.activation, "gated": formula.gated, **how}


def register_implementations() -> None:
    """Raises ImportError without transformers 5."""
    interface = importlib.import_module("transformers.integrations.moe").ExpertsInterface
    interface.register("ewa", routed_forward)
    interface.register("ewa_random_partition", random_partition_forward)


class Switched:
    """As an attribute of one module of experts: its own config, in place of which it has a copy with our setting."""

    def __init__(self, config: Any, how: Mapping[str, str]):
        """`how`: the options backend and saved of the functions."""
        self.config, self.how = config, how

    def __setstate__(self, state: dict[str, Any]) -> None:  # perhaps in another process
        register_implementations()
        backend = {"backend": state.pop("backend")} if "backend" in state else {}  # pickled before there was `how`
        vars(self).update({"how": backend, **state})


def switch_(module: Any, to: str, how: Mapping[str, str]) -> None:
    """Gives one module of experts an implementation of ours: "routed" or "random_partition"."""
    restore_(module)
    module._ewa_switched = Switched(module.config, how)
    module.config = copy.copy(module.config)
    module.config._experts_implementation = {"": IMPLEMENTATIONS[to]}  # and no config inside of it


def restore_(module: Any) -> None:
    if (switched := vars(module).pop("_ewa_switched", None)) is not None:
        module.config = switched.config


def is_dealt(module: nn.Module) -> bool:
    """Whether they are in random partition, by `switch_` or by the setting of the whole model."""
    setting = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return is_stacked(module) and setting == IMPLEMENTATIONS["random_partition"]


class Origin:
    """What experts were in, without memory: under which names they are saved, and how they lie there."""

    def __init__(self, module: nn.Module, layout: FFNLayout | Formula):
        empty = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
        self.module, self.layout = copy_with_parameters(module, empty), layout
        self.names = list(empty)

    def spread(self, experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of stacked tensors: views of them, where rows need not change their order."""
        if isinstance(self.layout, Formula):
            pairs = zip(self.layout.names, TENSORS, strict=True)
            return {own: self.layout.turned(experts[name]) for own, name in pairs if name in experts}
        own = {}
        for e, member in enumerate(self.module._modules):
            of_one = self.layout.unstack({name: tensor[e] for name, tensor in experts.items()})
            own.update({f"{member}.{name}": tensor for name, tensor in of_one.items()})
        return {name: own[name] for name in self.names}

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(self.layout, Formula):
            pairs = zip(self.layout.names, TENSORS, strict=True)
            return {name: self.layout.turned(own[theirs]) for theirs, name in pairs if theirs in own}
        names = [name for name, _ in next(self.module.children()).named_parameters()]
        members = [{name: own[f"{member}.{name}"] for name in names} for member in self.module._modules]
        experts = [self.layout.stack(tensors) for tensors in members]
        return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}


def _adopt_(module: ExpertStack | MeanExpert, origin: Origin, tensors: Mapping[str, nn.Parameter]) -> None:
    """Gives it these parameters, and the names and shapes that experts had in its `state_dict`, which takes both."""
    module._origin = origin
    for name in TENSORS:
        linear, which = name.split(".")
        module.get_submodule(linear).register_parameter(which, tensors.get(name))
    # torch.distributed.checkpoint follows each key from attribute to attribute.
    theirs = DenseProjection(None, type(module).__name__, dict(origin.module.named_parameters()))
    for name in {path.partition(".")[0] for path in origin.names}:
        if not hasattr(module, name):
            vars(module)[name] = getattr(theirs, name)
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)


def _save(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    ours = {name: state_dict[prefix + name] for name in TENSORS if prefix + name in state_dict}
    if {"up.weight", "down.weight"} <= ours.keys() and not any(map(shards.is_sharded, ours.values())):
        for name in ours:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: tensor for name, tensor in module.spread(ours).items()})


def _load(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    own = {name: state_dict.pop(prefix + name) for name in module._origin.names if prefix + name in state_dict}
    # Ours count if they are there, but torch.distributed.checkpoint adds what the module has already.
    has = {prefix + name: parameter for name, parameter in module.named_parameters()}
    if not own or any(state_dict.get(key, parameter) is not parameter for key, parameter in has.items()):
        return
    missing = [prefix + name for name in module._origin.names if name not in own]
    if missing:
        args[-1].append(f"state_dict must have all experts of {prefix.rstrip('.')}, lacks {', '.join(missing)}")
    else:
        state_dict.update({prefix + name: tensor for name, tensor in module.gather(own).items()})


class ExpertStack(StackedExperts):
    """The experts of a block, stacked, in place of its list of them.

    Its state dict has the list's names, `0.w1.weight` and so on (its own while it is sharded), and it loads both.

    Attributes:
        routed: whether the router's choices count, or the tokens are dealt at random; may be changed at any time.
        output_dropout: probability with which an element of what an expert gives is dropped in training.
        up.weight, up.bias, down.weight, down.bias: see `RandomPartitionMoE`.
    """

    _origin: Origin

    def __init__(self, origin: Origin, experts: Mapping[str, nn.Parameter], *, routed: bool, how: Mapping[str, str]):
        """`experts`: up.weight, up.bias, down.weight, down.bias, stacked; absent where there are none."""
        layout, (num_experts, d_model, d_ff) = origin.layout, experts["down.weight"].shape
        assert isinstance(layout, FFNLayout)
        member = next(origin.module.children())
        options: dict[str, Any] = {"activation": layout.activation, "gated": layout.gated}
        options |= {"dropout": rate_in(member, layout.dropout), **how}
        super().__init__(d_model, d_ff, num_experts, **options, device="meta")
        self.routed = routed
        if (rate := rate_in(member, layout.output_dropout)) > 0:
            self.output_drop = nn.Dropout(rate)  # which loops over all nn.Dropout of a model set
        _adopt_(self, origin, experts)
        self.train(origin.module.training)

    @property
    def output_dropout(self) -> float:
        return getattr(self._modules.get("output_drop"), "p", 0.0)

    def forward(self, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
        """`[T, D]` → `[T, D]`. choices and routing_weights, `[T, k]`, count only if `routed`."""
        if not (self.routed or self.training):
            return self.forward_mean(x)
        options: dict[str, Any] = {"activation": self.activation, "gated": self.gated}
        options |= {"backend": self.backend, "saved": self.saved}
        options["dropout_p"] = self.dropout if self.training else 0.0
        if not self.routed:
            y = functional.moe_ffn(x, *self.experts, seed=self.draw_seed(x), **options)
            return F.dropout(y, self.output_dropout, self.training)
        options["seed"] = self.draw_seed(x) if options["dropout_p"] > 0 else 0
        permutation, expert_offsets = functional.partition_by_expert(choices, self.num_experts)
        options |= {"permutation": permutation, "expert_offsets": expert_offsets}
        if not (self.output_dropout and self.training):
            return functional.grouped_ffn(x, *self.experts, routing_weights=routing_weights, **options)
        # Each choice's output has a dropout of its own.
        top_k = choices.shape[1]
        y = functional.grouped_ffn(x.repeat_interleave(top_k, dim=0), *self.experts, **options)
        y = F.dropout(y, self.output_dropout).reshape(-1, top_k, self.d_model)
        return (y * routing_weights.unsqueeze(-1)).sum(dim=1)

    def spread(self, experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._origin.spread(experts)

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._origin.gather(own)

    @torch.enable_grad()
    def restored(self) -> nn.Module:
        """A list like the one that was replaced, with these parameters; shares no memory."""
        own = self.spread(dict(self.named_parameters()))
        members = copy_with_parameters(self._origin.module, {name: t.detach().clone() for name, t in own.items()})
        for name, parameter in members.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)
        return members.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, routed={self.routed}, output_dropout={self.output_dropout}"


class MeanExpert(FFN):
    """The one expert that is left after `fold_moe_`. It is called as the experts were, whatever the router says.

    Its state dict has the experts' names and shapes, each of them the mean, so that the library's own model loads it;
    what it loads under these names becomes their mean.
    """

    _origin: Origin

    def __init__(self, origin: Origin, experts: Mapping[str, Tensor], options: Any):
        """`experts` stacked, by name; `options` has activation, gated and perhaps dropouts."""
        num_experts, d_model, d_ff = experts["down.weight"].shape
        super().__init__(d_model, d_ff, activation=options.activation, gated=options.gated, device="meta")
        self.num_experts = num_experts
        self.dropout = getattr(options, "dropout", 0.0)
        self.output_drop = nn.Dropout(getattr(options, "output_dropout", 0.0))
        means = {name: functional.merge_experts(tensor.detach()).contiguous() for name, tensor in experts.items()}
        _adopt_(self, origin, {name: nn.Parameter(t, experts[name].requires_grad) for name, t in means.items()})

    def forward(self, x: Tensor, choices: Tensor | None = None, routing_weights: Tensor | None = None) -> Tensor:
        return self.output_drop(super().forward(x)).to(x.dtype)

    def spread(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = self._origin.spread({name: t.expand(self.num_experts, *t.shape) for name, t in mean.items()})
        # No two share memory, which safetensors refuse.
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in own.items()}

    def gather(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: functional.merge_experts(t) for name, t in self._origin.gather(own).items()}
