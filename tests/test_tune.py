"""The tuner of forms, with Triton's interpreter in place of a GPU; and the table that it makes."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import model, tune
from benchmarks.cases import Case
from benchmarks.timing import Stopwatch
from ewa_kernels.kernels import forms

SHAPE = Case("small", 42, 32, 32, num_experts=4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def operands():
    return tune.Operands(SHAPE, DEVICE, torch.float16)


def test_all_forms_are_timed(operands):
    found = tune.measure(operands, Stopwatch("cpu"), rounds=2)
    assert {phase: set(times) for phase, times in found.items()} == {
        "forward": {"single", "split", "onchip", "cublas"},
        "backward": {"single", "split", "cublas"},
    }
    assert all(microseconds > 0 for times in found.values() for microseconds in times.values())
    entry = tune.entry(SHAPE, 9, found, "measured")
    assert forms.Entry(**dataclasses.asdict(entry)) == entry


def test_a_form_that_is_wrong_is_not_timed(operands, monkeypatch):
    def broken(self, form, forward=tune.Operands.forward):
        y, *others = forward(self, form)
        return (y * 1.1 if form == "cublas" else y, *others)

    monkeypatch.setattr(tune.Operands, "forward", broken)
    with pytest.raises(RuntimeError, match="small, forward, cublas: differs"):
        tune.measure(operands, Stopwatch("cpu"), rounds=2)


def test_passes(operands):
    found = tune.passes(operands, 1e9, Stopwatch("cpu"), rounds=2)
    assert [p.name for p in found] == ["gather", "activate", "scatter", "gather, backward", "activate, backward"]
    for p in found:
        assert p.of_copy == pytest.approx(1e-6 * p.microseconds * 1e9 / p.moved_bytes, rel=0.01)


class TestTable:
    def test_that_ships_is_the_models(self):
        """Until a GPU has written another: `python -m benchmarks.model --write`."""
        predicted = {(e.name, e.itemsize): e for e in model.entries()}
        for entry in forms.read(forms.TABLE):
            assert entry == predicted[entry.name, entry.itemsize] or entry.source.startswith("measured on")

    def test_the_model_errs_little(self):
        misses = [abs(seconds / point.seconds - 1) for point, seconds in model.errors()]
        assert len(misses) == 25
        assert sum(misses) / len(misses) < 0.07
        assert max(misses) < 0.2

    def test_nearest(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        device = torch.device("cuda")
        for entry in forms.read(forms.TABLE):
            sizes = (entry.gated, entry.num_rows, entry.num_experts, entry.d_model, entry.d_ff)
            assert forms.nearest(device, torch.bfloat16, *sizes) == entry
        near = forms.nearest(device, torch.float16, False, 40_000, 4, 800, 3200)
        assert (near.name, near.backend, near.fastest("forward", ("single", "split"))) == ("ViT-B", "cublas", "split")
        assert forms.nearest(device, torch.bfloat16, True, 16_000, 8, 2048, 4096).name == "DINOv2-g"
        assert forms.nearest(device, torch.bfloat16, False, 8000, 4, 384, 1536).backend == "triton"
        assert forms.nearest(device, torch.float32, False, 40_000, 4, 768, 3072) is None
        assert forms.nearest(torch.device("cpu"), torch.bfloat16, False, 40_000, 4, 768, 3072) is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert forms.nearest(device, torch.bfloat16, False, 40_000, 4, 768, 3072) is None

    def test_ones_own(self, monkeypatch, tmp_path):
        path = tmp_path / "forms.json"
        (entry, *_) = forms.read(forms.TABLE)
        own = dataclasses.replace(entry, backward={"single": 1.0, "cublas": 2000.0}, source="measured")
        model.write(path, [own])
        monkeypatch.setenv("EWA_KERNELS_FORMS", str(path))
        forms.entries.cache_clear()
        try:
            assert forms.entries() == (own,)
            assert own.backend == "triton"
        finally:
            forms.entries.cache_clear()

    @pytest.mark.parametrize("text", ["", "{}", '{"entries": [{"name": "x"}]}'], ids=["empty", "other", "fields"])
    def test_a_file_that_is_none(self, tmp_path, text):
        path = tmp_path / "forms.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"forms\.json must be a table of forms"):
            forms.read(path)

    def test_is_in_the_package(self):
        assert json.loads(forms.TABLE.read_text())["entries"]
