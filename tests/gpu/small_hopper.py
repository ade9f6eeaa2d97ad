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
for (num_tokens, *sizes), options in CASES:
    weights = random_ffn(*sizes, dtype=torch.bfloat16, gated=options.get("gated", False))
    x = torch.randn(num_tokens, sizes[1]).bfloat16().cuda()
    for hopper.ONE_LAUNCH in (False, True):
        check_ffn(x, tuple(t.cuda() for t in weights), backend="hopper", seed=3, **options)
    print(num_tokens, sizes, options, "done", flush=True)
routed = ewa.RoutedMoE(72, 136, 3, 2, device="cuda", dtype=torch.bfloat16, backend="hopper")
x = torch.randn(333, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
routed(x).sum().backward()
assert x.grad.isfinite().all()
assert routed.router.weight.grad.isfinite().all()
torch.cuda.synchronize()
print("routed done", flush=True)
