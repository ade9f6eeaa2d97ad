"""Every shipped kernel configuration, compiled without a GPU: no spills, asynchronous tensor cores, enough memory."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from ewa_kernels import aot, ptx
from ewa_kernels.kernels.triton import configs
from ewa_kernels.kernels.triton.configs import Tile

# The kernels of this process are the interpreter's.
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_aot(*arguments):
    command = [sys.executable, "-m", "ewa_kernels.aot", "--json", *arguments]
    result = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert result.stdout, result.stderr
    return [aot.Report(**entry) for entry in json.loads(result.stdout)], result.returncode


def compile_tile(kernel, tile, **options):
    """The report on a tile that is in no table."""
    case = aot.Case(kernel, tile, "sm_90", "bfloat16", **options)
    fields = {**dataclasses.asdict(case), "tile": dataclasses.astuple(tile)}
    code = (
        "import json, dataclasses; from ewa_kernels import aot; from ewa_kernels.kernels.triton.configs import Tile\n"
        f"fields = {fields!r}; fields['tile'] = Tile(*fields['tile'])\n"
        "print(json.dumps(dataclasses.asdict(aot.compile_case(aot.Case(**fields)))))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return aot.Report(**json.loads(result.stdout))


def check(reports, returncode):
    for report in reports:
        if report.default:
            assert report.problems() == [], report
    assert returncode == 0


def test_bfloat16_on_hopper():
    """Two kernels that are quick to compile. `test_all_tiles` has all."""
    kernels = ("backward x", "onchip")
    reports, returncode = run_aot("--arch", "sm_90", "--dtype", "bfloat16", "--kernel", *kernels)
    check(reports, returncode)
    assert all(report.default for report in reports)
    assert {report.kernel for report in reports} == set(kernels)
    assert all(16 <= report.registers <= 255 and report.wgmma > 0 for report in reports)


# `python -m ewa_kernels.aot` compiles all. Here one type of 16 bits for each architecture, and both for Hopper; float32
# for one alone, as its tiles and instructions are alike everywhere; and of sm_86 and sm_89, which have the tiles of
# sm_80, float16, which has spilled there.
ARCHITECTURES = {
    "sm_80": ("float16", "float32", "tf32"),
    "sm_86": ("float16",),
    "sm_89": ("float16",),
    "sm_90": ("bfloat16", "float16", "tf32"),
    "sm_100": ("bfloat16", "tf32"),
    "sm_120": ("float16",),
}


def test_every_architecture_is_here():
    assert tuple(ARCHITECTURES) == aot.ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtypes"), ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_all_tiles(architecture, dtypes):
    reports, returncode = run_aot("--arch", architecture, *(f"--dtype={dtype}" for dtype in dtypes))
    check(reports, returncode)
    assert {report.dtype for report in reports} == set(dtypes)
    passes_too = dtypes != ("float16",)  # which has those of bfloat16
    assert {report.kernel for report in reports} == set(aot.KERNELS) - set(() if passes_too else aot.PASSES)
    # "auto" leaves groups that are given to Triton's forms.
    passes = [report for report in reports if report.kernel in aot.PASSES and report.default]
    assert not any("routed" in report.config for report in passes)
    assert bool(passes) == (architecture == "sm_90")
    # What waits for a measurement is no default, and spills nothing.
    switches = [report for report in reports if re.search("early|backoff|flat|boxes", report.config)]
    assert len(switches) == (sum(map(len, configs.CANDIDATES.values())) if architecture == "sm_90" else 0)
    assert not any(report.default or report.problems() for report in switches)
    for report in reports:
        if report.kernel in aot.MULTIPLIES:  # no other is disassembled
            assert (report.wgmma > 0) == (architecture == "sm_90" and report.dtype != "float32")
    # Of these every architecture has the tiles, also those with less memory.
    of_all = [report.shared_bytes for report in reports if report.dtype in ("float32", "tf32")]
    assert max(of_all, default=0) <= min(aot.SHARED_MEMORY.values())


class TestTheGate:
    """Configurations known to be bad are called so."""

    def test_spills(self):
        report = compile_tile("backward", Tile(128, 256, 64, 1, 8, 3))
        assert report.spill_stores > 0
        assert report.spill_loads > 0
        assert any("spills" in problem for problem in report.problems())

    def test_too_much_shared_memory(self):
        report = compile_tile("forward", Tile(128, 256, 64, 4, 8, 6))
        assert report.shared_bytes > aot.SHARED_MEMORY[90]
        assert any("shared memory" in problem for problem in report.problems())

    def test_serialized_wgmma(self):
        """Four warps have too few registers for this accumulator; the compiler waits after each product."""
        report = compile_tile("forward", Tile(128, 256, 64, 4, 4, 3))
        assert report.wgmma_serialized
        assert any("wgmma" in problem for problem in report.problems())

    def test_a_release_without_a_barrier(self):
        """The text that Triton gives without the explicit barrier, and with it."""
        store, barrier, release = "st.global.b32 [%rd1], {%r1};", "bar.sync 0;", "atom.global.gpu.acq_rel.add.s32 %r2;"
        assert ptx.hand_off_problems("\n".join((store, release)))
        assert ptx.hand_off_problems("\n".join((barrier, "@%p1 " + store, "@%p2 " + release)))
        assert ptx.hand_off_problems("\n".join((store, barrier, release))) == []

    def test_a_sum_by_several_threads(self):
        """After a store by other threads the address of what is added has another layout, and so another name."""
        tensors = "(tensor<128x!tt.ptr<f32>, #a>, tensor<128xf32, #a>, tensor<128xi1, #a>) -> tensor<128xf32, #a>"
        add = f"%0 = tt.atomic_rmw fadd, relaxed, gpu, %piece_1, %1, %2 : {tensors}"
        store = "tt.store %piece_1, %3, %4 : tensor<128x!tt.ptr<f32>, #a> loc(#loc)"
        assert ptx.sum_problems("\n".join((store, add))) == []
        assert ptx.sum_problems("\n".join((store.replace("piece_1", "piece_2").replace("#a", "#b"), add)))
        assert ptx.sum_problems(add)
        assert ptx.sum_problems(add.replace("%piece_1", "%piece#1"))
        assert ptx.sum_problems("", is_expected=True)
        assert ptx.sum_problems("\n".join((store, add)), is_expected=True) == []

    def test_a_bad_default_is_an_exit_code(self, monkeypatch, capsys):
        bad = aot.Report("forward", "", True, "bfloat16", "sm_90", 255, 8, 8, 1000, 4, False, [])
        monkeypatch.setattr(aot, "compile_all", lambda chosen: iter([bad]))
        monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(sys, "argv", ["aot", "--arch", "sm_90"])
        assert aot.main() == 1
        assert "spills: 8 bytes stored, 8 loaded" in capsys.readouterr().out


def test_interpreter_compiles_nothing():
    command = [sys.executable, "-m", "ewa_kernels.aot"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
