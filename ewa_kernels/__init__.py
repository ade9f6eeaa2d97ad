"""Experts Weights Averaging for PyTorch: train FFNs as random-partition experts, average them, fold them back.

Source: "Experts Weights Averaging: A New General Training Scheme for Vision Transformers", arXiv 2308.06093.
"""

from ewa_kernels import functional, integrations, optim, reference
from ewa_kernels.backends import BackendError, set_sm_margin
from ewa_kernels.models.checkpoints import load_unfolded_, save_unfolded
from ewa_kernels.models.experts import find_experts
from ewa_kernels.models.experts_adapters import register_experts_adapter
from ewa_kernels.models.ffn_adapters import register_ffn_adapter
from ewa_kernels.models.ffns import find_ffns
from ewa_kernels.models.replace import fold_, folded_state_dict, replace_ffn_
from ewa_kernels.models.replace_experts import fold_moe_, replace_moe_, restore_moe_
from ewa_kernels.modules import FFN, RandomPartitionMoE, expert_tensors
from ewa_kernels.routed import RoutedMoE
from ewa_kernels.train.averager import ExpertAverager
from ewa_kernels.train.share_rate import ConstantShareRate, CosineShareRate, LinearShareRate, share_rate_for
from ewa_kernels.train.weight_decay import weight_decay_groups
from ewa_kernels.version import VERSION

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
