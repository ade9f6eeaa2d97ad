"""`make gpu` where there is no GPU: how it runs its sections, and what it says here."""

import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture
def runner():
    spec = importlib.util.spec_from_file_location("gpu_runner", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_section_is_logged_and_its_exit_code_kept(runner, capfd):
    log = io.StringIO()
    assert runner.run([sys.executable, "-c", "print('here'); raise SystemExit(3)"], 60, log) == 3
    assert log.getvalue() == "here\n"
    assert capfd.readouterr().out == "here\n"


def test_a_section_that_takes_too_long_is_stopped(runner):
    """With its children, which hold its output."""
    start = time.monotonic()
    assert runner.run(["bash", "-c", "sleep 60 & sleep 60"], 1, io.StringIO()) == 124
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("of", "minutes"), [("sections", 9.5), ("hopper_sections", 6)])
def test_commands_exist_and_fit_in_time(of, minutes, runner):
    """If each takes as long as it may; those of a group run at the same time."""
    groups = getattr(runner, of)(Path())
    assert sum(max(limit for _, limit in group.values()) for group in groups) <= 60 * minutes
    for group in groups:
        for command, _ in group.values():
            for word in command:
                if word.endswith(".py"):
                    assert (runner.ROOT / word).exists()


def test_two_calls_of_six_minutes_are_enough(runner):
    """Builds are made in both; the first has the tests, the second what measures."""
    limits = [max(limit for _, limit in group.values()) for group in runner.sections(Path())]
    build, report, tests, *measured = limits
    assert build + report + tests <= 360
    assert build + sum(measured) <= 360


def test_nothing_begins_when_the_time_is_over(runner, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "device", lambda: {"device": "none", "capability": "9.0"})
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(runner, "sections", lambda output: [{"long": (sleep, 60)}, {"late": (sleep, 60)}])
    monkeypatch.setattr(sys, "argv", ["run.py", "--minutes", "0.02", "--output", str(tmp_path)])
    assert runner.main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [result["returncode"] for result in results.values()] == [124, 125]
    assert "not run" in capsys.readouterr().out


def test_one_failed_section_does_not_keep_the_next_from_running(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "device", lambda: {"device": "none", "capability": "9.0"})
    commands = {
        "bad": ([sys.executable, "-c", "raise SystemExit(1)"], 60),
        "missing": (["no-such-program"], 60),
        "good": ([sys.executable, "-c", "print(1)"], 60),
    }
    monkeypatch.setattr(runner, "sections", lambda output: [commands])
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path)])
    assert runner.main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: result["returncode"] for name, result in results.items()} == {"bad": 1, "missing": 127, "good": 0}


@pytest.mark.parametrize("source", ["the same", "another"])
def test_what_has_passed_is_left_out_when_resumed(source, runner, monkeypatch, tmp_path):
    environment = {"device": "none", "capability": "9.0", "commit": "any", "source": "the same"}
    passes, fails = ([sys.executable, "-c", f"raise SystemExit({code})"] for code in (0, 1))
    (tmp_path / "log").touch()
    notes = [sys.executable, "-c", f"open({str(tmp_path / 'log')!r}, 'a').write('again ')"]
    for flags, first, code in (([], fails, 1), (["--resume"], passes, 0)):
        groups = [{"first": (first, 60), "second": (notes, 60)}]
        monkeypatch.setattr(runner, "device", lambda environment=environment: environment)
        monkeypatch.setattr(runner, "hopper_sections", lambda output, groups=groups: groups)
        monkeypatch.setattr(sys, "argv", ["run.py", "--hopper", *flags, "--output", str(tmp_path)])
        assert runner.main() == code
        environment = {**environment, "commit": "dirty", "source": source}
    results = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: result["returncode"] for name, result in results.items()} == {"first": 0, "second": 0}
    assert (tmp_path / "log").read_text() == ("again " if source == "the same" else "again again ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_says_what_is_missing():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 1
    assert "make gpu needs a CUDA device" in result.stderr
