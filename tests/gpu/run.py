"""`make gpu`: everything that needs a CUDA machine, in one command, offline, with the Python that is found there.

Runs from the checkout. Each section is a process of its own with a time limit; a section that fails does not keep
the next from running. Writes `gpu.json` (device, versions, what passed, how long) and `gpu.log` into --output,
next to what the benchmarks write. Exit code: 0 if all sections passed.

In two calls of six minutes, the second of which goes on where the first one was stopped: `--minutes 6`, then
`--minutes 6 --resume`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NOT_RUN = 125  # for want of time
SMALL = [sys.executable, "tests/gpu/small.py"]
TUNE = [sys.executable, "-m", "benchmarks.tune"]
BENCHMARKS = [sys.executable, "-m", "benchmarks", "--device", "cuda"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
if importlib.util.find_spec("xdist"):
    PYTEST += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 4)))]  # most of the time is Triton compiling
if importlib.util.find_spec("pytest_timeout"):
    PYTEST += ["--timeout", "90", "--timeout-method", "thread"]  # a kernel that waits for ever costs one test

Section = tuple[list[str], int]  # a command, and the seconds it may take
Group = dict[str, Section]  # by name; they run at the same time


BUILD = [sys.executable, "setup.py", "-q", "build_ext"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]


def sections(output: Path) -> list[Group]:
    """Of the package, in the order in which they run."""
    return [
        {"build": ([*BUILD, "--inplace"], 80)},
        {"report": ([sys.executable, "-m", "ewa_kernels"], 20)},
        {
            "tests": (
                [
                    *PYTEST,
                    *(
                        f"tests/test_{n}.py"
                        for n in ("fused", "launches", "routed", "expert_linear", "saved", "exchange")
                    ),
                    "tests/gpu",
                ],
                190,
            ),
            "memcheck": ([*SANITIZER, "memcheck", *SMALL], 190),
            # Of shared memory alone: that programs hand results over in order is for repetition to show (tests/gpu).
            "racecheck": ([*SANITIZER, "racecheck", *SMALL], 190),
            "initcheck": ([*SANITIZER, "initcheck", *SMALL], 190),
            "synccheck": ([*SANITIZER, "synccheck", *SMALL], 190),
        },
        {"tune": ([*TUNE, "--minutes", "1.5", "--output", str(output)], 130)},
        # The budget is less than the limit: what does not fit is left out, and what was measured is written.
        {"benchmarks": ([*BENCHMARKS, "--budget", "115", "--output", str(output)], 150)},
    ]


def hopper_sections(output: Path) -> list[Group]:
    """Of the kernels in csrc/hopper alone: first that nobody waits for ever or strays, then values, then times."""
    folder = ROOT / "build" / "debug"  # in this build, who waits too long ends the kernel
    module = folder / "ewa_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    debug_build = [*BUILD, "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    small = [sys.executable, "tests/gpu/small_hopper.py"]

    def sanitized(tool: str) -> Section:
        return ["env", f"EWA_TEST_EXTENSION={module}", *SANITIZER, tool, *small], 120

    return [
        {
            "build": ([*BUILD, "--inplace"], 90),
            "hopper-build": (["env", "NVCC_APPEND_FLAGS=-DEWA_HOPPER_DEBUG", *debug_build], 90),
        },
        {"hopper-small": (["env", f"EWA_TEST_EXTENSION={module}", *small], 30)},
        {
            **{f"hopper-{tool}": sanitized(tool) for tool in ("memcheck", "synccheck", "racecheck")},
            "hopper-tests": ([*PYTEST, "tests/gpu/test_gpu_hopper.py"], 120),
        },
        {"hopper-times": ([*TUNE, "--minutes", "0.8", "--output", str(output)], 100)},
    ]


def run(command: list[str], limit: float, log, architecture: str = "", prefix: str = "") -> int:
    """Runs a command, its output to the console and the log; 124 if it took too long, 127 if there is no such program.

    Compiles CUDA for one architecture.
    """
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("EWA_CUDA_ARCHITECTURES", architecture)
    if "compute-sanitizer" in command:
        # Else tensors are pieces of large allocations, and an access beyond one is within another.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    except FileNotFoundError as error:
        print(error)
        return 127
    with process:

        def copy_output() -> None:
            for line in process.stdout:
                print(prefix + line, end="", flush=True)
                log.write(prefix + line)

        reader = threading.Thread(target=copy_output)
        reader.start()
        try:
            process.wait(limit)
            timed_out = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children hold the pipe too
            timed_out = True
        reader.join()
    return 124 if timed_out else process.returncode


def device() -> dict[str, str]:
    """What the results are of."""
    code = (
        "import json, torch, triton; p = torch.cuda.get_device_properties(0); print(json.dumps({'device': p.name, "
        "'capability': f'{p.major}.{p.minor}', 'multiprocessors': p.multi_processor_count, "
        "'torch': torch.__version__, 'triton': triton.__version__}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"make gpu needs a CUDA device, torch and triton:\n{result.stderr}")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = os.environ.get("EWA_COMMIT")  # of a copy without its history
    commit = commit or subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return {**json.loads(result.stdout), "python": sys.version.split()[0], "commit": commit, "source": source()}


def source() -> str:
    """A hash of what is built and run: results, which a run writes, do not change it."""
    files = [ROOT / "setup.py"]
    for folder, kinds in (("csrc", ("cpp", "h", "cu", "cuh")), ("ewa_kernels", ("py", "json")), ("tests", ("py",))):
        files += [path for kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}")]
    files += (ROOT / "benchmarks").glob("*.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def passed_before(path: Path, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """The sections of a run in the same environment that passed; builds are made again, and cost little then."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    if {**before["environment"], "commit": ""} != {**environment, "commit": ""}:
        return {}
    passed = {name: result for name, result in before["sections"].items() if result["returncode"] == 0}
    return {name: result for name, result in passed.items() if "build" not in name}


def main() -> int:
    names = list(dict.fromkeys(n for groups in (sections, hopper_sections) for group in groups(Path()) for n in group))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--hopper", action="store_true", help='only what shows that backend="hopper" is right and fast')
    parser.add_argument("--resume", action="store_true", help="leave out what has passed before of the same source")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all sections together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    summary = {"environment": device(), "sections": {}}
    if arguments.resume:
        summary["sections"] = passed_before(output / "gpu.json", summary["environment"])
    print(json.dumps(summary["environment"], indent=1), flush=True)
    capability = summary["environment"]["capability"].replace(".", "")
    architecture = "90a" if capability == "90" else capability
    begin = time.monotonic()
    with (output / "gpu.log").open("a" if arguments.resume else "w") as log:

        def take(name: str, section: Section, prefix: str) -> dict[str, float]:
            command, limit = section
            print(f"\n=== {name}: {' '.join(command)}", flush=True)
            log.write(f"\n=== {name}\n")
            start = time.monotonic()
            limit = min(limit, 60 * arguments.minutes - (start - begin))
            returncode = run(command, limit, log, architecture, prefix) if limit > 0 else NOT_RUN
            return {"returncode": returncode, "seconds": round(time.monotonic() - start, 1)}

        for group in hopper_sections(output) if arguments.hopper else sections(output):
            chosen = {
                name: section
                for name, section in group.items()
                if name in arguments.sections and name not in summary["sections"]
            }
            with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
                running = {
                    pool.submit(take, name, section, f"{name}: " if len(chosen) > 1 else ""): name
                    for name, section in chosen.items()
                }
                for done in concurrent.futures.as_completed(running):
                    summary["sections"][running[done]] = done.result()
                    (output / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    print()
    for name, result in summary["sections"].items():
        outcome = {0: "passed", NOT_RUN: "not run"}.get(result["returncode"], "FAILED")
        print(f"{name:12} {outcome:7} {result['seconds']:7.1f} s")
    return int(any(result["returncode"] for result in summary["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
