"""The results of a study as they come, in a file that a later call goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.train import PRETRAINING, Result, Run, Study


class Records:
    """Results in `<folder>/runs.jsonl`, a line each, the first one for the study; dense weights beside it.

    Args:
        study: what a file that is there must have been made by, but for the number of seeds.
        environment: what it runs on; `self.environment` is what the file was begun on.
        resume: go on with the file that is there, if one is.

    Raises:
        ValueError: there is a file but `resume` is false, or it is of another study.
    """

    def __init__(self, folder: Path, study: Study, environment: Mapping[str, object], *, resume: bool):
        self.folder, self.path = folder, folder / "runs.jsonl"
        self.results: dict[Run, Result] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        self.environment = environment
        header = {"study": _without_seeds(study), "environment": environment}
        if self.path.exists():
            if not resume:
                raise ValueError(
                    f"--output must be a folder without results, got {self.path}: --resume goes on with them"
                )
            self._read(header)
        else:
            self._append(header)

    def checkpoint(self, run: Run) -> Path:
        """Of the dense weights that its task and seed start from."""
        return self.folder / f"{run.task}-{run.seed}.pt"

    def is_done(self, run: Run) -> bool:
        return run in self.results and (run.start != PRETRAINING or self.checkpoint(run).exists())

    def add(self, run: Run, result: Result) -> None:
        self._append({**run._asdict(), **result._asdict()})
        self.results[run] = result

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, header: dict[str, Any]) -> None:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a process was killed while it wrote the last line
            self.path.write_text(whole)
        if not whole:
            return self._append(header)
        first, *lines = map(json.loads, whole.splitlines())
        was, asked = first["study"], header["study"]
        if was != asked:
            raise ValueError(f"--output must be of this study, but {self.path} was made with {was}, not {asked}")
        self.environment = first["environment"]
        for line in lines:
            run = Run(*(line[name] for name in Run._fields))
            result = Result(*(line[name] for name in Result._fields))
            self.results[run] = result._replace(course=tuple(result.course))


def _without_seeds(study: Study) -> dict[str, Any]:
    """A study may be given more."""
    options: dict[str, Any] = json.loads(json.dumps(asdict(study)))
    del options["seeds"]
    return options
