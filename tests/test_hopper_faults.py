"""Faults planted in the source of csrc/hopper are found by the model of sm_90a; the source as it is, is right there.

A fault is an edit of one place. It must show, by what the model says or by wrong values, with every one of a few seeds
in one mode at least. Where the order of things decides, that is a sample: a CTA that leaves too early is seen in one
mode only. tests/test_hopper_protocol.py tries all orders.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from host_model import MODEL, MODES, ROOT, compiler, flags

SEEDS = 3

VALUES = "^values: "
RACE = "^race: (reads|writes) in shared memory"
DEADLOCK = "^deadlock: .*(mbarrier_wait|named_barrier_sync)"
UNINITIALISED = "is not initialised|no barrier between its initialisation"
ENDED = "arrival on a barrier of a CTA that has ended|TMA load to a CTA that has ended"


@dataclass
class Fault:
    program: str  # of hopper_faults.cpp
    file: str
    text: str  # stands once in the file
    instead: str
    shows: str  # what may be said of it
    slow: bool = False


def in_product(program, text, instead, shows, slow=False):
    return Fault(program, "product.cuh", text, instead, shows, slow)


def in_epilogue(program, text, instead, shows, slow=False):
    return Fault(program, "epilogues.cuh", text, instead, shows, slow)


def in_groups(program, text, instead, shows, slow=False):
    return Fault(program, "groups.cuh", text, instead, shows, slow)


def in_descriptor(program, text, instead, shows, slow=False):
    return Fault(program, "descriptors.h", text, instead, shows, slow)


FAULTS = {
    # --- what comes before everything ---
    # Not "cooperative", which has another fence for its ones.
    "no fence after initialisation": in_product(
        "pingpong", "        fence_mbarrier_init();\n", "", "no fence_mbarrier_init before TMA or the peer"
    ),
    "no cluster barrier after initialisation": in_product(
        "cooperative", "        cluster_sync();\n        griddep", "        griddep", UNINITIALISED, slow=True
    ),
    "no wait for the grid before": in_product(
        "pingpong", "        griddepcontrol_wait();\n", "", "global memory is used before griddepcontrol_wait"
    ),
    # --- the ring of stages ---
    "producer does not wait": in_product(
        "cooperative",
        "                mbarrier_wait(empty(step), parity(step) ^ 1);\n                mbarrier_arrive_expect",
        "                mbarrier_arrive_expect",
        f"{RACE}|more arrivals",
        slow=True,
    ),
    "wrong parity in the producer": in_product(
        "cooperative",
        "                mbarrier_wait(empty(step), parity(step) ^ 1);\n                mbarrier_arrive_expect",
        "                mbarrier_wait(empty(step), parity(step));\n                mbarrier_arrive_expect",
        DEADLOCK,
        slow=True,
    ),
    "wrong parity in the consumer": in_product(
        "cooperative",
        "mbarrier_wait(full(step), parity(step));",
        "mbarrier_wait(full(step), parity(step) ^ 1);",
        RACE,
    ),
    "stage released before its products": in_product(
        "cooperative",
        "if (i > 0) release(step - 1);",
        "if (i + 1 < steps) release(step);",
        RACE,
    ),
    "released on the own CTA only": in_product(
        "cooperative",
        "if (lane() < 2) mbarrier_arrive_cluster(empty(step), lane());",
        "if (lane() == 0) mbarrier_arrive_cluster(empty(step), rank);",
        DEADLOCK,
        slow=True,
    ),
    "released twice on the own CTA": in_product(
        "cooperative",
        "mbarrier_arrive_cluster(empty(step), lane());",
        "mbarrier_arrive_cluster(empty(step), rank);",
        f"{RACE}|completes in a later phase",
        slow=True,
    ),
    "half as many readers": in_product(
        "cooperative", "pingpong ? 8 : 16;", "pingpong ? 4 : 8;", f"{RACE}|more arrivals", slow=True
    ),
    "twice as many readers": in_product("pingpong", "pingpong ? 8 : 16;", "pingpong ? 16 : 32;", DEADLOCK, slow=True),
    "fewer bytes expected": in_product(
        "cooperative",
        "mbarrier_arrive_expect_tx(full(step), Shape::stage_bytes);",
        "mbarrier_arrive_expect_tx(full(step), Shape::stage_bytes - Shape::b_bytes / 2);",
        f"{RACE}|expect_tx too small|more bytes",
    ),
    "no drain at the end": in_product(
        "cooperative",
        "        for (const int end = step + Shape::stages; step < end; ++step) "
        "mbarrier_wait(empty(step), parity(step) ^ 1);\n",
        "",
        ENDED,
    ),
    # That one stage too few is drained, test_hopper_protocol.py sees: it tries all orders.
    "drain of one stage": in_product(
        "cooperative", "end = step + Shape::stages; step", "end = step + 1; step", ENDED, slow=True
    ),
    # --- multicast ---
    "multicast to the first CTA only": in_product(
        "pingpong",
        "map, full(step), k, first, place, 3);",
        "map, full(step), k, first, place, 1);",
        DEADLOCK,
        slow=True,
    ),
    "halves of B change places": in_product(
        "pingpong", "to += rank * (Shape::b_bytes / 2);", "to += (rank ^ 1) * (Shape::b_bytes / 2);", VALUES
    ),
    "both CTAs load the first half of B": in_product(
        "cooperative", "tile.column * Shape::columns + rank * half", "tile.column * Shape::columns", VALUES, slow=True
    ),
    # --- products ---
    "no wait for the previous products": in_product("cooperative", "            wgmma_wait<1>();\n", "", RACE),
    "no wait for the last products": in_product("pingpong", "        wgmma_wait<0>();\n", "", RACE, slow=True),
    "no wgmma_fence": in_product(
        "cooperative", "            wgmma_fence();\n", "", "wgmma without wgmma_fence", slow=True
    ),
    "sums are not begun anew": in_product("cooperative", "of_b, i + k > 0);", "of_b, true);", VALUES, slow=True),
    "sums are begun anew at each step": in_product(
        "cooperative", "of_b, i + k > 0);", "of_b, k > 0);", VALUES, slow=True
    ),
    "wrong leading offset": in_descriptor("cooperative", "kMajor == Major::k ? 16 : atom_bytes", "16", VALUES),
    "wrong stride offset": in_descriptor(
        "pingpong",
        "kMajor == Major::k ? 16 : atom_bytes, 1024)",
        "kMajor == Major::k ? 16 : atom_bytes, 512)",
        VALUES,
        slow=True,
    ),
    "wrong step of 16 k, K-major": in_descriptor(
        "pingpong", "? 32 >> 4 :", "? 64 >> 4 :", f"{VALUES}|{RACE}", slow=True
    ),
    "wrong step of 16 k, MN-major": in_descriptor("cooperative", ": 2048 >> 4;", ": 1024 >> 4;", VALUES, slow=True),
    "wrong step of 64 rows": in_descriptor(
        "pingpong", "rows = atom_bytes >> 4;", "rows = atom_bytes >> 5;", VALUES, slow=True
    ),
    "both warpgroups multiply the same rows": in_product(
        "cooperative", "(Shape::pingpong ? 0 : group * atom_bytes)", "0", VALUES, slow=True
    ),
    # --- turns ---
    "both warpgroups take the same tiles": in_product(
        "pingpong", "turn % 2 != group) continue", "turn % 2 != 0) continue", f"{RACE}|more arrivals", slow=True
    ),
    "no turn to multiply": in_product(
        "pingpong",
        "            if (Shape::pingpong) named_barrier_sync(turn_to_multiply + group, 2 * warpgroup_threads);\n",
        "",
        RACE,
        slow=True,
    ),
    "multiplying is not handed over": in_product(
        "pingpong",
        "                named_barrier_arrive(turn_to_multiply + 1 - group, 2 * warpgroup_threads);\n",
        "",
        DEADLOCK,
        slow=True,
    ),
    "the first turns are nobody's": in_product(
        "pingpong", "if (Shape::pingpong && group == 1) {", "if (Shape::pingpong && group == 2) {", DEADLOCK, slow=True
    ),
    "no last turns": in_product(
        "pingpong", "        if (Shape::pingpong) take_last_turns(group, turn);\n", "", "ends while named barrier"
    ),
    # --- epilogues ---
    "no fence of the proxies before a store": in_product(
        "pingpong", "if (!Epilogue::scatters) fence_proxy_async_shared();", "", VALUES
    ),
    "slot filled while it is read": in_product(
        "pingpong", "if (leads && !Epilogue::scatters) tma_store_wait_read<slots - 1>();", "", RACE, slow=True
    ),
    "slot filled one store too early": in_product(
        "cooperative",
        "Epilogue::scatters) tma_store_wait_read<slots - 1>();",
        "Epilogue::scatters) tma_store_wait_read<slots>();",
        RACE,
        slow=True,
    ),
    "no barrier before a slot is filled": in_product(
        "cooperative",
        "                named_barrier_sync(own_warpgroup + group, warpgroup_threads);\n                const int row",
        "                const int row",
        RACE,
        slow=True,
    ),
    "no barrier before a slot is stored": in_product(
        "cooperative",
        "                named_barrier_sync(own_warpgroup + group, warpgroup_threads);\n                constexpr int",
        "                constexpr int",
        RACE,
        slow=True,
    ),
    "no barrier before a slot is scattered": in_product(
        "scattered",
        "                named_barrier_sync(own_warpgroup + group, warpgroup_threads);\n                constexpr int",
        "                constexpr int",
        RACE,
        slow=True,
    ),
    "the end does not wait for stores": in_product(
        "cooperative",
        "        if (thread_id() % warpgroup_threads == 0 && !Epilogue::scatters) tma_store_wait_read<0>();\n",
        "",
        "before its TMA stores have read shared memory",
        slow=True,
    ),
    # --- rows that the product finds by itself ---
    "no fence of the proxies after a copy": in_product(
        "gathered",
        "        fence_proxy_async_shared();\n        mbarrier_arrive(full(step));",
        "        mbarrier_arrive(full(step));",
        VALUES,
    ),
    "copies are waited for a step too late": in_product(
        "gathered",
        "if (step >= 2) gathered<1>(step - 2);\n                mbarrier",
        "if (step >= 2) gathered<2>(step - 2);\n                mbarrier",
        f"{VALUES}|{RACE}",
    ),
    "the last copies are not waited for": in_product(
        "gathered", "if (step >= 1) gathered<0>", "if (step >= 1) gathered<1>", f"{VALUES}|{RACE}|cp.async", slow=True
    ),
    "tokens of other rows": in_product(
        "gathered", "shuffle(token, lane() / 8 + 4 * i)", "shuffle(token, lane() / 8 * 4 + i)", VALUES, slow=True
    ),
    "copies of rows that are not there": in_product(
        "gathered", "if (own < tile.size) {", "if (own <= tile.size) {", VALUES, slow=True
    ),
    "a wait for fewer threads": in_product(
        "gathered",
        "? 1 + warpgroup_threads : 1",
        "? 1 + warpgroup_threads / 2 : 1",
        f"{VALUES}|{RACE}|more arrivals",
        slow=True,
    ),
    # --- sums in parts, and of rows ---
    "all parts sum up the first rows": in_groups(
        "summed", "tile.k = tile.split * work.steps * step_depth;", "", VALUES, slow=True
    ),
    "parts in the place of the first": in_product(
        "summed", "tile.expert * task.work.splits + tile.split", "tile.expert * task.work.splits", VALUES, slow=True
    ),
    "no fence of the proxies after the ones": in_product(
        "summed",
        "pack<Shape::type>(1.0f, 1.0f));\n            fence_proxy_async_shared();",
        "pack<Shape::type>(1.0f, 1.0f));",
        f"{VALUES}-?nan",
    ),
    "sums of the other warpgroup's rows": in_product(
        "summed", "tile, tile.row + group * 64);", "tile, tile.row + (1 - group) * 64);", VALUES, slow=True
    ),
    # --- two products in one launch ---
    "rows are given over before they are there": in_product(
        "joined",
        "        tma_store_wait<0>();\n        fence_proxy_async_global();\n        add",
        "        add",
        VALUES,
    ),
    "rows are taken over too early": in_product(
        "joined",
        "        while (load_acquire(flag) < there) back_off();\n",
        "",
        f"{VALUES}|race: reads in global memory",
    ),
    "a tile too few is waited for": in_product(
        "joined",
        "while (load_acquire(flag) < there)",
        "while (load_acquire(flag) + 1 < there)",
        f"{VALUES}|race: reads in global memory",
        slow=True,
    ),
    "a flag is left": in_product(
        "joined", "        if (fetch_add(flag, 1) == last) store_global_u32(flag, 0);\n", "", VALUES, slow=True
    ),
    "the permutation is read before its rows": in_product(
        "joined",
        "if (kPart != Part::second) epilogue.begin(tile);",
        "epilogue.begin(tile);",
        f"{VALUES}|race: reads in global memory",
        slow=True,
    ),
    "the second product begins in the first one's memory": in_product(
        "joined",
        "        cluster_sync();\n    }\n\n    __device__ __forceinline__ void run() const {\n        if",
        "    }\n\n    __device__ __forceinline__ void run() const {\n        if",
        f"{RACE}|{VALUES}",
    ),
    # --- what slices read beside the product ---
    "no wait for what a slice reads": in_product(
        "backward",
        "                if (Epilogue::inputs > 0) mbarrier_wait(input_full(group, count), input_parity(count));\n",
        "",
        f"{VALUES}|{RACE}|more arrivals",
    ),
    "what a slice reads is released before": in_product(
        "backward",
        "                if (Epilogue::inputs > 0) mbarrier_wait(input_full(group, count), input_parity(count));\n",
        "                if (Epilogue::inputs > 0) mbarrier_wait(input_full(group, count), input_parity(count));\n"
        "                if (Epilogue::inputs > 0 && lane() == 0) mbarrier_arrive(input_empty(group, count));\n",
        f"{VALUES}|{RACE}|more arrivals",
        slow=True,
    ),
    "slices in another order": in_product(
        "backward", "tile.row + i % Shape::blocks * 64", "tile.row + (1 - i % Shape::blocks) * 64", VALUES, slow=True
    ),
    "the other warpgroup's blocks": in_product(
        "backward", "const int group = turn % 2;", "const int group = 1 - turn % 2;", f"{VALUES}|{DEADLOCK}", slow=True
    ),
    "wrong registers of a tile": in_epilogue(
        "cooperative",
        "put_columns<kType>(slot, j, d + 8 * j);",
        "put_columns<kType>(slot, j, d + 8 * (j ^ 1));",
        VALUES,
        slow=True,
    ),
    "wrong registers of hidden": in_epilogue(
        "pingpong",
        "biases.add(pre + 4 * h, d + 8 * j + 4 * h, n",
        "biases.add(pre + 4 * h, d + 8 * j + 4 * (1 - h), n",
        VALUES,
        slow=True,
    ),
    "rows of another expert": in_epilogue(
        "scattered", "targets[i] = row < tile.size ?", "targets[i] = row <= tile.size ?", VALUES
    ),
    "rows without their expert's start": in_epilogue(
        "scattered", "choice(tile.start + row) : -1", "choice(row) : -1", VALUES, slow=True
    ),
    "bias of another column tile": in_epilogue(
        "scattered", "const int column = tile.column * kColumns + i;", "const int column = i;", VALUES, slow=True
    ),
    "bias of another column": in_epilogue("scattered", "(column + own_column()));", "column);", VALUES, slow=True),
    "wrong swizzle in a slot": in_epilogue(
        "cooperative",
        "(lane & 15), 2 * j + (lane >> 4));",
        "(lane & 15), 2 * j + (lane >> 3 & 1));",
        VALUES,
        slow=True,
    ),
}


PROGRAMS = sorted({fault.program for fault in FAULTS.values()})


@pytest.fixture
def run(tmp_path):
    """`run(program, mode)`: a program of hopper_faults.cpp, with the source in the folder `csrc` of the test."""
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "hopper", source / "hopper")
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, source)

    def run_program(program, mode):
        binary = tmp_path / program
        if not binary.exists():
            # An edit may leave something unused.
            command = [compiler(), *flags(source), "-Wno-error", f"-DPROGRAM={program}"]
            subprocess.run([*command, MODEL / "hopper_faults.cpp", "-o", binary], check=True)
        result = subprocess.run([binary, mode, str(SEEDS)], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        said = result.stdout.splitlines()
        assert len(said) == SEEDS
        return said

    return run_program


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_it_is(program, run):
    assert {mode: run(program, mode) for mode in MODES} == {mode: [""] * SEEDS for mode in MODES}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=name, marks=[pytest.mark.slow] * fault.slow) for name, fault in FAULTS.items()],
)
def test_fault(fault, run, tmp_path):
    file = tmp_path / "csrc/hopper" / fault.file
    text = file.read_text()
    assert text.count(fault.text) == 1, "the source has changed: plant the fault anew"
    file.write_text(text.replace(fault.text, fault.instead))
    said = {}
    for mode in MODES:
        said[mode] = run(fault.program, mode)
        assert [what for what in said[mode] if what and not re.search(fault.shows, what)] == []
        if all(said[mode]):
            return
    pytest.fail(f"not found: {said}")
