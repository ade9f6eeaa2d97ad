"""The layers: `RandomPartitionMoE`, trained in place of an FFN, and `FFN`, what it becomes after training."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, calls, checks, functional
from .activations import ACTIVATIONS, activate
from .problem import SAVED
from .train import shards

# Living ones, by which a function that is given a parameter alone can tell that it holds experts.
_expert_linears: weakref.WeakSet[ExpertLinear] = weakref.WeakSet()


class ExpertLinear(nn.Module):
    """The parameters of E linear maps, stacked: `weight` `[E, out, in]` and `bias` `[E, out]` or None.

    Layers get them by a call, so that hooks that compute a weight (pruning, weight norm), move it (offloading) or add
    to it (LoRA) run as those of an `nn.Linear` do.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        _expert_linears.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, which is not initialised
        super().__setstate__(state)
        _expert_linears.add(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws each expert afresh, as `nn.Linear` does: uniform in ±1/√in_features."""
        bound = self.weight.shape[-1] ** -0.5
        if shards.is_sharded(self.weight):
            # One expert of it may be a copy, gathered from other processes.
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -bound, bound)
            return
        for e in range(len(self.weight)):
            nn.init.uniform_(self.weight[e], -bound, bound)
            if self.bias is not None:
                nn.init.uniform_(self.bias[e], -bound, bound)

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias. x is not used: it is there for wrappers that hand one on."""
        tensors = self.weight, self.bias
        for name in ("weight", "bias"):
            self.__dict__.pop(name, None)  # which a hook has computed: it is old after the next step
        return tensors

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and name not in self.__dict__.get("_parameters", {}):
            for hook in self._forward_pre_hooks.values():
                hook(self, ())
            if name in self.__dict__:
                return self.__dict__[name]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return (
            f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}, "
            f"bias={self.bias is not None}"
        )


def _check_options(activation: str, gated: bool, dropout: float, **sizes: int) -> None:
    checks.boolean("gated", gated)
    for name, size in sizes.items():
        checks.size(name, size)
    checks.choice("activation", activation, ACTIVATIONS)
    checks.probability("dropout", dropout)


class FFN(nn.Module):
    """y = down(dropout(act(up(x)))), or down(dropout(act(gate) * value)) with gate, value = up(x) if gated.

    What `RandomPartitionMoE.fuse` gives. Arguments are those of `RandomPartitionMoE`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_options(activation, gated, dropout, d_model=d_model, d_ff=d_ff)
        self.activation, self.gated, self.act = activation, gated, ACTIVATIONS[activation]
        self.drop = nn.Dropout(dropout)
        kind = {"device": device, "dtype": dtype}
        self.up = nn.Linear(d_model, 2 * d_ff if gated else d_ff, bias, **kind)
        self.down = nn.Linear(d_ff, d_model, bias, **kind)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # in words that torch.jit.script has
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(hidden)
        return self.down(self.drop(hidden))

    __jit_unused_properties__ = ("dropout",)

    @property
    def dropout(self) -> float:
        """The probability with which an element of hidden is dropped in training."""
        return self.drop.p

    @dropout.setter
    def dropout(self, rate: float) -> None:
        checks.probability("dropout", rate)
        self.drop.p = rate

    def extra_repr(self) -> str:
        return f"activation={self.activation}, gated={self.gated}"


Experts = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def mean_of(experts: Experts) -> Experts:
    """The mean of each; differentiable."""
    means = iter(functional.merge_all([t for t in experts if t is not None]))
    return tuple(None if t is None else next(means) for t in experts)  # type: ignore[return-value]


def forward_mean(x: Tensor, experts: Experts, activation: str, gated: bool) -> Tensor:
    """What the mean of experts computes: up_weight, up_bias, down_weight and down_bias, stacked; no dropout."""
    # Contiguous, even of experts that are stored transposed, so that a folded layer computes with the same bits.
    up, up_bias, down, down_bias = (None if t is None else t.contiguous() for t in mean_of(experts))
    hidden = activate(F.linear(x, up, up_bias), activation, gated)  # type: ignore[arg-type]
    return F.linear(hidden, down, down_bias)  # type: ignore[arg-type]


def _tensors_of(linear: Any) -> tuple[Tensor, Tensor | None]:
    """What calling it gives, without the call, which costs as much as all checks, where nobody would notice."""
    weight = linear._parameters.get("weight")
    if (
        weight is None
        or type(linear) is not ExpertLinear
        or linear._forward_pre_hooks
        or linear._forward_hooks
        or "forward" in linear.__dict__
    ):
        return linear(None)
    return weight, linear._parameters["bias"]


class StackedExperts(nn.Module):
    """The parameters and options of E FFNs, stacked. Arguments and attributes: see `RandomPartitionMoE`."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        saved: str = "full",
        recompute: bool = False,
    ):
        super().__init__()
        _check_options(activation, gated, dropout, d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        checks.choice("backend", backend, backends.BACKENDS)
        checks.choice("saved", saved := checks.saved(saved, recompute), SAVED)
        self.activation, self.gated = activation, gated
        self.backend, self.saved = backend, saved
        self.seed_offset = 0
        num_up = 2 * d_ff if gated else d_ff
        self.up = ExpertLinear(num_experts, d_model, num_up, bias, device, dtype)
        self.down = ExpertLinear(num_experts, d_ff, d_model, bias, device, dtype)
        if dropout > 0:
            self.drop = nn.Dropout(dropout)  # its rate alone is used, which loops over all nn.Dropout of a model set

    @property
    def dropout(self) -> float:
        """The probability with which an element of hidden is dropped in training."""
        return getattr(self._modules.get("drop"), "p", 0.0)  # somebody may have taken it out

    @dropout.setter
    def dropout(self, rate: float) -> None:
        checks.probability("dropout", rate)
        self.drop = nn.Dropout(rate)

    @property
    def recompute(self) -> bool:
        """Whether x alone is kept for backward, as it is."""
        return self.saved == "recompute"

    @recompute.setter
    def recompute(self, value: bool) -> None:
        checks.boolean("recompute", value)
        if value != self.recompute:
            self.saved = "recompute" if value else "full"

    def __setstate__(self, state: dict[str, Any]) -> None:  # perhaps pickled when there was no `saved`
        state = dict(state)
        recompute = state.pop("recompute", False)
        super().__setstate__({"saved": "recompute" if recompute else "full", **state})

    @property
    def num_experts(self) -> int:
        return self.down.weight.shape[0]

    @property
    def d_model(self) -> int:
        return self.down.weight.shape[1]

    @property
    def d_ff(self) -> int:
        return self.down.weight.shape[2]

    def reset_parameters(self) -> None:
        """Draws all experts afresh."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    @property
    def experts(self) -> Experts:
        """up_weight, up_bias, down_weight and down_bias, as the functions of `ewa_kernels.functional` take them."""
        return *_tensors_of(self._modules["up"]), *_tensors_of(self._modules["down"])

    def draw_seed(self, x: Tensor) -> int | Tensor:
        seed = functional.draw_seed(x)
        return seed if self.seed_offset == 0 else seed ^ self.seed_offset

    def forward_mean(self, x: Tensor) -> Tensor:
        """What the experts' mean computes, without dropout."""
        return forward_mean(x, self.experts, self.activation, self.gated)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The dense FFN with the experts' mean, in the same mode, dtype and device; shares no memory.

        Of a layer with a router it is another function than the layer's.
        """
        ffn = FFN(
            self.d_model,
            self.d_ff,
            activation=self.activation,
            gated=self.gated,
            dropout=self.dropout,
            device="meta",
        )
        up, up_bias, down, down_bias = mean_of(self.experts)
        for dense, experts, weight, bias in ((ffn.up, self.up, up, up_bias), (ffn.down, self.down, down, down_bias)):
            dense.weight = nn.Parameter(weight, requires_grad=experts.weight.requires_grad)
            if bias is None or experts.bias is None:
                dense.register_parameter("bias", None)
            else:
                dense.bias = nn.Parameter(bias, requires_grad=experts.bias.requires_grad)
        return ffn.train(self.training)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script calls it, and would put into the model what it gives: the experts would be lost."""
        raise TypeError(f"torch.jit.script takes no {type(self).__name__}: call ewa_kernels.fold_(model) before")

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_ff={self.d_ff}, num_experts={self.num_experts}, "
            f"activation={self.activation}, gated={self.gated}, dropout={self.dropout}, "
            f"backend={self.backend}, saved={self.saved}"
        )


class RandomPartitionMoE(StackedExperts):
    """E FFNs among which the tokens are dealt at random, in place of one FFN, at the same cost.

    Training: every call deals the tokens of the whole input anew, in groups that differ by one token at most;
    the seed of the deal comes from torch's default generator of x's device, so `torch.manual_seed`, activation
    checkpointing and `torch.compile` reproduce it. Eval: the averaged experts, no randomness, with the gradient
    going to all of them. The average is computed at each call and so is never stale; `fuse` the layer, or fold
    the model, for speed.

    Args:
        d_model: D.
        d_ff: F, size of hidden.
        num_experts: E.
        activation: gelu (erf), gelu_tanh, quick_gelu, relu, relu2, silu or identity.
        gated: hidden = act(pre[:F]) * pre[F:], with 2F rows in `up`, gate first.
        bias: whether both projections have one.
        dropout: probability in [0, 1] with which an element of hidden is dropped in training.
        device, dtype: of the parameters.
        backend, saved, recompute: see `ewa_kernels.functional.moe_ffn`.

    Attributes:
        up.weight, up.bias: `[E, F, D]`, `[E, F]` (2F if gated). Each expert starts as `nn.Linear` does.
        down.weight, down.bias: `[E, D, F]`, `[E, D]`.
        seed_offset: int in 0…2⁶³−1, which changes every seed that is drawn; see
            `ewa_kernels.integrations.fsdp.fold_rank_into_seed_`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range.

    Source: section 3 of arXiv 2308.06093.
    """

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """`[..., D]` → `[..., D]`.

        Args:
            x: of the dtype and device of the parameters; jagged nested tensors too.
            seed: of the deal, in training: int in 0…2⁶³−1 or int64 tensor with one element. None draws it.

        Raises:
            TypeError, ValueError: x or seed is not what `ewa_kernels.functional.moe_ffn` needs.
        """
        if type(x) not in calls.PLAIN and (y := calls.of_another_kind(self, x, seed=seed)) is not NotImplemented:
            return y
        if not self.training:
            calls.check_ffn(x, self.experts, self.activation, self.gated, self.dropout)
            if seed is not None:
                checks.seed_tensor(seed, x.device)
            return self.forward_mean(x)
        if seed is None:
            seed = self.draw_seed(x)
        return functional.moe_ffn(
            x,
            *self.experts,
            seed=seed,
            activation=self.activation,
            gated=self.gated,
            dropout_p=self.dropout,
            backend=self.backend,
            saved=self.saved,
        )

    def fuse(self) -> nn.Module:
        """The dense FFN with the experts' mean, in the same mode, dtype and device; shares no memory.

        Raises:
            TypeError: in a subclass with a forward of its own, which must say itself what it becomes.
        """
        if type(self).forward is not RandomPartitionMoE.forward:
            raise TypeError(f"{type(self).__name__} must override fuse, because it overrides forward")
        return super().fuse()


def holds_experts(parameter: Tensor) -> bool:
    """Whether it is, at this moment, a stacked tensor of a layer of this process."""
    return any(parameter is p for linear in list(_expert_linears) for p in linear._parameters.values())


def expert_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, Parameter `[E, ...]`) of every stacked tensor of the layers of this package in a model, each once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            for path, parameter in module.named_parameters(prefix=prefix):
                if parameter not in seen:
                    seen.add(parameter)
                    yield path, parameter
