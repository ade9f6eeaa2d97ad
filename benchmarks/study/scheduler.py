"""Trains what is missing of a study, in several processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from benchmarks.study.records import Records
from benchmarks.study.train import FINE_TUNED, PRETRAINING, Result, Run, Study, execute


def carry_out(study: Study, records: Records, workers: int, device: str, report: Callable[[], None]) -> None:
    """Runs are begun in the order of `Study.runs`, but fine-tuning waits for the weights that it starts from.

    Args:
        workers: number of processes, of one thread each.
        report: is called after each run.
    """
    waiting = [run for run in study.runs() if not records.is_done(run)]
    running: dict[Future[Result], Run] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        while waiting or running:
            pretraining = {records.checkpoint(run) for run in (*waiting, *running.values()) if run.start == PRETRAINING}
            ready = [run for run in waiting if run.start != FINE_TUNED or records.checkpoint(run) not in pretraining]
            # No more than the processes can begin: what is ready next is not known before one of them ends.
            for run in ready[: workers - len(running)]:
                waiting.remove(run)
                running[pool.submit(execute, run, study, records.checkpoint(run), device)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                records.add(running.pop(future), future.result())
                report()


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process has it too, and waits for what is running
