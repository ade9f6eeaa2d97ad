"""Any model: find its FFNs, replace them by random-partition experts, fold them back."""

from ewa_kernels.surgery.adapters import register_ffn_adapter
from ewa_kernels.surgery.fold import fold_, folded_state_dict
from ewa_kernels.surgery.replace import ReplacementReport, replace_ffn_
from ewa_kernels.surgery.sites import FFNSite, find_ffns
from ewa_kernels.surgery.unfolded import load_unfolded_, save_unfolded

__all__ = [
    "FFNSite",
    "ReplacementReport",
    "find_ffns",
    "fold_",
    "folded_state_dict",
    "load_unfolded_",
    "register_ffn_adapter",
    "replace_ffn_",
    "save_unfolded",
]
