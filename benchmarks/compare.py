"""A commit against the working tree: `python -m benchmarks --base <commit>`.

The commit is checked out in a temporary folder and builds its extension there. Two processes, one with each package
and both with this harness, take turns call by call.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import ewa_kernels
from benchmarks import experts
from benchmarks.cases import DTYPES, PHASES, Case
from benchmarks.environment import ROOT
from benchmarks.layer import training_pass
from benchmarks.peers import OURS, peers
from benchmarks.problem import make
from benchmarks.timing import Sample, Stopwatch, Variant, ratios, rounds, timed, timings

DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
Result = dict[str, Any]


def compare(base: str, device: str, cases: Sequence[Case], seconds: float) -> list[Result]:
    """For each case and for averaging: milliseconds of `base` and of the working tree by phase, or `why_not`.

    Raises:
        ValueError: `base` is not a commit of this repository.
    """
    requests: list[Result] = [{"case": {**asdict(c), "dtype": DTYPES[c.dtype]}, "name": str(c)} for c in cases]
    requests += [{"experts": name, "name": name} for name in ("averaging", "AdamW and averaging")]
    results = []
    with checked_out(base, device) as tree, _Worker(tree, device) as old, _Worker(ROOT, device) as new:
        for request in requests:
            ready = [worker.ask(request) for worker in (old, new)]
            failed = [answer["error"] for answer in ready if "error" in answer]
            if failed:
                results.append({"name": request["name"], "why_not": failed[0]})
                continue
            variants = {name: worker.sample for name, worker in (("base", old), ("new", new))}
            samples = rounds(variants, seconds / len(requests))
            before, after = timings(samples["base"]), timings(samples["new"])
            result: Result = {"name": request["name"]}
            phases = PHASES if len(after) == len(PHASES) else PHASES[-1:]
            for phase, then, now, ratio in zip(
                phases, before, after, ratios(samples["new"], samples["base"]), strict=True
            ):
                result[phase] = {"base": then.as_dict(), "new": now.as_dict(), "ratio": ratio.median}
            results.append(result)
    return results


def table(results: Sequence[Result], base: str) -> Table:
    """Milliseconds of the whole call, and the ratio of each phase."""
    columns = ("case", "base ms", "now ms", "p20–p80 now", *(f"{phase}, now ÷ base" for phase in PHASES))
    rendered = Table(*columns, title=f"working tree ÷ {base}")
    for r in results:
        if "why_not" in r:
            rendered.add_row(r["name"], escape(r["why_not"]))
            continue
        whole = r["both"]
        ratios = [f"{r[phase]['ratio']:.3f}" if phase in r else "" for phase in PHASES]
        now = whole["new"]
        spread = f"{now['p20']:.3g}–{now['p80']:.3g}"
        rendered.add_row(r["name"], f"{whole['base']['median']:.4g}", f"{now['median']:.4g}", spread, *ratios)
    return rendered


@contextmanager
def checked_out(commit: str, device: str) -> Iterator[Path]:
    """A folder with the package of a commit, its extension built, and this harness in place of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "base")
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if added.returncode:
            raise ValueError(f"--base must be a commit of this repository, got {commit!r}: {added.stderr.strip()}")
        try:
            capability = "{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else ""
            architecture = "90a" if capability == "90" else capability
            environment = {**os.environ, "EWA_CUDA_ARCHITECTURES": architecture}
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            built = subprocess.run(build, cwd=tree, env=environment, capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"the extension of {commit} cannot be built:\n{built.stderr[-2000:]}")
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            ignored = shutil.ignore_patterns("results", "study", "__pycache__")
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True)


class _Worker:
    """A process with the package of one tree. It answers each line of JSON with another."""

    def __init__(self, tree: Path, device: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", device],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package = Path(str(self._read()["package"])).resolve()
        if not package.is_relative_to(tree.resolve()):
            raise RuntimeError(f"the package of {tree} is not what Python imports there, but {package}")

    def ask(self, request: Result) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def sample(self) -> Sample:
        """Seconds of a call, by phase."""
        return self.ask({"round": True})["seconds"]

    def _read(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a measuring process has ended; what it said is above")
        return json.loads(line)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


# --- in that process ---


def _subject(request: Result, device: str) -> Variant:
    """What a request wants timed, called once."""
    watch = Stopwatch(device)
    if "experts" in request:
        subject: Callable[[], object] = experts.subject(request["experts"], device)
        variant = timed(subject, watch)
    else:
        fields = request["case"]
        case = Case(**{**fields, "dtype": DTYPES_BY_NAME[fields["dtype"]]})
        build = next(peer.build for peer in peers() if peer.name == OURS)
        variant = training_pass(build(case), make(case, device), watch)
    variant()
    return variant


def serve(device: str) -> None:
    """Reads requests from stdin until it ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Result) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"package": ewa_kernels.__file__})
    variant: Variant | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "round" in request and variant is not None:
            answer({"seconds": variant()})
            continue
        try:
            variant = _subject(request, device)
            answer({"ready": True})
        except Exception as error:  # an older package may lack what a case needs: the other cases go on
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


if __name__ == "__main__":
    serve(sys.argv[1])
