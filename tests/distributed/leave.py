"""torchrun tests/distributed/leave.py SCRIPT ARGUMENTS: runs it, and leaves without taking the interpreter down.

Groups in which functional collectives ran, and those are DTensor's, outlive `destroy_process_group`. A gloo thread that
is then still to free a tensor of Python's asks for the interpreter while that ends, and the process aborts, about once
in 30 runs on busy cores: see pytorch/pytorch#179291.
"""

import os
import runpy
import sys
from pathlib import Path

script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(script).parent)
runpy.run_path(script, run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
