"""The example scripts run, for a few steps, and do what they say."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vision

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
# For the torchvision that timm and transformers import.
WITH_VISION = "import runpy, sys, vision; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def start(example, *arguments, cwd):
    """As users start it, if this torchvision lets them."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *([] if vision.FITS else ["-c", WITH_VISION]), str(EXAMPLES / example)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment)


def run(example, *arguments, cwd):
    """Its lines."""
    result = start(example, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_timm_plain_loop(tmp_path):
    lines = run("timm_plain_loop.py", "--steps", 6, cwd=tmp_path)
    assert [line for line in lines if "replaced" in line] == [
        "blocks.1.mlp  replaced fused",
        "blocks.3.mlp  replaced fused",
    ]
    steps = [line.split(":")[0] for line in lines if line.startswith("step ")]
    assert steps == [f"step {i}" for i in range(6)]
    assert "next share rate 0.030" in lines[-4]
    assert lines[-3:-1] == [
        "folding changed no bit of the output: True",
        "the folded weights load into an untouched model, strictly",
    ]
    assert 0 <= float(lines[-1].removeprefix("accuracy on 397 test images: ")) <= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_transformers_trainer(tmp_path):
    for resume in ([], ["--resume"]):
        lines = run("transformers_trainer.py", "--steps", 6, "--output", "vit", *resume, cwd=tmp_path)
        assert "vit.layers.1.mlp  replaced fused" in lines
        assert any("'share_rate': '0.03'" in line and "'expert_spread': '" in line for line in lines)
        assert "from_pretrained found each weight that it needs, and no other: True" in lines
        assert "the loaded model has the folded weights: True" in lines
        if not resume:
            straight = (tmp_path / "vit" / "model.safetensors").read_bytes()
            for path in (tmp_path / "vit" / "checkpoint-6").iterdir():
                path.unlink()
            (tmp_path / "vit" / "checkpoint-6").rmdir()
    assert (tmp_path / "vit" / "model.safetensors").read_bytes() == straight


@pytest.mark.slow
def test_accelerate_recipe(tmp_path):
    arguments = ("--steps", 6, "--accumulate", 3, "--output", "out")
    lines = run("accelerate_recipe.py", *arguments, "--save-at", 3, cwd=tmp_path)
    assert lines[-2:] == [
        "averaged 6 times in 18 batches",
        "the folded weights load into an untouched model, strictly",
    ]
    straight = torch.load(tmp_path / "out" / "folded.pt", weights_only=True)
    (tmp_path / "out" / "folded.pt").unlink()
    run("accelerate_recipe.py", *arguments, "--resume", cwd=tmp_path)
    resumed = torch.load(tmp_path / "out" / "folded.pt", weights_only=True)
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    ("example", "arguments", "words"),
    [
        ("timm_plain_loop.py", ["--steps", 0], "--steps must be at least 1, got 0"),
        (
            "accelerate_recipe.py",
            ["--steps", 2, "--save-at", 9],
            "--save-at must be in 1…2, the number of steps, got 9",
        ),
        ("accelerate_recipe.py", ["--accumulate", 64], "--accumulate must be in 1…56, the batches of an epoch, got 64"),
        ("fsdp2_torchrun.py", ["--save-every", 0], "--save-every must be at least 1, got 0"),
    ],
)
def test_bad_options(example, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert exit.value.code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_says_what_to_do_if_torchvision_does_not_fit():
    assert "operator torchvision::nms does not exist" in (TESTS.parent / "docs" / "training.md").read_text()


def test_fsdp2_takes_no_other_folder_for_a_checkpoint(tmp_path):
    last_step = runpy.run_path(str(EXAMPLES / "fsdp2_torchrun.py"))["last_step"]
    for name in ("9", "10", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    (tmp_path / "11").mkdir()
    assert last_step(tmp_path) == 10
