"""Run by test_fused.py in a process of its own: rows so far into their tensors that their offsets exceed an int32.

The tensors are of 4 GB each and are never touched but for the last rows, so that no memory is committed for the rest.
The kernels are told of these rows alone: expert 0 owns rows `BASE` … `BASE + 64`.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
import torch

import ewa_kernels as ewa
from ewa_kernels.kernels.triton import cublas
from ewa_kernels.kernels.triton.backward import launch_backward
from ewa_kernels.kernels.triton.forward import launch_forward
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.onchip import launch_onchip
from ewa_kernels.kernels.triton.split import launch_down, launch_up
from ewa_kernels.problem import Deal, Inputs, Problem

WIDTH, ROWS = 32, 64
BASE = 2**31 // WIDTH
torch.manual_seed(0)
weights = [torch.randn(1, WIDTH, WIDTH) / 6, torch.randn(1, WIDTH), torch.randn(1, WIDTH, WIDTH) / 6]
up_weight, bias, down_weight = (t.half() for t in weights)
OPERANDS = (up_weight, bias, down_weight, bias)


class LastRows(Layer):
    """Of all rows, the blocks of the last ones only."""

    def num_blocks(self, block_m):
        return ROWS // block_m

    def groups(self, block_m):
        first_row = self.problem.num_rows - ROWS
        return torch.tensor([first_row, self.problem.num_rows, 0, *(0 for _ in range(self.num_blocks(block_m)))]).int()


def layer(x, permutation):
    dtypes = (torch.float16,) * 5 + (None,)
    kind = (torch.float16, torch.device("cpu"), dtypes, dtypes)
    problem = Problem(
        len(x), 1, 1, WIDTH, WIDTH, "silu", False, 0.0, True, *kind, saved="full", backend="triton-single"
    )
    problem.kept["num_programs"] = 1  # so that no sum is split
    return LastRows(problem, Inputs(x, *OPERANDS, None), Deal(None, permutation, torch.zeros(2, dtype=torch.int32)))


def run(first_row, last_rows):
    """Outputs and gradients of the last rows, of tensors with `first_row` rows before them."""
    num_rows = first_row + ROWS

    def new():
        return torch.empty(num_rows, WIDTH, dtype=torch.float16)

    x, y, pre_activation, hidden, grad_y, grad_x = (new() for _ in range(6))
    permutation = torch.empty(num_rows, dtype=torch.int32)
    permutation[first_row:] = torch.arange(first_row, num_rows).flip(0)
    x[first_row:], grad_y[first_row:] = last_rows
    grad_x[first_row:] = grad_y[first_row:]
    launch_forward(layer(x, permutation), y, pre_activation, hidden)
    results = [y[first_row:].clone(), pre_activation[first_row:].clone()]
    y[first_row:] = pre_activation[first_row:] = torch.nan
    launch_up(layer(x, permutation), pre_activation, hidden)
    launch_down(layer(x, permutation), y, hidden)
    results += [y[first_row:].clone(), pre_activation[first_row:].clone()]
    y[first_row:] = torch.nan
    launch_onchip(layer(x, permutation), y, pre_activation)
    results.append(y[first_row:].clone())
    # The passes between a library's products, the product being what pre_activation holds.
    results += [t[first_row:].clone() for t in cublas.gather(layer(x, permutation), True, grad_y)]
    results.append(cublas.activate(layer(x, permutation), pre_activation, None)[first_row:].clone())
    cublas.activate_backward(layer(x, permutation), grad_x, pre_activation, hidden, None, None)
    cublas.scatter(layer(x, permutation), hidden, y, bias)
    results += [t[first_row:].clone() for t in (grad_x, hidden, y)]
    grads = [grad_x, *(torch.empty_like(t) for t in OPERANDS)]
    launch_backward(layer(x, permutation), grad_y, pre_activation, grads, need_routing=False)
    return [*results, grads[0][first_row:].clone(), *grads[1:]]


last_rows = torch.randn(2, ROWS, WIDTH).half()
near, far = run(0, last_rows), run(BASE, last_rows)
assert BASE * WIDTH >= 2**31
for a, b in zip(near, far, strict=True):
    assert a.abs().max() > 0.01
    assert torch.equal(a, b)
expected = ewa.reference.moe_ffn(last_rows[0], *OPERANDS, seed=0, activation="silu")
torch.testing.assert_close(near[0], expected, rtol=2e-2, atol=2e-2)
print("same results at offset", BASE * WIDTH)
