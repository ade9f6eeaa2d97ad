"""`python -m benchmarks --base`: a commit against the working tree."""

import shutil
import subprocess

import pytest

from benchmarks import compare
from benchmarks.cases import Case
from benchmarks.environment import ROOT

TINY = Case("tiny", 256, 32, 64)


def is_checkout():
    return shutil.which("git") is not None and (ROOT / ".git").exists()


pytestmark = pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")


def test_an_unknown_commit():
    with pytest.raises(ValueError, match="--base must be a commit of this repository, got 'no-such-commit'"):
        compare.compare("no-such-commit", "cpu", [TINY], 0.0)


def test_workers_measure_and_say_what_they_cannot():
    with compare._Worker(ROOT, "cpu") as worker:
        wrong = worker.ask({"case": {"name": "wrong", "dtype": "fp32"}, "name": "wrong"})
        assert "num_tokens" in wrong["error"]
        assert worker.ask({"experts": "averaging"}) == {"ready": True}
        assert len(worker.ask({"round": 0})["seconds"]) == 1


@pytest.mark.slow
def test_the_same_commit_is_as_fast():
    """Builds its extension. The bounds are wide: other tests may run beside it."""
    results = compare.compare("HEAD", "cpu", [TINY], 4.0)
    assert [r["name"] for r in results] == [str(TINY), "averaging", "AdamW and averaging"]
    for result in results:
        assert 0.5 < result["both"]["ratio"] < 2, result
    worktrees = subprocess.run(["git", "-C", ROOT, "worktree", "list"], capture_output=True, text=True, check=True)
    assert "/base" not in worktrees.stdout
    assert compare.table(results, "HEAD").row_count == 3
