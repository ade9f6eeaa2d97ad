"""The study: its data and arms are what they are said to be, it resumes, and its text claims no more than it found."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import ewa_kernels as ewa
from benchmarks.study import models, report, scheduler, solids, statistics
from benchmarks.study.__main__ import main
from benchmarks.study.records import Records
from benchmarks.study.train import DEFAULT, FINE_TUNED, FULL, PRETRAINING, SCRATCH, Result, Run

TINY = {"num_pretraining": 20, "num_training": 20, "num_test": 30, "d_model": 16, "depth": 2, "num_heads": 2}
TINY |= {"num_steps": 4, "batch_size": 8}


def shrunk(study, **options):
    first, second = (replace(task, **TINY) for task in study.tasks)
    second = replace(second, num_points=32, num_patches=4, patch_size=4)
    return replace(study, seeds=2, tasks=(first, second), **options)


STUDY = shrunk(DEFAULT)


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

    @pytest.mark.parametrize("kind", ["naive", "random"])
    def test_copies_start_as_the_dense_model(self, task, kind):
        inputs = task.data(0).test.inputs
        model = task.model().eval()
        expected = model(inputs)
        models.add_experts_(model, kind, 4, "copy")
        assert len(list(ewa.expert_tensors(model))) == 4  # of one of two FFNs
        for module in model.modules():
            if isinstance(module, ewa.RoutedMoE):
                torch.nn.init.zeros_(module.router.weight)
        torch.testing.assert_close(model(inputs), expected)

    def test_experts_of_both_kinds_start_alike(self, task):
        experts = []
        for kind in ("naive", "random"):
            torch.manual_seed(0)
            model = task.model()
            models.add_experts_(model, kind, 4, "independent")
            experts.append(dict(ewa.expert_tensors(model)))
        for name, tensor in experts[0].items():
            assert torch.equal(tensor, experts[1][name])
            assert not torch.equal(tensor[0], tensor[1])


def test_digits_of_the_three_sets_are_different_ones():
    data = replace(STUDY.tasks[0], num_training=700, num_test=900).data(0)
    images = torch.cat([split.inputs.flatten(1) for split in data])
    assert len(images.unique(dim=0)) == len(images)


def test_order_of_points_in_a_patch_does_not_matter():
    model = models.PointTransformer(16, 2, 2, 10).eval()
    patches = torch.randn(3, 4, 5, 3)
    turned = torch.cat((patches[:, :, :1], patches[:, :, 1:].flip(2)), dim=2)
    torch.testing.assert_close(model(turned), model(patches))


def test_averaging_behind_a_router_ends_half_way():
    rates = {}
    for arm in (models.NAIVE_EWA, models.RANDOM_EWA):
        model = STUDY.tasks[0].model()
        models.add_experts_(model, arm.experts, 4, "copy")
        schedule = STUDY.averager(model, arm, 100).schedule
        rates[arm.experts] = [schedule(step) for step in (0, 49, 50, 99)]
    assert rates["random"] == pytest.approx([0, 0.147, 0.15, 0.297])
    assert rates["naive"] == pytest.approx([0, 0.147, 0, 0])


def test_routers_loss_reaches_the_router():
    model = STUDY.tasks[0].model()
    assert models.load_balance_loss(model) == 0
    models.add_experts_(model, "naive", 4, "independent")
    model(torch.randn(2, 1, 8, 8))
    models.load_balance_loss(model).backward()
    assert next(m for m in model.modules() if isinstance(m, ewa.RoutedMoE)).router.weight.grad.abs().max() > 0


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
        del results[Run("digits", SCRATCH, "naive MoE", 0)]
        comparison = statistics.compare(results)[0]
        assert (comparison.arm, len(comparison.differences)) == ("naive MoE", 9)
        for seed in range(1, 9):
            del results[Run("digits", SCRATCH, "naive MoE", seed)]
        with pytest.raises(ValueError, match=r"must have two seeds in common \(digits, from scratch\), got 1"):
            statistics.compare(results)


def synthetic(effects):
    """Ten seeds that differ much; arms differ within a seed by chance, and on average by `effects` alone."""
    rng = np.random.default_rng(0)
    study = replace(DEFAULT, seeds=10)
    noise = {run[:3]: rng.standard_normal(10) for run in study.runs()}
    results = {}
    for run in study.runs():
        centred = noise[run[:3]] - noise[run[:3]].mean()
        accuracy = 70 + 10 * (run.seed % 3) + 0.5 * centred[run.seed] + effects.get(run[:3], 0.0)
        results[run] = Result(float(accuracy), 0.1, 2.0, 1.0)
    return results


def text_of(results):
    environment = {"commit": "abc", "device": "a machine"}
    return report.as_text(DEFAULT, environment, results, statistics.compare(results))


class TestReport:
    def test_without_an_effect_nothing_is_claimed(self):
        text = text_of(synthetic({}))
        assert "Nothing: after Holm's correction no comparison is significant at 5 %." in text
        assert "The other 24 of 24: p is above 5 % even alone. No effect can be claimed. Nor can its absence" in text
        assert not {"better", "worse"} & set(text.split())

    def test_large_effects_are_claimed_and_small_ones_are_not(self):
        cell = ("solids", FINE_TUNED)
        effects = {
            (*cell, "naive MoE + EWA"): 3.0,
            ("digits", SCRATCH, "random partition"): -4.0,
            ("digits", FINE_TUNED, "random partition + EWA"): 0.5,
        }
        results = synthetic(effects)
        text = text_of(results)
        significant, rest = text.split("## What is significant")[1].split("## What is not")
        lines = significant.strip().splitlines()
        assert [line.split(" points")[0] for line in lines] == [
            "- digits, from scratch: random partition is worse than dense by 4.00",
            "- digits, from scratch: random partition + EWA is better than random partition by 4.00",
            "- solids, fine-tuned: naive MoE + EWA is better than dense by 3.00",
            "- solids, fine-tuned: naive MoE + EWA is better than naive MoE by 3.00",
        ]
        found = statistics.compare(results)
        suggestive = [c for c in found if c.is_suggestive]
        assert {c.arm for c in suggestive} == {"random partition + EWA"}
        assert all(c.low > 0 and c.mean == pytest.approx(0.5) for c in suggestive)
        assert rest.count(" as one of 24 comparisons. No claim.") == len(suggestive) > 0
        assert f"The other {24 - 4 - len(suggestive)} of 24" in rest

    def test_says_where_it_is_from_and_what_it_took(self):
        text = text_of(synthetic({}))
        assert "at commit abc: a machine" in text
        assert "220 trainings took 440 seconds together, 220 of a CPU" in text
        assert text.count("| significant |") == text.count("| alone only |") == 0
        assert "| dense | 79.00 ± " in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two seeds."""
    folder = tmp_path_factory.mktemp("study")
    main(["--output", str(folder), "--workers", "2"], default=STUDY)
    return folder


class TestCommand:
    def results(self, folder):
        """Of each run: accuracy and loss."""
        lines = (folder / "runs" / "runs.jsonl").read_text().splitlines()[1:]
        runs = [json.loads(line) for line in lines]
        assert len({tuple(run[name] for name in Run._fields) for run in runs}) == len(runs) == 44
        return {tuple(run[name] for name in Run._fields): (run["accuracy"], run["training_loss"]) for run in runs}

    def test_files(self, finished):
        content = json.loads((finished / "study.json").read_text())
        assert len(content["runs"]) == 44
        assert len(content["comparisons"]) == 24
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
        (runs / "runs.jsonl").write_text("".join(lines[:38]) + lines[38][:20])
        main(["--output", str(tmp_path), "--workers", "1", "--resume"], default=STUDY)
        printed = " ".join(capsys.readouterr().out.split())
        assert "44/44" in printed
        assert "remaining" in printed
        again = [json.loads(line) for line in (runs / "runs.jsonl").read_text().splitlines()[1:]]
        assert len(again) == 45  # the lost pretraining, a second time
        expected = self.results(finished)
        for run in again:
            key = tuple(run[name] for name in Run._fields)
            assert (run["accuracy"], run["training_loss"]) == expected[key]

    def test_resuming_a_finished_study_trains_nothing(self, finished, monkeypatch):
        monkeypatch.setattr(scheduler, "execute", None)
        before = (finished / "runs" / "runs.jsonl").read_text()
        main(["--output", str(finished), "--resume"], default=STUDY)
        assert (finished / "runs" / "runs.jsonl").read_text() == before

    @pytest.mark.parametrize(
        ("argv", "study", "message"),
        [
            ([], STUDY, "--output must be a folder without results, got .*runs.jsonl: --resume goes on with them"),
            (["--resume"], replace(STUDY, share_rate=0.1), "--output must be of this study, but .* was made with"),
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
            main(["--output", str(tmp_path), *argv], default=STUDY)
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_full_runs_on_a_cpu_too(self, tmp_path):
        full = shrunk(FULL)
        full = replace(full, tasks=full.tasks[1:])
        main(["--full", "--output", str(tmp_path), "--device", "cpu", "--workers", "1"], full=full)
        content = json.loads((tmp_path / "study.json").read_text())
        assert content["study"]["use_bfloat16"]
        assert len(content["runs"]) == 22


def test_pretraining_comes_before_what_starts_from_it():
    runs = DEFAULT.runs()
    assert len(runs) == len(set(runs)) == 220
    for run in runs:
        if run.start == FINE_TUNED:
            assert runs.index(Run(run.task, PRETRAINING, "dense", run.seed)) < runs.index(run)


def test_more_seeds_go_on_with_the_same_file(tmp_path):
    run = STUDY.runs()[1]
    Records(tmp_path, STUDY, {"commit": "first"}, resume=False).add(run, Result(50.0, 1.0, 1.0, 1.0))
    records = Records(tmp_path, replace(STUDY, seeds=5), {"commit": "second"}, resume=True)
    assert records.environment == {"commit": "first"}
    assert records.is_done(run)
    assert not records.is_done(STUDY.runs()[0])
