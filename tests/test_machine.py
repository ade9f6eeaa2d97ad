"""The model of sm_90a on the host for kernels of csrc/hopper: right programs are right in it, and faults are found."""

import re
import subprocess

import pytest
from host_model import MODEL, MODES, compiler, flags, nvcc_as_shipped

SEEDS = 3

# What is said of each program of cuda_on_host/programs: nothing, or how its fault shows.
VALUES = "values: "
RACE = "race: (reads|writes) in shared memory"
UNINITIALISED = "is not initialised|no barrier between its initialisation"
BYTES = "expect_tx too small|more bytes|deadlock|ends while TMA loads"
PROGRAMS = {
    "phases": "",
    "phases, polled": "",
    "phases: no wait": RACE,
    "phases: no wait to write": f"{RACE}|more arrivals",
    "phases: wrong parity": RACE,
    "phases: not initialised": "is not initialised",
    "phases: no barrier after initialisation": UNINITIALISED,
    "too many arrivals": "more arrivals than it was initialised with",
    "both CTAs": "",
    "both CTAs: no fence after initialisation": "no fence_mbarrier_init before TMA or the peer",
    "both CTAs: no cluster barrier after initialisation": UNINITIALISED,
    "both CTAs: a lost arrival": r"deadlock: .*mbarrier_wait \d+ parity 0 \(phase 4 lacks 1 arrivals and 0 bytes\)",
    "arrival after exit": "arrival on a barrier of a CTA that has ended",
    "cluster barrier": "",
    "cluster barrier: arrives twice": "cluster_arrive twice",
    "cluster barrier: does not arrive": "cluster_wait without cluster_arrive",
    "named barriers": "",
    "named barriers: no wait": RACE,
    "named barriers: no wait to write": RACE,
    "named barriers: mismatched counts": f"mismatched counts (128 and 96|96 and 128)|{RACE}",
    "named barriers: not whole warps": "number of threads 120",
    "named barriers: number 16": "named barrier 16",
    "named barriers: half a warp": "diverged: .*named_barrier_sync",
    "flags": "",
    "flags: no wait": f"race: reads in global memory|{VALUES}",
    "flags: never set": "livelock: 2 threads wait:.* a flag, which is 0",
    "flags: of clusters that cannot start": "livelock: 2 threads wait:.*cluster 1",
    "who waits": r"deadlock: 96 threads wait:;  cluster 0 CTA 1 warp 0, 32 lanes: named_barrier_sync 4 of 96 threads;"
    r".*warp 2, 32 lanes: mbarrier_wait 2056 parity 0 \(phase 0 lacks 2 arrivals and 256 bytes\)$",
    "lanes": "",
    "lanes: some end": "diverged: .*warp_uniform",
    "lanes: two instructions": "diverged: lanes of a warp are in (named_barrier_sync and in )?warp_uniform",
    "matrices": "",
    "matrices: misaligned": "misaligned address in shared memory",
    "shared memory: outside": "outside shared memory",
    "shared memory: too much": "too much shared memory",
    "numbers": "",
    "registers": "",
    "registers: never enough": "deadlock: 32 threads wait:.*setmaxnreg: registers 240",
    "registers: not all warps": "differ in the number of setmaxnreg",
    "registers: more by dec": "setmaxnreg from 168 to 200",
    "load 2-D: swizzle 128": "",
    "load 2-D: swizzle 64": "",
    "load 2-D: no swizzle": "",
    "load 2-D: clipped left and above": "",
    "load 2-D: clipped right and below": "",
    "load 2-D: clipped, swizzle 64": "",
    "load 2-D: outside": "",
    "load 2-D: too few bytes": BYTES,
    "load 2-D: too many bytes": r"deadlock: .*lacks 0 arrivals and 16 bytes",
    "load 2-D: no wait": f"{VALUES}.*nan|{RACE}|ends while TMA loads to it are in flight",
    "load 2-D: over what is read": f"{RACE}|deadlock",
    "load 2-D: misaligned": "misaligned address in shared memory",
    "load 2-D: in flight at the end": f"ends while TMA loads to it are in flight|{VALUES}",
    "load and store 3-D": "",
    "load and store 3-D: no wait for reading": "what a TMA store or wgmma may still read",
    "load and store 3-D: no wait at the end": "before its TMA stores have read shared memory",
    "load and store 3-D: not committed": "a TMA store that was not committed|what a TMA store or wgmma may still read",
    "store 2-D": "",
    "store 2-D: no fence": f"{VALUES}.*nan",
    "store 2-D: fence by some": f"{VALUES}.*nan",
    "store 2-D: no wait for reading": "what a TMA store or wgmma may still read",
    "multicast": "",
    "multicast 3-D": "",
    "multicast: bytes of the own half": f"{BYTES}|{RACE}",
    "multicast: after exit": "TMA load to a CTA that has ended|ends while TMA loads",
    "tensor map: misaligned": "TMA: misaligned tensor",
    "tensor map: stride": "TMA: misaligned stride",
    "tensor map: wider than the swizzle": "wider than the swizzle",
    "tensor map: not whole chunks": "not whole chunks",
    "tensor map: rank": "another rank",
    "gather": "",
    "gather: by barrier": "",
    "gather: by barrier, for TMA": "",
    "gather: for TMA": "",
    "gather: no wait": f"{RACE}|{VALUES}",
    "gather: no fence for TMA": VALUES,
    "gather: by barrier, no fence for TMA": VALUES,
    "hand-off by TMA": "",
    "hand-off by threads, the writer fences": "",
    "hand-off by threads, the reader fences": "",
    "hand-off by TMA: waits for reading only": VALUES,
    "hand-off by TMA: no wait for the flag": VALUES,
    "hand-off by TMA: flag before the store": VALUES,
    "hand-off by threads: no fence": VALUES,
    "hand-off by threads: flag before others wrote": VALUES,
    "descriptors": "",
    "product bf16: K-major, K-major": "",
    "product bf16: K-major, MN-major": "",
    "product bf16: MN-major, MN-major": "",
    "product f16: MN-major, K-major": "",
    "product f16: K-major, K-major": "",
    "product: no wait": f"{VALUES}nan",
    "product: waits for fewer groups": f"{VALUES}nan",
    "product: not committed": f"{VALUES}nan|wgmma that nobody waited for",
    "product: no wgmma_fence": "wgmma without wgmma_fence",
    "product: no fence of the proxies": f"{VALUES}-?nan",
    "product: wrong leading offset": VALUES,
    "product: wrong stride offset": VALUES,
    "product: wrong major": VALUES,
    "product: no swizzle": "descriptor: another layout",
    "product: lanes differ": "wgmma differs between lanes",
    "product: warps differ": "warps of a warpgroup differ in wgmma",
    "product: a warp has one less": "differ in the number of wgmma|wgmma that nobody waited for",
    "product: half a warp": "diverged: .*wgmma",
    "product: written in flight": f"written while wgmma was in flight|{VALUES}",
    "product: too few registers": "more accumulators than the thread has registers",
    "gemm K-major": "",
    "gemm MN-major": "",
    "gemm 256 x 256 x 128": "",
    "gemm: stage released early": RACE,
    "gemm: stage released before its products": RACE,
    "gemm: stage released by one warp for all": RACE,
    "gemm: wrong leading offset": VALUES,
    "gemm: wrong parity": "deadlock",
    "gemm: lost arrival on the peer": f"{VALUES}|{RACE}|later phase|deadlock",
    "gemm: no fence of the proxies": f"{VALUES}.*nan",
    "gemm: too few bytes expected": f"{BYTES}|{RACE}",
    "gemm: no wait for the products": f"{VALUES}nan|{RACE}|written while wgmma was in flight",
    "gemm: no wgmma_fence": "wgmma without wgmma_fence",
    "gemm: slot written while it is read": "what a TMA store or wgmma may still read",
    "gemm: slot without a barrier": f"{VALUES}|{RACE}",
    "gemm: no fence after initialisation": "no fence_mbarrier_init before TMA or the peer",
    "gemm: ends before the peer has done with it": "has ended|ends while",
    "gemm: the peer's half of B": VALUES,
}


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    objects = []
    for source in sorted((MODEL / "programs").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        run(compiler(), *flags(), "-c", source, "-o", objects[-1])
    run(compiler(), *objects, "-o", folder / "programs")
    return folder / "programs"


def test_each_program_is_judged(programs):
    assert sorted(run(programs).splitlines()) == sorted(PROGRAMS)


@pytest.mark.parametrize(("name", "expected"), PROGRAMS.items(), ids=PROGRAMS)
def test_program(name, expected, programs):
    """A right one is right whenever things happen; a fault shows as itself, in one mode at least with every seed."""
    said = {}
    for line in run(programs, name, str(SEEDS)).splitlines():
        mode, _, what = line.partition(": ")
        said.setdefault(mode, []).append(what)
    assert list(said) == list(MODES)
    assert all(len(lines) == SEEDS for lines in said.values())
    everything = [what for lines in said.values() for what in lines]
    if expected == "":
        assert everything == [""] * len(everything)
        return
    assert [what for what in everything if what and not re.search(expected, what)] == []
    assert any(all(lines) for lines in said.values()), said


def test_all_instructions_compile_for_the_device(tmp_path):
    source = MODEL / "programs/all_instructions.cu"
    command = [*nvcc_as_shipped(), f"-I{source.parent}", "-c", source, "-o", tmp_path / "o.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"C75\d\d|[1-9]\d* bytes spill", result.stderr), result.stderr
