"""Run by test_launches.py in a process of its own, without the interpreter: what a GPU would be given at each launch.

Triton compiles for a GPU that is not there, and a driver that stands in for its own notes the arguments of launches.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget

import ewa_kernels as ewa
from ewa_kernels.kernels.triton import layer, linear, moe_ffn
from ewa_kernels.problem import Deal, Inputs, Options, Places, Problem

launches = []


class Launcher:
    def __init__(self, source, metadata):
        self.num_constants = len(source.constants)

    def __call__(self, *arguments):
        launches.append(arguments)


class Utils:
    def load_binary(self, name, binary, shared, device):
        return None, f"function {name}", 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


triton.runtime.driver.set_active(Driver())
layer._capability = lambda device: 90

HEAD = 9  # grid, stream, function and what belongs to the launch, before the kernel's own arguments


def described(arguments):
    """All that is told of a launch, but for the addresses."""
    return [(t.dtype, t.data_ptr() % 16) if isinstance(t, torch.Tensor) else t for t in arguments]


def check(backend, num_launches, seeds, dropout_p=0.0):
    torch.manual_seed(0)
    x, routing_weights = torch.randn(50, 32, dtype=torch.bfloat16), None
    weights = [torch.randn(size, dtype=torch.bfloat16) for size in ((2, 64, 32), (2, 64), (2, 32, 64), (2, 32))]
    given = (None, None)
    if "routed" in backend:
        routing_weights, choices = ewa.functional.route(torch.randn(50, 2), 2)
        given = ewa.functional.partition_by_expert(choices, 2)
    inputs = Inputs(x, *weights, routing_weights)
    how = Options("gelu", False, dropout_p, backend.removesuffix(" routed"), "full")
    problem = Problem.of(inputs, given[0] is not None, how, saved="full")
    for seed in seeds:
        _, pre_activation, permutation = moe_ffn.forward(problem, inputs, Deal(seed, *given))
        deal = Deal(seed, permutation, given[1])
        moe_ffn.backward(problem, x, inputs, deal, pre_activation, [True] * 5 + [given[0] is not None])
    compare(num_launches, len(seeds))


def check_linear(num_launches, gather, scatter):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, dtype=torch.bfloat16) for size in ((50, 32), (2, 64, 32), (2, 64)))
    places = Places(torch.randperm(50).int(), torch.tensor([0, 20, 50]).int(), gather, scatter)
    problem = Problem.of_linear(50, weight, "triton", x.dtype, (x.dtype,) * 3)
    for _ in range(2):
        out = linear.forward(problem, places, x, weight, bias)
        linear.backward(problem, places, out, x, weight, (True, True, True))
    compare(num_launches, 2)


def compare(num_launches, num_calls):
    """Launches of several calls, each of as many."""
    of_call = [call for call in launches if "groups" not in call[4]]
    launches.clear()
    calls = [of_call[i : i + num_launches] for i in range(0, len(of_call), num_launches)]
    assert len(calls) == num_calls, [call[4] for call in of_call]
    for launch in range(num_launches):
        first, *later = (call[launch] for call in calls)
        assert first[3] == 7
        for again in later:
            own, others = described(first[HEAD:]), described(again[HEAD:])
            assert first[:5] == again[:5], "grid, stream and function"
            assert len(own) == len(others)
            differing = {i for i, (a, b) in enumerate(zip(own, others, strict=True)) if a != b}
            # The seed is all that differs: its halves.
            assert len(differing) <= 2, differing


check("triton-single", 2, [3, 3, 2**62 + 5])
check("triton-split", 5, [3, 4])
check("triton-onchip", 2, [3, 4], dropout_p=0.5)
check("triton-single routed", 2, [None, None])
check_linear(5, gather=True, scatter=False)
check_linear(4, gather=False, scatter=True)
print("as the first time")
