"""torchrun --nproc-per-node 4 tests/distributed/run.py FOLDER: runs all checks, and writes what failed where."""

import datetime
import inspect
import json
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch.distributed as dist
from distributed import exchange_on_ranks, state_on_ranks, training_on_ranks


def main():
    folder = Path(sys.argv[1])
    # A rank that fails leaves the others waiting.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    results = {}
    for check in (*training_on_ranks.CHECKS, *state_on_ranks.CHECKS, *exchange_on_ranks.CHECKS):
        error, start = None, time.perf_counter()
        try:
            check(*[folder] if inspect.signature(check).parameters else [])
        except (Exception, pytest.fail.Exception):  # that of pytest.raises is no Exception
            error = traceback.format_exc()
            print(check.__name__, "rank", dist.get_rank(), error, flush=True)
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        results[check.__name__] = {
            "errors": {rank: text for rank, text in enumerate(errors) if text is not None},
            "seconds": time.perf_counter() - start,
        }
        if dist.get_rank() == 0:
            (folder / f"results_{dist.get_world_size()}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
