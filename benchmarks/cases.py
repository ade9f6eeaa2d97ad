"""What is measured: FFNs of real models, at training sizes on a GPU and at a few images on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """An FFN of `num_experts` experts.

    Attributes:
        top_k: None: tokens are dealt at random in equal groups. Else each token goes to so many chosen experts.
        compiled: whether peers by torch.compile take part; compiling takes long on a CPU.
    """

    name: str
    num_tokens: int
    d_model: int
    d_ff: int
    num_experts: int = 4
    top_k: int | None = None
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def dtype_name(self) -> str:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype_name}"

    @property
    def sizes(self) -> str:
        gated = " gated" if self.gated else ""
        routed = "" if self.top_k is None else f" k={self.top_k}"
        return f"T={self.num_tokens} D={self.d_model} F={self.d_ff} E={self.num_experts}{routed}{gated}"

    @property
    def num_up(self) -> int:
        """Columns of the up projection."""
        return 2 * self.d_ff if self.gated else self.d_ff

    @property
    def num_rows(self) -> int:
        """Rows that experts compute: T, or T·k."""
        return self.num_tokens * (self.top_k or 1)

    def operations(self, phase: str) -> float:
        """FLOP of the matrix products."""
        forward = 2.0 * self.num_rows * self.d_model * (self.num_up + self.d_ff)
        return forward * {"forward": 1, "backward": 2, "both": 3}[phase]

    def least_bytes(self, phase: str) -> float:
        """Each input read once, each output written once.

        Forward: x, weights; y, pre_activation. Backward: grad_y, x, pre_activation, weights; grad_x and the weights'
        gradients.
        """
        weights = self.num_experts * self.d_model * (self.num_up + self.d_ff)
        tokens, pre = self.num_tokens * self.d_model, self.num_rows * self.num_up
        size = torch.finfo(self.dtype).bits // 8
        forward, backward = size * (2 * tokens + pre + weights), size * (3 * tokens + pre + 2 * weights)
        return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


GPU_CASES = (
    Case("ViT-S", 256 * 197, 384, 1536),
    Case("ViT-B", 256 * 197, 768, 3072),
    Case("ViT-L", 256 * 197, 1024, 4096),
    Case("Swin stage 1", 256 * 56 * 56, 96, 384),
    Case("DINOv2-g", 64 * 257, 1536, 4096, activation="silu", gated=True),
    Case("Point-MAE", 128 * 65, 384, 1536),
    Case("routed, 8 experts, top 2", 32_768, 1024, 2048, 8, top_k=2, activation="silu", gated=True, bias=False),
    # Without biases, which several peers lack.
    Case("DINOv2-g, no bias", 64 * 257, 1536, 4096, activation="silu", gated=True, bias=False),
    Case("ViT-B, no bias", 256 * 197, 768, 3072, activation="gelu_tanh", bias=False),
)

CPU_CASES = (
    Case("ViT-S", 16 * 197, 384, 1536, compiled=True),
    Case("ViT-B", 4 * 197, 768, 3072),
    Case("Swin stage 1", 4 * 56 * 56, 96, 384),
    Case("DINOv2-g, a quarter as wide", 8 * 257, 384, 1024, activation="silu", gated=True),
    Case("Point-MAE", 32 * 65, 384, 1536),
    Case("routed, 8 experts, top 2", 2048, 256, 512, 8, top_k=2, activation="silu", gated=True, bias=False),
    Case("ViT-S", 16 * 197, 384, 1536, dtype=torch.bfloat16),
    Case("Swin stage 1", 56 * 14, 96, 384, dtype=torch.float16),
    Case("ViT-L", 4 * 197, 1024, 4096),
)

# Small enough for tests and for a look while one works.
QUICK_CASES = (
    Case("small", 1024, 64, 256),
    Case("small, routed", 512, 64, 128, 8, top_k=2, activation="silu", gated=True, bias=False),
)


def cases(device: str) -> tuple[Case, ...]:
    """In the order in which they are measured, the most telling ones first: the time may run out.

    On a GPU all in bfloat16; ViT-S and ViT-B in the others too, and with peers by torch.compile.
    """
    if device != "cuda":
        return CPU_CASES
    narrow = [replace(case, dtype=torch.bfloat16, compiled=case in GPU_CASES[:2]) for case in GPU_CASES]
    others = [replace(case, dtype=dtype) for dtype in (torch.float16, torch.float32) for case in GPU_CASES[:2]]
    return (*narrow, *others)
