"""What is wrong with compiled code that no interpreter would notice, as far as its text shows it."""

from __future__ import annotations

import re


def hand_off_problems(ptx: str) -> list[str]:
    """What is wrong with how programs hand results to one another: it must be stores, barrier, release.

    Triton puts no barrier before a release, and no interpreter would notice.
    """
    found = []
    last = ""
    for line in ptx.splitlines():
        if re.search(r"\bst\.global|\bbar\.sync|\bbarrier\.sync", line):
            last = line
        elif re.search(r"\batom\.\S*(acq_rel|release)", line) and "st.global" in last:
            found.append(f"no barrier between a store and a release: {line.strip()}")
    return found


def sum_problems(ttgir: str, is_expected: bool = False) -> list[str]:
    """What may make sums in memory differ from run to run: one thread must store each, and then add to it.

    That is so where all operations have one and the same address, and so one layout.
    """
    pattern = r"(?:atomic_rmw fadd,[^%]*|tt\.store )(%[\w$.#-]+),.*!tt\.ptr<f32>, "
    added = {match[1] for match in re.finditer(pattern, ttgir) if "fadd" in match[0]}
    stored = {match[1] for match in re.finditer(pattern, ttgir) if "fadd" not in match[0]}
    if is_expected and not added:
        return ["no sum in memory was found"]
    return [f"{address} is added to, but not stored by the same threads" for address in sorted(added - stored)]
