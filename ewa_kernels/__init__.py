"""Experts Weights Averaging for PyTorch: train FFNs as random-partition experts, average them, fold them back.

Source: "Experts Weights Averaging: A New General Training Scheme for Vision Transformers", arXiv 2308.06093.
"""

from . import functional, integrations, optim, reference
from .backends import BackendError, set_sm_margin
from .models.checkpoints import load_unfolded_, save_unfolded
from .models.experts import find_experts
from .models.experts_adapters import register_experts_adapter
from .models.ffn_adapters import register_ffn_adapter
from .models.ffns import find_ffns
from .models.replace import fold_, folded_state_dict, replace_ffn_
from .models.replace_experts import fold_moe_, replace_moe_, restore_moe_
from .modules import FFN, RandomPartitionMoE, expert_tensors
from .routed import RoutedMoE
from .train.averager import ExpertAverager
from .train.share_rate import ConstantShareRate, CosineShareRate, LinearShareRate, share_rate_for
from .train.weight_decay import weight_decay_groups
from .version import VERSION

__version__ = VERSION

__all__ = [
    "FFN",
    "BackendError",
    "ConstantShareRate",
    "CosineShareRate",
    "ExpertAverager",
    "LinearShareRate",
    "RandomPartitionMoE",
    "RoutedMoE",
    "__version__",
    "expert_tensors",
    "find_experts",
    "find_ffns",
    "fold_",
    "fold_moe_",
    "folded_state_dict",
    "functional",
    "integrations",
    "load_unfolded_",
    "optim",
    "reference",
    "register_experts_adapter",
    "register_ffn_adapter",
    "replace_ffn_",
    "replace_moe_",
    "restore_moe_",
    "save_unfolded",
    "set_sm_margin",
    "share_rate_for",
    "weight_decay_groups",
]
