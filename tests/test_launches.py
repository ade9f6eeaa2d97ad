"""What the layer's kernels are launched with: groups that are given, addresses, multiprocessors, memory."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from parity import output_and_grads
from test_fused import DEVICE, FORMS, GIVEN_FORMS, dtype_for, parameters, tokens

import ewa_kernels as ewa
from ewa_kernels import calls, problem
from ewa_kernels.kernels import forms, multiprocessors
from ewa_kernels.kernels.triton import backward, configs, forward, groups, moe_ffn, onchip, rows, split
from ewa_kernels.kernels.triton.queue import wait_until
from ewa_kernels.problem import Deal, Inputs, Options, Problem

# What a router with a fault may give for 70 rows and 4 experts: more row blocks than there are numbers for, falling
# offsets, beginnings and ends elsewhere, and numbers that differ by more than an int32.
BAD_OFFSETS = [
    [0, 70, 0, 70, 70],
    [0, 60, 30, 50, 70],
    [0, 20, 40, 60, 90000],
    [0, -500, 30, 50, 70],
    [3, 20, 40, 60, 65],
    [0, -(2**31), 2**31 - 1, 0, 70],
]


class TestBadPartition:
    """The kernels by themselves: on a CPU the operation would refuse it before."""

    @pytest.mark.parametrize("offsets", [*BAD_OFFSETS, [0, 0, 33, 64, 70], [0, 70, 70, 70, 70]])
    @pytest.mark.parametrize("block_m", [16, 128])
    def test_table(self, offsets, block_m):
        """Offsets that rise from 0 to R, the very ones if they do, and blocks that cover each row once."""
        num_experts, num_rows = 4, 70
        num_blocks = num_rows // block_m + num_experts
        given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        table = groups.tabulate(given, num_rows, num_blocks, block_m).tolist()
        starts, first_blocks, experts = table[:5], table[5:9], table[9:]
        assert starts[0] == 0
        assert starts[-1] == num_rows
        assert starts == sorted(starts)
        if offsets not in BAD_OFFSETS:
            assert starts == offsets
        rows = []
        for block, expert in enumerate(experts):
            first = starts[expert] + (block - first_blocks[expert]) * block_m
            rows += range(first, min(first + block_m, starts[expert + 1]))
        assert rows == list(range(num_rows))

    def test_table_of_many_experts(self):
        """More than one pass over them, and more blocks than one program's."""
        generator = torch.Generator().manual_seed(0)
        offsets = torch.randint(0, 20_000, (1001,), generator=generator).sort().values.int()
        offsets[0], offsets[-1] = 0, 20_000
        num_blocks = 20_000 // 16 + 1000
        table = groups.tabulate(offsets.to(DEVICE), 20_000, num_blocks, 16).cpu()
        of_expert = (offsets.diff() + 15) // 16
        assert torch.equal(table[:1001], offsets)
        assert torch.equal(table[1001:2001], of_expert.cumsum(0) - of_expert)
        experts = torch.repeat_interleave(torch.arange(1000), of_expert)
        assert torch.equal(table[2001 : 2001 + len(experts)], experts.int())

    @pytest.mark.parametrize("offsets", BAD_OFFSETS)
    @pytest.mark.parametrize("form", ["triton-single", "triton-split", "triton-onchip"])
    def test_ends_and_stays_within_the_tensors(self, form, offsets, monkeypatch):
        """Outputs and gradients are between walls of NaN, as is what is read: none is reached, none is breached."""
        dtype = dtype_for(form)

        def walled(*shape):
            memory = torch.full((3, *shape), torch.nan, dtype=dtype, device=DEVICE)
            memory[1] = tokens(*shape, dtype=dtype)
            return memory[1]

        x, grad_y = walled(70, 24), walled(70, 24)
        weights = tuple(walled(*shape) for shape in ((4, 40, 24), (4, 40), (4, 24, 40), (4, 24)))
        permutation = torch.arange(70, dtype=torch.int32, device=DEVICE)
        permutation[[0, 9, 50]] = torch.tensor([-5, 2**31 - 1, 70], dtype=torch.int32, device=DEVICE)
        given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        routing_weights, options = walled(70, 1), ("silu", False, 0.0)
        inputs, deal = Inputs(x, *weights, routing_weights), Deal(None, permutation, given)
        problem = Problem.of(inputs, True, Options(*options, form, "full"), saved="full")
        y, pre, _ = moe_ffn.forward(problem, inputs, deal)
        grads = moe_ffn.backward(problem, grad_y, inputs, deal, pre, [True] * 6)
        assert pre.isfinite().all()
        for value in (y[permutation.clamp(0, 69).long()], grads[0][permutation.clamp(0, 69).long()], *grads[1:5]):
            assert value.isfinite().all()

    @pytest.mark.parametrize("offsets", [[0, 70, 0, 70, 70], [3, 20, 40, 60, 70], [0, 20, 40, 60, 65]])
    def test_debug_mode_says_what_is_wrong(self, offsets, interpreter_in_debug_mode):
        given = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(Exception, match="expert_offsets must"):
            groups.tabulate(given, 70, 70 // 16 + 4, 16)

    def test_debug_mode_bounds_the_permutation(self, interpreter_in_debug_mode):
        x, weights = tokens(4, 16), parameters(2, 16, 24)
        permutation, offsets = torch.tensor([0, 1, 2, 4]).int(), torch.tensor([0, 2, 4]).int()
        inputs = Inputs(x, *weights, None)
        problem = Problem.of(inputs, True, Options("gelu", False, 0.0, "triton-single", "full"), saved="recompute")
        with pytest.raises(Exception, match="permutation must hold"):
            moe_ffn.forward(problem, inputs, Deal(None, permutation, offsets))

    def test_debug_mode_says_nothing_else(self, interpreter_in_debug_mode):
        """Hashes may overflow, in the deal and in dropout."""
        x, weights = tokens(40, 16), parameters(3, 16, 24)
        for backend in ("triton-single", "triton-onchip"):
            output_and_grads(ewa.functional.moe_ffn, (x, *weights), x, seed=3, dropout_p=0.2, backend=backend)

    @pytest.mark.skipif(DEVICE == "cuda", reason="a failed assert ends the process's use of the GPU")
    def test_no_wait_is_for_ever(self):
        with pytest.raises(Exception, match="what is waited for is never done"):
            _wait[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def _wait(counter):
    wait_until(counter, 1, False)


@pytest.fixture
def interpreter_in_debug_mode(monkeypatch):
    """As EWA_KERNELS_DEBUG=1 makes it on a GPU."""
    if DEVICE == "cuda":
        pytest.skip("a failed assert ends the process's use of the GPU")
    builder = triton.runtime.interpreter.interpreter_builder
    options = {"debug": True, "sanitize_overflow": configs.ASSERTS["sanitize_overflow"]}
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, **options))


class Launches:
    """Stands in for a kernel: notes grids and arguments, and launches it all the same."""

    def __init__(self, kernel):
        self.kernel, self.grids, self.tensors, self.options = kernel, [], [], {}
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.grids.append(grid)
            self.tensors += [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            self.options = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """What each of the layer's kernels is launched with, by name."""
    noted = {}
    for module, kernels in (
        (forward, ["forward"]), (split, ["half"]), (backward, ["backward", "pre", "weights", "grad_x"]),
        (onchip, ["onchip"]), (groups, ["groups"]),
        (rows, ["gather", "activate", "activate_backward", "scatter", "sums"]),
    ):  # fmt: skip
        for name in (f"{kernel}_kernel" for kernel in kernels):
            noted[name] = Launches(getattr(module, name))
            monkeypatch.setattr(module, name, noted[name])
    return noted


@pytest.mark.parametrize("form", GIVEN_FORMS)
def test_hashes_may_overflow_in_every_launch(form, launches):
    """Triton's own asserts would take them for faults, in debug mode and under TRITON_DEBUG=1."""
    dtype = dtype_for(form)
    leaves = [t.requires_grad_() for t in (tokens(40, 16, dtype=dtype), *parameters(3, 16, 24, dtype=dtype))]
    permutation = torch.arange(40, dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 9, 9, 40], device=DEVICE)
    partition = {"permutation": permutation, "expert_offsets": offsets, "dropout_p": 0.1}
    ewa.functional.grouped_ffn(*leaves, **partition, backend=form).sum().backward()
    launched = [noted.options for noted in launches.values() if noted.grids]
    assert len(launched) == {"triton-split": 5, "cublas": 6}.get(form, 3)
    assert all(configs.ASSERTS.items() <= options.items() for options in launched)
    assert configs.ASSERTS == {"debug": False, "sanitize_overflow": False}


@pytest.mark.parametrize(
    ("backend", "fastest", "single"),
    [
        ("triton", "split", False),
        ("triton", "single", True),
        ("triton", None, True),
        ("triton-single", "split", True),
        ("triton-split", "single", False),
    ],
)
def test_backward_in_one_launch_or_in_three(backend, fastest, single, launches, monkeypatch):
    """As the table of forms says, if it has a shape like this one, unless the backend does."""
    times = {"single": 2.0, "split": 1.0 if fastest == "split" else 3.0}
    entry = forms.Entry("like it", 9, 4, False, 8, 1, 16, 16, times, times, True, "a test")
    monkeypatch.setattr(forms, "nearest", lambda *sizes: None if fastest is None else entry)
    x, weights = tokens(8, 16).requires_grad_(), parameters(1, 16, 16)
    ewa.functional.moe_ffn(x, *(t.requires_grad_() for t in weights), seed=1, backend=backend).sum().backward()
    grids = {name: len(noted.grids) for name, noted in launches.items() if noted.grids}
    grids = {
        name: count for name, count in grids.items() if name not in ("forward_kernel", "half_kernel", "onchip_kernel")
    }
    assert grids == dict.fromkeys(
        ["backward_kernel"] if single else ["pre_kernel", "weights_kernel", "grad_x_kernel"], 1
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="changes the interpreter's tiles")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_tiles_of_its_own_for_each_launch(gated, monkeypatch):
    x, weights = tokens(150, 24), parameters(4, 24, 40, gated=gated)
    options = {
        "permutation": torch.randperm(150, generator=torch.Generator().manual_seed(0)),
        "expert_offsets": torch.tensor([0, 50, 50, 51, 150]),
        "routing_weights": torch.rand(150, 1, generator=torch.Generator().manual_seed(1)),
        "gated": gated,
        "backend": "triton-split",
    }
    expected = output_and_grads(ewa.functional.grouped_ffn, (x, *weights), x, **options)
    sizes = ((64, 16, 32), (16, 32, 32), (64, 32, 16), (16, 64, 32), (32, 16, 64))
    for phase, (m, n, k) in zip(configs.PHASES, sizes, strict=True):
        monkeypatch.setitem(configs.INTERPRETER, phase, (configs.Tile(m, n, k, 1, 4, 1),))
    for name, value in output_and_grads(ewa.functional.grouped_ffn, (x, *weights), x, **options).items():
        assert (value - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.skipif(DEVICE == "cuda", reason="changes the interpreter's tiles")
@pytest.mark.parametrize(
    ("form", "switches", "gated", "num_programs"),
    [
        ("single", ["early"], False, 3),
        ("single", ["early", "backoff"], True, 1),
        ("split", ["flat"], True, 3),
        ("split", ["boxes"], False, 50),
        ("split", ["flat", "boxes"], True, 50),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_switches_change_no_value(form, switches, gated, num_programs, monkeypatch):
    monkeypatch.setattr(multiprocessors, "count", lambda device: num_programs)
    x, weights = tokens(90, 24), parameters(4, 24, 40, gated=gated)
    offsets = torch.tensor([0, 0, 37, 37, 90])
    given = {"permutation": torch.randperm(90, generator=torch.Generator().manual_seed(0)), "expert_offsets": offsets}

    def run():
        problem._made.clear()
        calls._problems.clear()
        options = {"backend": f"triton-{form}", "gated": gated}
        dealt = output_and_grads(ewa.functional.moe_ffn, (x, *weights), x, seed=1, recompute=True, **options)
        grouped = output_and_grads(ewa.functional.grouped_ffn, (x, *weights), x, **given, **options)
        return {**dealt, **{f"{name} of groups": value for name, value in grouped.items()}}

    expected = run()
    for kernel in ("forward", "backward") if form == "single" else configs.PHASES:
        tile = dataclasses.replace(configs.INTERPRETER[kernel][0], **dict.fromkeys(switches, True))
        monkeypatch.setitem(configs.INTERPRETER, kernel, (tile,))
    for name, value in run().items():
        # Of columns in another order a CPU's products are summed in another.
        assert (value - expected[name]).norm() <= ("boxes" in switches) * 1e-6 * expected[name].norm(), name


def off_by_one(tensor):
    """The same values, at an address that is no multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("form", GIVEN_FORMS)
def test_no_kernel_sees_an_odd_address(form, launches):
    """Triton would compile it anew, to load element by element and spill; flat parameter buffers have some."""
    moe_ffn.warn_once_of_copies.cache_clear()
    dtype = dtype_for(form)
    operands = (tokens(40, 16, dtype=dtype), *parameters(3, 16, 24, dtype=dtype))
    partition = {
        "permutation": torch.randperm(40, device=DEVICE).int(),
        "expert_offsets": torch.tensor([0, 13, 27, 40], dtype=torch.int32, device=DEVICE),
        "routing_weights": torch.rand(40, 1, device=DEVICE),
        "seed": torch.tensor(3, device=DEVICE),
    }

    def run(change):
        inputs = [change(t).requires_grad_() for t in operands]
        given = {name: change(value) for name, value in partition.items()}
        y = ewa.functional.grouped_ffn(*inputs, **given, dropout_p=0.2, backend=form)
        return y, *torch.autograd.grad(y, inputs, change(operands[0]))

    expected = run(torch.clone)
    with pytest.warns(UserWarning, match="no multiples of 16 bytes"):
        ours = run(off_by_one)
    for value, other in zip(ours, expected, strict=True):
        assert torch.equal(value, other)
    seen = [tensor for noted in launches.values() for tensor in noted.tensors]
    assert len(seen) > 20
    assert all(tensor.data_ptr() % 16 == 0 for tensor in seen)


@pytest.mark.parametrize("form", FORMS)
def test_nor_where_hooks_change_what_is_saved(form, launches):
    dtype = dtype_for(form)
    x, weights = tokens(40, 16, dtype=dtype).requires_grad_(), parameters(3, 16, 24, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, off_by_one):
        ewa.functional.moe_ffn(x, *(t.requires_grad_() for t in weights), seed=1, backend=form).sum().backward()
    seen = [tensor for noted in launches.values() for tensor in noted.tensors]
    assert len(seen) > 20
    assert all(tensor.data_ptr() % 16 == 0 for tensor in seen)


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_in_autocast_has_the_types_of_its_forward(form):
    """What a launch is given may not change its type: it was compiled for one."""
    x, weights = tokens(40, 16).requires_grad_(), [t.requires_grad_() for t in parameters(3, 16, 24)]
    if DEVICE == "cuda" and form == "triton-onchip":
        pytest.skip("for 16 bits")
    y = ewa.functional.moe_ffn(x, *weights, seed=1, backend=form)
    expected = torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), [x, *weights])
    assert all(map(torch.equal, grads, expected))


class TestMargin:
    """Multiprocessors that are left to NCCL by kernels that would keep them; passes over rows end soon."""

    @pytest.fixture(autouse=True)
    def no_margin_stays(self):
        yield
        ewa.set_sm_margin(0)

    @pytest.mark.parametrize("form", [form for form in FORMS if form != "cublas"])
    def test_every_persistent_launch_leaves_it(self, form, launches, monkeypatch):
        monkeypatch.setattr(multiprocessors, "count", lambda device: 10)
        dtype = dtype_for(form)
        x, weights = tokens(200, 16, dtype=dtype), parameters(3, 16, 24, dtype=dtype)
        results = []
        for margin in (0, 3, 1000):
            ewa.set_sm_margin(margin)
            results.append(output_and_grads(ewa.functional.moe_ffn, (x, *weights), x, seed=1, backend=form))
            grids = {grid for noted in launches.values() for grid in noted.grids}
            assert max(grids) == (max(10 - margin, 1),)
            for noted in launches.values():
                noted.grids.clear()
        for other in results[1:]:
            assert all(torch.equal(value, results[0][name]) for name, value in other.items())

    def test_torchs_carve_out_counts_as_well(self):
        device = torch.device("cuda", 0)
        before = torch._C._get_sm_carveout_experimental()
        try:
            for carve_out, margin, left in ((None, 0, 0), (8, 0, 8), (8, 20, 20), (30, 20, 30)):
                torch._C._set_sm_carveout_experimental(carve_out)
                ewa.set_sm_margin(margin)
                assert multiprocessors.left_free(device) == left
        finally:
            torch._C._set_sm_carveout_experimental(before)

    @pytest.mark.parametrize(("number", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
    def test_bad_input(self, number, error):
        with pytest.raises(error, match="number must be"):
            ewa.set_sm_margin(number)


class TestMemoryOfTheBackward:
    """What it asks for grows with what it needs."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """How many counters each backward asks for, and how much memory by which name."""
        counts, memory = [], {}
        real, parts = backward.zeroed_counters, backward._parts
        monkeypatch.setattr(
            backward, "zeroed_counters", lambda count, device: counts.append(count) or real(count, device)
        )
        monkeypatch.setattr(backward, "_parts", lambda sizes, *kind: memory.update(sizes) or parts(sizes, *kind))
        return counts, memory

    def test_no_counters_for_tiles_that_are_not_split(self, asked, monkeypatch):
        monkeypatch.setattr(multiprocessors, "count", lambda device: 1)
        x, weights = tokens(60, 16), parameters(3, 16, 48)
        output_and_grads(ewa.functional.moe_ffn, (x, *weights), x, seed=1, backend="triton-single")
        assert asked[0] == [2 + 3]

    def test_a_routing_weights_gradient_has_one_piece_for_a_tile(self, asked, launches):
        x, weights = tokens(40, 16), parameters(3, 16, 500)
        partition = {
            "permutation": torch.randperm(80, device=DEVICE).int(),
            "expert_offsets": torch.tensor([0, 13, 27, 80], device=DEVICE),
        }
        routing_weights = torch.rand(40, 2, device=DEVICE, requires_grad=True)
        y = ewa.functional.grouped_ffn(
            x, *weights, **partition, routing_weights=routing_weights, backend="triton-single"
        )
        y.sum().backward()
        pieces = -(-500 // launches["backward_kernel"].options["BLOCK_N"])
        assert pieces * 80 <= asked[1]["partial_routing"] < pieces * 80 + 64


@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for the driver")
def test_launched_again_as_the_first_time():
    """What the first launch compiled is given the arguments that Triton itself would give it."""
    script = Path(__file__).parent / "launch_again.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "as the first time", result.stderr
