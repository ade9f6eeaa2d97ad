"""Small cases of `backend="hopper"` for compute-sanitizer: every kind of launch, each compared with the reference.

EWA_TEST_EXTENSION: another build of the extension, in which who waits too long ends the kernel.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if "EWA_TEST_EXTENSION" in os.environ:
    os.environ.setdefault("EWA_TEST_VARIANT", "debug")
    import extension_stand_in  # noqa: F401
import torch
from parity import check_ffn, random_ffn

import ewa_kernels as ewa
from ewa_kernels.kernels import hopper

CASES = (
    ((1, 1, 8, 8), {}),
    ((300, 2, 72, 200), {}),
    ((700, 1, 328, 264), {"activation": "relu2"}),
    ((301, 2, 72, 136), {"activation": "silu", "gated": True}),
    ((301, 3, 72, 136), {"dropout_p": 0.2}),
    ((130, 2, 40, 72), {"activation": "silu", "gated": True, "dropout_p": 0.2}),
)
# On all multiprocessors a cluster has a tile; on four, several.
multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
for margin in (0, multiprocessors - 4):
    ewa.set_sm_margin(margin)
    for (num_tokens, *sizes), options in CASES:
        for dtype in (torch.bfloat16, torch.float16):
            weights = random_ffn(*sizes, dtype=dtype, gated=options.get("gated", False))
            x = torch.randn(num_tokens, sizes[1]).to("cuda", dtype)
            for hopper.ONE_LAUNCH in (False, True):
                check_ffn(x, tuple(t.cuda() for t in weights), backend="hopper", seed=3, **options)
        print(margin, num_tokens, sizes, options, "done", flush=True)

    torch.manual_seed(0)
    up, up_bias, down, down_bias = (t.cuda().requires_grad_() for t in random_ffn(4, 72, 136, dtype=torch.bfloat16))
    for top_k, offsets in ((1, [0, 0, 300, 301, 640]), (2, [0, 64, 640, 640, 1280])):
        x = torch.randn(640, 72, device="cuda", dtype=torch.bfloat16)
        results = []
        for backend in ("hopper", "torch"):
            rows = x.clone().requires_grad_()
            weights = torch.linspace(-1, 1, 640 * top_k, device="cuda").view(640, top_k).requires_grad_()
            y = ewa.functional.grouped_ffn(
                rows, up, up_bias, down, down_bias, permutation=torch.arange(640 * top_k, device="cuda").flip(0),
                expert_offsets=torch.tensor(offsets, device="cuda"), routing_weights=weights, backend=backend,
            )  # fmt: skip
            results.append((y, *torch.autograd.grad(y.square().sum(), [rows, weights, up, up_bias, down, down_bias])))
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()
        print(margin, "given groups", offsets, "done", flush=True)
torch.cuda.synchronize()
