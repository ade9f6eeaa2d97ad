"""The harness's own rules: a wrong variant gets no time, the timer sees what a variant does, nobody is dropped."""

import json
import math
import re
import time
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import experts, floors, growth, host, layer, plot, report, run, scaling, timing, training_step
from benchmarks.cases import CPU_CASES, GPU_CASES, PHASES, QUICK_CASES, Case, cases
from benchmarks.parity import Gate, WrongResultError
from benchmarks.peer import Peer, choices_of
from benchmarks.peers import BMM, DENSE, LOOP, OURS, peers
from benchmarks.problem import SEED, make

TINY = Case("tiny", 64, 16, 32)
TINY_ROUTED = Case("tiny, routed", 50, 16, 24, 5, top_k=2, activation="silu", gated=True, bias=False)
FLOORS = floors.Floors({"fp32": 1e12, "bf16": 1e12, "fp16": 1e12}, 1e10)


def by_name(name):
    return next(peer for peer in peers() if peer.name == name)


def measure(case, chosen, seconds=0.0):
    return {r["peer"]: r for r in layer.run(case, "cpu", chosen, seconds)}


# --- parity ---


@pytest.mark.parametrize("case", [TINY, TINY_ROUTED, replace(TINY, dtype=torch.bfloat16), replace(TINY, gated=True)])
def test_every_peer_that_runs_here_is_right(case):
    case = replace(case, activation="silu") if case.gated else case
    results = measure(case, peers())
    assert list(results) == [peer.name for peer in peers()]
    measured = {name for name, r in results.items() if "why_not" not in r}
    assert {OURS, BMM, "grouped_mm", LOOP} <= measured
    assert (DENSE in measured) == (case.top_k is None)
    assert not any(r.get("why_not", "").startswith("wrong") for r in results.values())


@pytest.mark.parametrize("spoil", ["output", "gradient", "shape", "one row", "NaN", "zeros"])
@pytest.mark.parametrize("case", [TINY, TINY_ROUTED], ids=str)
def test_a_wrong_variant_is_refused_a_time(case, spoil):
    right = by_name(OURS).build(case)

    def wrong(problem, seed):
        y = right(problem, seed)
        if spoil == "output":
            return y * 1.001
        if spoil == "gradient":
            return y + 0.01 * (problem.x - problem.x.detach())
        if spoil == "shape":
            return y[None]
        factor = torch.ones_like(y)
        factor[7 if spoil == "one row" else slice(None)] = 0
        return y * (factor if spoil != "NaN" else float("nan"))

    gate = Gate(make(case, "cpu"))
    gate.check(right, make(case, "cpu"))
    results = measure(case, [by_name(OURS), Peer("wrong", lambda case: wrong)])
    assert "forward" in results[OURS]
    assert set(PHASES).isdisjoint(results["wrong"])
    # A wrong shape makes autograd raise, which is a reason as well.
    assert re.match(r"wrong: |RuntimeError: " if spoil == "shape" else "wrong: ", results["wrong"]["why_not"])


def test_another_deal_is_wrong():
    case = replace(TINY, num_tokens=200)

    def other(problem, seed):
        return by_name(OURS).build(case)(problem, 4)

    with pytest.raises(WrongResultError, match="wrong: y errs by"):
        Gate(make(case, "cpu")).check(other, make(case, "cpu"))


def test_wrong_averaging_is_refused():
    with pytest.raises(AssertionError, match="not timed"):
        experts.check("wrong", lambda tensors: [t.mul_(0.999) for t in tensors], "cpu")


def test_a_vit_whose_experts_compute_something_else_is_refused(monkeypatch):
    small = training_step.StepCase("tiny", 2, 32, {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2})
    spoil = training_step.with_experts

    def spoiled(model):
        model = spoil(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.1
        return model

    monkeypatch.setattr(training_step, "with_experts", spoiled)
    (result,) = training_step.run(small, "cpu", 0.0, compiling=False)
    assert result["why_not"].startswith("wrong: the loss is")


# --- timing ---


def test_a_variant_that_sleeps_is_seen_slower_by_what_it_sleeps():
    watch = timing.Stopwatch("cpu")
    variants = {"quick": timing.timed(lambda: None, watch), "slow": timing.timed(lambda: time.sleep(0.02), watch)}
    timings = timing.interleaved(variants, 0.0)
    (quick,), (slow,) = timings["quick"], timings["slow"]
    assert slow.p20 <= slow.median <= slow.p80
    assert 20 <= slow.median - quick.median < 60


def test_a_peer_that_sleeps_in_its_forward():
    right = by_name(OURS).build(TINY)

    def slow(problem, seed):
        time.sleep(0.03)
        return right(problem, seed)

    result = measure(TINY, [Peer("slow", lambda case: slow)])["slow"]
    assert result["forward"]["median"] >= 30
    assert result["both"]["median"] >= result["forward"]["median"]


def test_rounds_go_on_for_the_time_given():
    calls = []
    variants = {name: timing.timed(lambda name=name: calls.append(name), timing.Stopwatch("cpu")) for name in "abc"}
    assert timing.interleaved(variants, 0.0)["a"][0].rounds == timing.MIN_ROUNDS
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns[1:])) > 1, "each round should have an order of its own"
    assert timing.interleaved(variants, 60.0)["a"][0].rounds == timing.MAX_ROUNDS


def test_peak_memory_counts_what_is_held_at_a_time():
    x = torch.ones(1000)

    def call():
        a = x + 1
        b = a + 1
        del a
        return float((b + 1).sum())

    assert 8000 <= timing.peak_bytes(call, "cpu") < 9000


# --- who takes part ---


def test_a_peer_that_cannot_do_a_case_appears_with_its_reason():
    results = measure(TINY, peers())
    assert results[f"{OURS}, split form"]["why_not"] == "for CUDA devices"
    assert results["Liger fused MoE"]["why_not"] == "gated only (SwiGLU)"
    assert results["quack MLP"]["why_not"] == "no bias"
    assert results[f"{DENSE}, compiled"]["why_not"] == "not compiled here, for want of time"
    assert measure(replace(TINY, num_tokens=63), peers())[BMM]["why_not"] == "T must be a multiple of E"
    assert measure(TINY_ROUTED, peers())["ScatterMoE"]["why_not"] in ("not installed", "for CUDA devices")
    assert "an FFN has not the work" in measure(TINY_ROUTED, peers())[DENSE]["why_not"]


def test_a_peer_that_raises_does_not_end_the_run():
    def broken(problem, seed):
        raise RuntimeError("no such kernel\nand more")

    results = measure(TINY, [Peer("broken", lambda case: broken), by_name(OURS)])
    assert results["broken"]["why_not"] == "RuntimeError: no such kernel"
    assert "forward" in results[OURS]


def test_libraries_that_know_routed_layers_alone_get_the_same_deal():
    case = replace(TINY, num_tokens=63)
    problem = make(case, "cpu")
    choices = choices_of(problem, SEED)
    assert choices.unique(return_counts=True)[1].max() == 16
    routed = replace(problem, case=replace(case, top_k=1), choices=choices, routing_weights=torch.ones(63, 1))
    routed.routing_weights.requires_grad_()
    dealt, chosen = (by_name(LOOP).build(case)(p, SEED) for p in (problem, routed))
    torch.testing.assert_close(chosen, dealt)


def test_every_library_can_do_some_case_on_a_gpu():
    """Nobody is in the list who never takes part: what else than the machine keeps a peer from all cases?"""
    machine = ("not installed", "for CUDA devices", "for compute capability", "cannot be imported", "this PyTorch")
    for peer in peers():
        reasons = [peer.why_not(case, "cpu") for case in cases("cuda")]
        assert any(reason is None or reason.startswith(machine) for reason in reasons), (peer.name, reasons)


def test_cases():
    names = {case.name for case in GPU_CASES}
    assert {"ViT-S", "ViT-B", "ViT-L", "Swin stage 1", "DINOv2-g", "Point-MAE", "routed, 8 experts, top 2"} <= names
    assert {case.dtype for case in cases("cuda")} == {case.dtype for case in CPU_CASES}
    # Eager bmm can do all: the ratio to it is printed for each.
    assert all(by_name(BMM).why_not(case, "cpu") is None for case in CPU_CASES)
    assert growth.SIZES["cuda"][-1] * 1536 > 2**31
    case = Case("", 10, 3, 5, 2, gated=True)
    assert case.operations("both") == 3 * 2 * 10 * 3 * 15
    assert case.least_bytes("forward") == 4 * (2 * 30 + 100 + 90)
    assert FLOORS.seconds(case, "forward") == case.least_bytes("forward") / FLOORS.copy_rate
    assert FLOORS.best(floors.Floors({"fp32": 2e12}, 1e9)) == floors.Floors(FLOORS.matrix_rates | {"fp32": 2e12}, 1e10)
    fast_memory = floors.Floors({"fp32": 1e3}, 1e12)
    assert fast_memory.seconds(case, "both") == pytest.approx(case.operations("both") / 1e3)
    slow_halves = floors.Floors({"fp16": 1e2, "fp32": 1e3}, 1e12)
    assert slow_halves.seconds(replace(case, dtype=torch.float16), "both") == fast_memory.seconds(case, "both")


# --- results ---


@pytest.fixture(scope="module")
def tiny_run():
    """A real one, of everything."""
    patch = pytest.MonkeyPatch()
    vit = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    patch.setattr(training_step, "CPU_CASES", (training_step.StepCase("tiny ViT", 2, 32, vit),))
    patch.setattr(growth, "SIZES", {"cpu": (16, 32)})
    patch.setattr(floors, "MATRIX_SIZE", {"cpu": 64})
    patch.setattr(floors, "COPY_BYTES", {"cpu": 2**16})
    patch.setitem(run.RESERVE_FOR_COMPILING, "training_step", 2.0)
    patch.setattr(run, "RESERVE", dict.fromkeys(run.RESERVE, -math.inf))  # however slow the machine is
    patch.setattr(experts, "SHAPES", ((24, 8), (24,)))
    yield run.run("cpu", 2.0, chosen=[TINY, TINY_ROUTED])
    patch.undo()


def test_a_run_is_stamped_and_has_all_sections(tiny_run):
    where = tiny_run["environment"]
    assert {"commit", "date", "device", "kind", "clocks", "threads", "versions"} <= set(where)
    assert {"python", "torch", "ewa_kernels"} <= set(where["versions"])
    assert {"floors", "layer", "experts", "training_step", "growth", "host"} <= set(tiny_run)
    assert len(tiny_run["layer"]) == 2 * len(peers())
    ours = next(r for r in tiny_run["layer"] if r["peer"] == OURS)
    assert {"median", "p20", "p80", "tflops", "floor", "of_floor"} <= set(ours["both"])
    assert ours["peak_bytes"] > 0
    assert ours["first_call_s"] > 0
    assert {r["variant"] for r in tiny_run["experts"]} >= {"copy_", "one pass", "_foreach_*", "torch's fused AdamW"}
    step = {r["variant"]: r for r in tiny_run["training_step"]}
    assert step["untouched"]["ratio"] == 1
    assert step["experts, AdamW and averaging in one pass"]["peak_bytes"] > step["untouched"]["peak_bytes"]
    assert "want of time" in step["untouched, compiled"]["why_not"]
    assert [r["num_tokens"] for r in tiny_run["growth"]] == [16, 16, 32, 32]


def test_when_time_is_short_cases_are_named_and_left_out():
    result = run.run("cpu", 0.0, ["layer", "training_step", "growth"], [TINY])
    assert [r["why_not"] for r in result["layer"]] == ["left out, for want of time"]
    assert result["training_step"][0]["why_not"] == "left out, for want of time"
    assert "growth" not in result


def test_ratios_are_of_the_same_round():
    """A machine that is twice as slow in some rounds changes none of them."""
    slow = [1, 2, 1, 2, 1]
    (ratio,) = timing.ratios([(3 * s,) for s in slow], [(2 * s,) for s in slow])
    assert ratio == timing.Timing(1.5, 1.5, 1.5, 5)
    run = {"layer": []}
    for case, p20, median in (("fast", 0.8, 0.9), ("as fast", 0.9, 1.01), ("slow", 1.01, 1.02)):
        phase = {"to_bmm": {"p20": p20, "median": median, "p80": 1.2}}
        run["layer"].append({"case": case, "dtype": "fp32", "peer": OURS, **dict.fromkeys(PHASES, phase)})
    assert list(report.ratio_table(run).columns[-1].cells) == ["", "level", "missed"]


def test_report_and_pictures(tiny_run, tmp_path):
    from rich.console import Console

    console = Console(width=160, record=True)
    report.print_run(tiny_run, console)
    text = console.export_text()
    for word in (OURS, BMM, "not installed", "goal: at most 1", "÷ untouched", "TFLOP/s", "copy_"):
        assert word in text
    assert [case for case, _ in report.ratios(tiny_run)] == ["tiny, fp32", "tiny, routed, fp32"]
    written = plot.draw(tiny_run, tmp_path / "device")
    assert [path.name for path in written] == ["device.png", "device-step.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_pictures_of_a_run_in_which_nothing_was_measured(tmp_path):
    result = run.run("cpu", 0.0, ["layer"], [TINY])
    assert plot.draw(result, tmp_path / "device") == []


def test_tables_are_what_the_json_says(tiny_run, tmp_path):
    (tmp_path / "device.json").write_text(json.dumps(tiny_run))
    (tmp_path / "other.json").write_text(json.dumps({"results": []}))
    readme, page = tmp_path / "README.md", tmp_path / "performance.md"
    empty = "<!-- {0}: made by python -m benchmarks.report -->\nold\n<!-- end of {0} -->\n"
    readme.write_text(f"before\n{empty.format('headline')}{empty.format('benchmarks')}after\n")
    page.write_text(f"before\n{empty.format('benchmarks')}after\n")
    report.write(readme, page, tmp_path)
    texts = readme.read_text(), page.read_text()
    for text in texts:
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert f"commit `{tiny_run['environment']['commit']}`" in text
        assert tiny_run["environment"]["device"] in text
    ours, dense = (next(r for r in tiny_run["layer"] if r["peer"] == name)["both"] for name in (OURS, DENSE))
    assert f"| {ours['to_bmm']['median']:.2f} ({report.spread(ours['to_bmm'])}) |" in texts[1]
    ratio = ours["median"] / dense["median"]
    assert f"| the same ÷ the dense FFN | {ratio:.2f} |" in texts[0]
    report.write(readme, page, tmp_path)
    assert (readme.read_text(), page.read_text()) == texts
    with pytest.raises(ValueError, match="must have the lines"):
        report.write(tmp_path / "device.json", page, tmp_path)


def test_all_pages_are_what_the_committed_json_says():
    runs = report.committed()
    for path, name, made in (
        (report.README, "headline", report.headline(runs)),
        (report.README, "benchmarks", report.summary(runs)),
        (report.PAGE, "benchmarks", report.markdown(runs)),
    ):
        _, found, _ = report.between(path, name)
        assert found.strip() == made, "python -m benchmarks.report writes it"
    assert scaling.PAGE.read_text() == scaling.page(runs), "python -m benchmarks.scaling writes it"


def test_scaling_page_takes_what_a_gpu_has_measured():
    without = scaling.page([])
    assert "nothing below is measured" in without
    assert "| (m) |" not in without
    both = {"tflops": 321.0}
    layers = [{"case": "DINOv2-g", "dtype": "bf16", "peer": name, "both": both} for name in (OURS, DENSE)]
    gpu = {
        "environment": {"kind": "cuda"},
        "floors": asdict(floors.Floors({"bf16": 654e12}, 3e12)),
        "layer": layers,
    }
    text = scaling.page([{"environment": {"kind": "cpu"}}, gpu])
    assert "| a large bf16 product | 654 TFLOP/s | (m) |" in text
    assert text.count("321 TFLOP/s | (m)") == 2
    assert "nothing below is measured" not in text


def test_host_time_is_measured_beside_what_it_is_compared_with(tiny_run):
    """Each limit is of something that was measured, on a CPU or, with launches that are real, on a GPU."""
    rows = {(row["case"], row["variant"]): row for row in tiny_run["host"]}
    assert {(limit.case, limit.variant) for limit in host.LIMITS} <= set(rows)
    for baseline in (("forward", host.DENSE), ("eval", host.DENSE), ("optimizer step", host.FUSED)):
        assert rows[baseline]["ratio"]["median"] == 1
    assert all(0 < row["microseconds"]["median"] < 1e6 for row in rows.values())
    # What is stubbed computes nothing, and so takes less than what does.
    assert rows["forward", host.STUBBED]["microseconds"]["p20"] < rows["forward", "torch"]["microseconds"]["p80"]


def test_experts_cost_parameters_and_traffic_but_no_arithmetic():
    rates = scaling.Rates(1e15, 1e15, 1e15, 1e12, {})
    for vit in scaling.VITS:
        dense, with_experts = (scaling.cost(vit, experts, rates) for experts in (False, True))
        assert dense.arithmetic == pytest.approx(with_experts.arithmetic)
        assert with_experts.traffic / dense.traffic == pytest.approx(vit.with_experts / vit.dense)
    assert scaling.VITS[0].dense == pytest.approx(1.13e9, rel=0.02)  # ViT-g's published 1.1 billion


def test_command_line(tmp_path, capsys):
    from benchmarks.__main__ import main

    assert main(["--quick", "--only", "layer", "--case", "routed", "--budget", "1", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {r["case"] for r in result["layer"]} == {QUICK_CASES[1].name}
    assert str(path.name) in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit):
        main(["--case", "no such case"])
    assert "no case has that in its name" in capsys.readouterr().err
