"""The barriers of csrc/hopper/product.cuh in every order that things may happen in: no deadlock, no stage overwritten
while it is read, no arrival too many, nothing sent to a CTA that has ended. And faults of the protocol are found.

`cuda_on_host/hopper_protocol.cpp` says what `product.cuh` does in lists of operations; that they agree is for readers.
"""

import itertools
import re
import subprocess

import pytest
from host_model import MODEL, compiler

SOURCE = MODEL / "hopper_protocol.cpp"
FORMS = ("cooperative", "pingpong")
TILES, STEPS = range(1, 6), range(1, 5)
OVERWRITTEN = "overwritten while it is read|reads what is not there yet|two loads to one place"

# How a fault shows, and in which forms. "releases on the own CTA only": and waits for the own CTA's readers only.
FAULTS = {
    "no drain": ("to a CTA that has ended|at a CTA that has ended", FORMS),
    "drain of all stages but one": ("to a CTA that has ended|at a CTA that has ended", FORMS),
    "releases before its products": (OVERWRITTEN, FORMS),
    "releases on the own CTA only": (f"{OVERWRITTEN}|deadlock", FORMS),
    "last stage is not released": ("deadlock", FORMS),
    "twice as many readers": ("deadlock", FORMS),
    "expects its own bytes only": (OVERWRITTEN, FORMS),
    "sends B to itself only": ("deadlock", FORMS),
    "wrong parity in the producer": ("deadlock", FORMS),
    "a CTA sits out the last tile": ("deadlock|has ended", FORMS),
    "no turns": (f"{OVERWRITTEN}|both multiply|both store", ("pingpong",)),
    "first turns are nobody's": ("deadlock", ("pingpong",)),
    "no last turns": ("ends with an arrival at a named barrier", ("pingpong",)),
}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """`search(settings)`: what is said of each, (stages, tiles, steps of a tile, form) and maybe a fault."""
    binary = tmp_path_factory.mktemp("protocol") / "search"
    command = [compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", binary]
    subprocess.run(command, check=True)

    def run(settings, *options):
        lines = "".join(" ".join(map(str, setting)) + "\n" for setting in settings)
        result = subprocess.run([binary, *options], input=lines, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        states, said = zip(*(line.split(" states: ") for line in result.stdout.splitlines()), strict=True)
        assert len(said) == len(settings)
        print(f"{sum(map(int, states))} states")
        return list(said)

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_all_orders_are_right(stages, form, search):
    # More tiles of four stages by both warpgroups together: below.
    tiles = range(1, 3) if (stages, form) == (4, "cooperative") else TILES
    settings = [(stages, *rest, form) for rest in itertools.product(tiles, STEPS)]
    assert search(settings) == [""] * len(settings)


@pytest.mark.slow
def test_all_orders_of_more_tiles_are_right(search):
    settings = [(4, *rest, "cooperative") for rest in itertools.product(range(3, 6), STEPS)]
    assert search(settings) == [""] * len(settings)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, search):
    """Shows as itself wherever it does, and does so with each number of stages."""
    expected, forms = FAULTS[fault]
    for form, stages in itertools.product(forms, (2, 3, 4)):
        tiles, steps = (3, 4) if form == "pingpong" else (2, 3)
        said = search([(stages, tiles, steps, form, fault)])[0]
        assert re.search(expected, said), f"{stages} stages, {form}: {said or 'nothing'}"


def test_nothing_is_lost_by_what_is_left_out(search):
    """Where all states can be visited, they say what those that are visited do."""
    settings = [(2, *rest, form) for rest in itertools.product((1, 2), (1, 2)) for form in FORMS]
    settings += [(2, 2, 2, form, fault) for fault, (_, forms) in FAULTS.items() for form in forms]
    found = [said != "" for said in search(settings)]
    assert [said != "" for said in search(settings, "--all")] == found
