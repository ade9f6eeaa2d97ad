"""Tables: in the terminal, and from the committed JSON in README.md and docs/performance.md, which `python -m
benchmarks.report` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import experts, host, peers
from benchmarks.cases import PHASES

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
MAKER = "python -m benchmarks.report"  # of the tables
# The page's columns, of which a device has those that were measured.
COLUMNS = (peers.BMM, f"{peers.BMM}, compiled", "grouped_mm", peers.LOOP, peers.DENSE)

Run = dict[str, Any]


def milliseconds(timing: Any) -> str:
    return f"{timing['median']:.3g}"


def spread(timing: Any) -> str:
    return f"{timing['p20']:.3g}–{timing['p80']:.3g}"


# --- in the terminal ---


def print_run(run: Run, console: Console) -> None:
    """All tables of a run."""
    if run.get("floors"):
        floors = run["floors"]
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in floors["matrix_rates"].items())
        console.print(f"floors: large product {rates}; copy {floors['copy_rate'] / 1e9:.4g} GB/s")
    if run.get("layer"):
        for group in cases_of(run).values():
            measured = any("why_not" not in r for r in group)
            head = f"{group[0]['case']}, {group[0]['dtype']}"
            console.print(layer_table(group) if measured else escape(f"{head}: {group[0]['why_not']}"))
        console.print(ratio_table(run))
    if run.get("experts"):
        console.print(experts_table(run["experts"]), targets_table(run))
    if run.get("training_step"):
        console.print(step_table(run["training_step"]))
    if run.get("host"):
        console.print(host.table(run["host"]))


def measured_cases(run: Run) -> dict[tuple[str, str], list[Run]]:
    """Those of `cases_of` of which anything was measured."""
    return {case: group for case, group in cases_of(run).items() if any("why_not" not in r for r in group)}


def cases_of(run: Run) -> dict[tuple[str, str], list[Run]]:
    """A run's layer results by case and dtype."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for result in run.get("layer", ()):
        groups.setdefault((result["case"], result["dtype"]), []).append(result)
    return groups


def layer_table(results: list[Run]) -> Table:
    head = results[0]
    launches = any("launches" in r for r in results)
    columns = ["forward ms", "p20–p80", "backward ms", "p20–p80", "both ms", "TFLOP/s", "of floor", "MB", "first s"]
    if launches:
        columns += ["launches", "host ms"]
    table = Table("peer", *columns, title=f"{head['case']}, {head['dtype']}: {head['sizes']}")
    reasons: dict[str, list[str]] = {}
    for r in results:
        if "why_not" in r:
            reasons.setdefault(r["why_not"], []).append(r["peer"])
            continue
        row = [text for phase in PHASES[:2] for text in (milliseconds(r[phase]), spread(r[phase]))]
        row += [milliseconds(r["both"]), f"{r['both']['tflops']:.3g}", f"{r['both']['of_floor']:.0%}"]
        row += [f"{r['peak_bytes'] / 1e6:.1f}", f"{r['first_call_s']:.2f}"]
        if launches:
            row += [str(r["launches"]), f"{r['host_ms']:.2f}"]
        table.add_row(r["peer"], *row, style="bold" if r["peer"] == peers.OURS else "")
    table.caption = "\n".join(escape(f"{', '.join(names)}: {reason}") for reason, names in reasons.items())
    return table


def ratios(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, {phase: what this package takes ÷ what eager bmm takes in the same round}) where both were measured."""
    for (case, dtype), results in cases_of(run).items():
        for r in results:
            if r["peer"] == peers.OURS and "to_bmm" in r.get("both", ()):
                yield f"{case}, {dtype}", {phase: r[phase]["to_bmm"] for phase in PHASES}


def ratio_table(run: Run) -> Table:
    """Missed is what four rounds of five say is missed."""
    table = Table("case", *PHASES, "p20–p80", "", title=f"{peers.OURS} ÷ {peers.BMM} (eager); goal: at most 1")
    for case, ratio in ratios(run):
        both = ratio["both"]
        verdict = "missed" if both["p20"] > 1 else "" if both["median"] <= 1 else "level"
        table.add_row(case, *(f"{ratio[phase]['median']:.2f}" for phase in PHASES), spread(both), verdict)
    return table


def experts_table(results: list[Run]) -> Table:
    table = Table("operation", "variant", "ms", "p20–p80", "GB/s", title=str(results[0]["case"]))
    for r in results:
        table.add_row(r["operation"], r["variant"], milliseconds(r), spread(r), f"{r['gigabytes_per_second']:.1f}")
    return table


def targets_table(run: Run) -> Table:
    table = Table("variant", "÷", "measured", "target")
    for target, ratio in experts.against_targets(run["experts"], run["environment"]["kind"]):
        table.add_row(target.variant, target.baseline, f"{ratio:.3f}", f"at most {target.ratio:.3f}")
    return table


def step_table(results: list[Run]) -> Table:
    table = Table("ViT", "training step", "ms", "p20–p80", "÷ untouched", "GB", "first s", title="Training step")
    for r in results:
        if "why_not" in r:
            table.add_row(r["case"], r["variant"], escape(r["why_not"]))
            continue
        last = (f"{r['ratio']:.2f}", f"{r['peak_bytes'] / 1e9:.2f}", f"{r['first_call_s']:.1f}")
        table.add_row(r["case"], r["variant"], milliseconds(r), spread(r), *last)
    return table


# --- in README.md and docs/performance.md ---


def committed(folder: Path = RESULTS) -> list[Run]:
    """The runs whose JSON is in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [run for run in found if isinstance(run, dict) and "layer" in run]


def markdown(runs: list[Run]) -> str:
    """All tables of all runs."""
    if not runs:
        return "No result is committed; `make bench` measures and fills this in."
    return "\n\n".join(block for run in runs for block in _blocks(run))


def _blocks(run: Run) -> Iterator[str]:
    yield _stamp(run)
    if "note" in run:
        yield run["note"]
    groups = measured_cases(run)
    columns = [c for c in COLUMNS if any(r["peer"] == c and "why_not" not in r for g in groups.values() for r in g)]
    if groups:
        head = ("forward and backward, ms", peers.OURS, *columns, "÷ bmm", "of floor", "memory ÷ bmm")
        yield _table([head, *(_row(case, group, columns) for case, group in groups.items())])
    steps = [r for r in run.get("training_step", ()) if "why_not" not in r]
    if steps:
        columns_of_step = ("training step", "variant", "ms", "÷ untouched", "peak memory, GB")
        rows = [
            (r["case"], r["variant"], milliseconds(r), f"{r['ratio']:.2f}", f"{r['peak_bytes'] / 1e9:.2f}")
            for r in steps
        ]
        yield _table([columns_of_step, *rows])
    if run.get("experts"):
        passes = ("operation", "variant", "ms", "GB/s")
        variants = [
            (r["operation"], r["variant"], milliseconds(r), f"{r['gigabytes_per_second']:.0f}") for r in run["experts"]
        ]
        yield _table([passes, *variants])


def _row(case: tuple[str, str], group: list[Run], columns: list[str]) -> tuple[str, ...]:
    measured = _by_peer(group)
    ours, bmm = measured.get(peers.OURS), measured.get(peers.BMM)
    ratio = of_floor = memory = "–"
    if ours is not None:
        of_floor = f"{ours['both']['of_floor']:.0%}"
    if ours is not None and bmm is not None and "to_bmm" in ours["both"]:
        ratio = f"{ours['both']['to_bmm']['median']:.2f} ({spread(ours['both']['to_bmm'])})"
        memory = f"{ours['peak_bytes'] / bmm['peak_bytes']:.2f}"
    return (", ".join(case), *_times(measured, (peers.OURS, *columns)), ratio, of_floor, memory)


def _by_peer(group: list[Run]) -> dict[str, Run]:
    """What was measured of a case."""
    return {r["peer"]: r for r in group if "why_not" not in r}


def _times(measured: dict[str, Run], names: Sequence[str]) -> list[str]:
    """Of forward and backward."""
    return [milliseconds(measured[name]["both"]) if name in measured else "–" for name in names]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *body))


def headline(runs: list[Run]) -> str:
    """A row for each thing that was measured, a column for each run: the least and the greatest ratio of all cases."""
    head = ("ratio of times", *(_where(run) for run in runs))
    rows = [
        ("the layer, forward and backward ÷ gather–bmm–scatter", *(_range(_to_peer(run, peers.BMM)) for run in runs)),
        ("the same ÷ the dense FFN", *(_range(_to_peer(run, peers.DENSE)) for run in runs)),
        ("a small ViT's training step ÷ without experts", *(_range(_of_step(run)) for run in runs)),
        ("averaging ÷ a copy of as much memory", *(_range(_of_averaging(run)) for run in runs)),
    ]
    return _table([head, *rows])


def _stamp(run: Run) -> str:
    where = run["environment"]
    torch = where["versions"]["torch"]
    return f"**{_where(run)}**, PyTorch {torch}, commit `{where['commit']}`, {where['date']}."


def _where(run: Run) -> str:
    where = run["environment"]
    threads = f", {where['threads']} threads" if where["kind"] == "cpu" else ""
    return f"{where['device']}{threads}"


def _range(ratios: list[float]) -> str:
    if not ratios:
        return "not measured"
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))


def _to_peer(run: Run, peer: str) -> list[float]:
    """Of each case but float16, which few CPUs multiply."""
    measured = [_by_peer(group) for (_, dtype), group in measured_cases(run).items() if dtype != "fp16"]
    both = [(of[peers.OURS]["both"], of[peer]["both"]) for of in measured if {peers.OURS, peer} <= of.keys()]
    return [ours["median"] / theirs["median"] for ours, theirs in both]


def _of_step(run: Run) -> list[float]:
    return [r["ratio"] for r in run.get("training_step", ()) if "ratio" in r and r["ratio"] != 1]


def _of_averaging(run: Run) -> list[float]:
    taken = {r["variant"]: r["median"] for r in run.get("experts", ()) if r["operation"] == "averaging"}
    return [taken["one pass"] / taken["copy_"]] if {"one pass", "copy_"} <= taken.keys() else []


def summary(runs: list[Run]) -> str:
    """A short table for each run: ours beside gather–bmm–scatter and the dense FFN."""
    blocks = []
    for run in runs:
        blocks.append(_stamp(run))
        rows: list[tuple[str, ...]] = [("forward and backward, ms", peers.OURS, peers.BMM, peers.DENSE)]
        for case, group in measured_cases(run).items():
            rows.append((", ".join(case), *_times(_by_peer(group), rows[0][1:])))
        blocks.append(_table(rows))
    return "\n\n".join(blocks)


def write(readme: Path = README, page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Puts the tables between their markers.

    Raises:
        ValueError: a marker is missing.
    """
    runs = committed(folder)
    fill(readme, "headline", headline(runs))
    fill(readme, "benchmarks", summary(runs))
    fill(page, "benchmarks", markdown(runs))


def between(path: Path, name: str, maker: str = MAKER) -> tuple[str, str, str]:
    """What a page has before, between and behind the markers of that name, with the markers."""
    begin, end = f"<!-- {name}: made by {maker} -->\n", f"\n<!-- end of {name} -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path.name} must have the lines {begin.strip()!r} and {end.strip()!r}")
    before, rest = text.split(begin)
    filled, behind = rest.split(end)
    return before + begin, filled, end + behind


def fill(path: Path, name: str, text: str, maker: str = MAKER) -> None:
    before, _, behind = between(path, name, maker)
    path.write_text(f"{before}\n{text}\n{behind}")


if __name__ == "__main__":
    write()
