"""torchvision, also beside a torch that its binary was not made for: its models are Python alone.

Such a torchvision lacks its operators in C++, and fails at the import because it wants to describe two of them. timm
and transformers import it too, so this comes first: see conftest.py.
"""

import torch

FITS = True  # to this torch
try:
    import torchvision
except RuntimeError:
    FITS = False
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
except ImportError:  # `make gpu` runs with the packages that are there
    torchvision = None

__all__ = ["FITS", "torchvision"]
