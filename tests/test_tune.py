"""The tuner of forms, with Triton's interpreter in place of a GPU; and the table that it makes."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")
import ewa_kernels as ewa
from benchmarks import model, tune
from benchmarks.cases import Case
from benchmarks.timing import Stopwatch
from ewa_kernels import calls
from ewa_kernels.kernels import forms
from ewa_kernels.problem import Inputs

SHAPE = Case("small", 42, 32, 32, num_experts=4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def operands():
    return tune.Operands(SHAPE, DEVICE, torch.float16)


def test_all_forms_are_timed(operands):
    found, beside = tune.measure(operands, Stopwatch("cpu"), rounds=2), {"dense FFN", "products alone"}
    assert {phase: set(times) for phase, times in found.items()} == {
        "forward": {"single", "split", "onchip", "cublas", *beside},
        "backward": {"single", "split", "cublas", *beside},
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


@pytest.mark.parametrize("fastest", ["triton", "cublas"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_layer_takes_the_form_that_an_eager_one_takes(fastest, dynamic, monkeypatch):
    """Which one is decided by the operation: a compiler may not know the number of tokens."""
    torch.compiler.reset()
    seen = []

    def backend_for(inputs, is_given, dtype):
        seen.append(inputs.x.shape[0])
        return fastest

    monkeypatch.setattr(forms, "backend_for", backend_for)
    if DEVICE == "cpu":
        monkeypatch.setattr(calls, "resolve", lambda *request: "triton")
    layer = ewa.RandomPartitionMoE(16, 32, 4, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_tokens in (13, 21):
        x = torch.randn(num_tokens, 16, device=DEVICE, requires_grad=True)
        results = []
        for function in (layer, compiled):
            y = function(x, seed=torch.tensor(3, device=DEVICE))
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
        assert all(map(torch.equal, *results))
    assert set(seen) == {13, 21}


class TestTable:
    def test_that_ships_is_the_models(self):
        """Until a GPU has written another: `python -m benchmarks.model --write`."""
        predicted = {(e.name, e.itemsize): e for e in model.entries()}
        for entry in forms.read(forms.TABLE):
            assert entry == predicted[entry.name, entry.itemsize] or entry.measured

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
        assert (near.name, near.backend(), near.fastest("forward", ("single", "split"))) == ("ViT-B", "cublas", "split")
        assert forms.nearest(device, torch.bfloat16, True, 16_000, 8, 2048, 4096).name == "DINOv2-g"
        assert forms.nearest(device, torch.bfloat16, False, 8000, 4, 384, 1536).backend() == "triton"
        # Better by less than the model errs.
        assert forms.nearest(device, torch.bfloat16, False, 802_816, 4, 96, 384).backend() == "triton"
        assert forms.nearest(device, torch.float32, False, 40_000, 4, 768, 3072) is None
        assert forms.nearest(torch.device("cpu"), torch.bfloat16, False, 40_000, 4, 768, 3072) is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert forms.nearest(device, torch.bfloat16, False, 40_000, 4, 768, 3072) is None

    def test_ones_own(self, monkeypatch, tmp_path):
        path = tmp_path / "forms.json"
        (entry, *_) = forms.read(forms.TABLE)
        own = dataclasses.replace(entry, backward={"single": 1.0, "cublas": 2000.0}, measured=True)
        model.write(path, [own])
        monkeypatch.setenv("EWA_KERNELS_FORMS", str(path))
        forms.entries.cache_clear()
        try:
            assert forms.entries() == (own,)
            assert own.backend() == "triton"
        finally:
            forms.entries.cache_clear()

    def test_hoppers_kernels_only_where_they_were_measured_and_run(self):
        (entry, *_) = forms.read(forms.TABLE)
        faster = dataclasses.replace(
            entry, **{p: {**getattr(entry, p), "hopper": 1.0} for p in ("forward", "backward")}
        )
        measured = dataclasses.replace(faster, measured=True)
        assert faster.backend() == entry.backend() == measured.backend(has_hopper=False)
        assert measured.backend() == "hopper"

    @pytest.mark.parametrize(("num_rows", "backend"), [(50_432, "hopper"), (30_000, "hopper"), (10_000, "cublas")])
    def test_hoppers_kernels_only_for_shapes_near_by(self, num_rows, backend, monkeypatch):
        (entry,) = (entry for entry in forms.read(forms.TABLE) if entry.name == "ViT-B")
        times = {p: {**getattr(entry, p), "hopper": 1.0} for p in ("forward", "backward")}
        monkeypatch.setattr(forms, "entries", lambda: [dataclasses.replace(entry, **times, measured=True)])
        monkeypatch.setattr(forms, "nearest", lambda device, *sizes: forms.entries()[0])
        monkeypatch.setattr(forms.devices, "why_not_hopper", lambda device: None)
        x, down_weight = torch.empty(num_rows, 768, device="meta"), torch.empty(4, 768, 3072, device="meta")
        inputs = Inputs(x, down_weight.mT, None, down_weight, None, None)
        assert forms.backend_for(inputs, False, torch.bfloat16) == backend

    @pytest.mark.parametrize("text", ["", "{}", '{"entries": [{"name": "x"}]}'], ids=["empty", "other", "fields"])
    def test_a_file_that_is_none(self, tmp_path, text):
        path = tmp_path / "forms.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"forms\.json must be a table of forms"):
            forms.read(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"forward": {}},
            {"backward": {"cublas": 1.0}},
            {"forward": None},
            {"forward": {"single": float("nan")}},
            {"forward": {"single": 1.0, "other": 1.0}},
            {"capability": "9"},
            {"d_model": None},
            {"num_rows": 0},
        ],
        ids=str,
    )
    def test_an_entry_that_is_none(self, tmp_path, change):
        entry = dataclasses.asdict(forms.read(forms.TABLE)[0]) | change
        path = tmp_path / "forms.json"
        path.write_text(json.dumps({"entries": [entry]}))
        with pytest.raises(ValueError, match=r"forms\.json must be a table of forms"):
            forms.read(path)

    def test_is_in_the_package(self):
        assert json.loads(forms.TABLE.read_text())["entries"]
