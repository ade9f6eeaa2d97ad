"""Builds ewa_kernels._C with ninja: C++ for CPUs, and CUDA where nvcc is found. It asks for no GPU and no torch.

Without a compiler the package installs without it and runs on PyTorch and Triton; without nvcc, or if the CUDA part
does not compile, for CPUs alone; if only the kernels for Hopper do not, without these. What is missing is said.

Environment: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME; EWA_CUDA_ARCHITECTURES, e.g. "90a 120", empty for none.
"""

import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CXX_SOURCES = (
    "bindings",
    "exchange/exchange",
    "layer/codec",
    "layer/merge",
    "layer/moe_ffn",
    "layer/permutation",
    "layer/products",
    "layer/rows",
    "parameter_pass/cpu",
    "parameter_pass/table",
)
CUDA_SOURCES = ("parameter_pass/cuda",)
HOPPER_SOURCES = ("hopper/layer", "hopper/bfloat16", "hopper/float16")  # for this architecture alone
HOPPER = "90a"
ARCHITECTURES = "80 86 89 90a 100 120"
PTX = "80"  # for every GPU that is not listed, compiled by its driver

LINUX = platform.system() == "Linux"
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -DNDEBUG -fno-math-errno -fno-trapping-math -Wall -Wextra"
if LINUX:
    # Compiled for OpenMP and not linked with it: the symbols come from the runtime that torch has loaded. A second
    # runtime would bring threads of its own, which fight with torch's for the cores.
    CXX_FLAGS += " -fopenmp"
NVCC_FLAGS = "-O3 -std=c++17 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v --threads 0"
CUDA_FLAGS = "--extended-lambda -fmad=false"

NINJA = """
cxx = {cxx}
nvcc = {nvcc}
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile_cuda
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile_hopper
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out >$out.log 2>&1; status=$$?; cat $out.log; {check}; exit $$status
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out {ldflags}
"""


# Of ptxas: registers are not handed over, or products wait for one another, and all takes several times as long.
CHECK = "if grep -q 'C75[0-9][0-9]' $out.log; then rm -f $out; exit 1; fi"


def find_nvcc() -> str | None:
    """In CUDA_HOME if that is set, else where commands are looked for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def architectures(nvcc: str) -> list[str]:
    """Those asked for that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)", release)
    if found is not None and int(found[1]) >= 12:
        known += [f"{code}a" for code in known if int(code.removeprefix("sm_").rstrip("af")) >= 90]  # it may not list
    asked = os.environ.get("EWA_CUDA_ARCHITECTURES", ARCHITECTURES).split()
    return [a for a in asked if f"sm_{a}" in known]


def host_compiler(cxx: str) -> str:
    """For nvcc, which takes one word: not ccache before it, nor options after it."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(cxx)))[-1]


def by_nvcc(flags: str) -> str:
    """Options for the linker, as nvcc passes them on: it knows -L and -l, and takes others apart at commas."""
    words = []
    for word in shlex.split(flags):
        if not word.startswith(("-L", "-l")):
            words.append("-Xcompiler")
            word = word.replace(",", "\\,")
        words.append(word)
    return shlex.join(words).replace("$", "$$")


class NinjaBuild(build_ext):
    """Writes a build.ninja, and runs it."""

    def build_extension(self, ext: Extension) -> None:
        cxx = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise CompileError(f"no C++ compiler: {cxx!r} is not found. Install one, or say in CXX where it is")
        nvcc = find_nvcc()
        why_not = "no nvcc is found; CUDA_HOME says where it is"
        if nvcc is not None:
            try:
                cuda = architectures(nvcc)
                if HOPPER in cuda:
                    try:
                        return self.ninja(ext, cxx, nvcc, cuda, "hopper")
                    except (CompileError, OSError) as error:
                        self.warn(f"{ext.name} is built without the kernels for Hopper: {error}")
                if cuda:
                    return self.ninja(ext, cxx, nvcc, cuda, "cuda")
                why_not = "no architecture is asked for that this nvcc knows"
            except (CompileError, OSError, subprocess.CalledProcessError) as error:
                why_not = str(error)
        self.warn(f"{ext.name} is built for CPUs alone: {why_not}")
        self.ninja(ext, cxx, None, [], "cpu")

    def ninja(self, ext: Extension, cxx: str, nvcc: str | None, cuda: list[str], parts: str) -> None:
        """`parts`: "cpu", "cuda" with it, or "hopper" with both; each has a folder."""
        folder = Path(self.build_temp, parts).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        includes = [f"-isystem {shlex.quote(i)}" for i in (sysconfig.get_path("include"), pybind11.get_include())]
        own = f"-I {shlex.quote(str(ROOT / 'csrc'))}"
        flags = " ".join([CXX_FLAGS, own, *includes, os.environ.get("CXXFLAGS", "")])
        if nvcc:
            names = " ".join(cuda)
            flags += f" '-DEWA_CUDA=\"{names}\"'"
            host = shlex.quote(host_compiler(cxx))
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda]
            codes.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
            of_all = f"-ccbin {host} {NVCC_FLAGS} {own}"
            link = f"{shlex.quote(nvcc)} -ccbin {host} -shared -cudart static -Xlinker --exclude-libs=ALL"
            flags_of = dict.fromkeys(CUDA_SOURCES, f"{of_all} {CUDA_FLAGS} {' '.join(codes)}")
            if parts == "hopper":
                flags += " -DEWA_HOPPER"
                of_hopper = f"{of_all} -gencode=arch=compute_{HOPPER},code=sm_{HOPPER}"
                flags_of.update(dict.fromkeys(HOPPER_SOURCES, of_hopper))
        else:
            link = f"{cxx} -shared" if platform.system() != "Darwin" else f"{cxx} -bundle -undefined dynamic_lookup"
            flags_of = {}
        ldflags = os.environ.get("LDFLAGS", "")
        ldflags = by_nvcc(ldflags) if nvcc else ldflags
        text = [NINJA.format(cxx=cxx, nvcc=shlex.quote(nvcc or ""), link=link, ldflags=ldflags, check=CHECK)]
        cxx_sources = (*CXX_SOURCES, "hopper/bindings") if parts == "hopper" else CXX_SOURCES
        for name in cxx_sources:
            # The same bits on every processor: no multiply and add in one rounding where there is such an instruction.
            exact = " -ffp-contract=off" if name.startswith(("parameter_pass", "layer/codec", "exchange")) else ""
            text.append(f"build {name}.o: compile {escape(ROOT / 'csrc' / name)}.cpp\n  flags = {flags}{exact}\n")
        for name, of_source in flags_of.items():
            rule = "compile_hopper" if name in HOPPER_SOURCES else "compile_cuda"
            text.append(f"build {name}.o: {rule} {escape(ROOT / 'csrc' / name)}.cu\n  flags = {of_source}\n")
        objects = " ".join(f"{name}.o" for name in (*cxx_sources, *flags_of))
        text.append(f"build {target.name}: link {objects}\n")
        (folder / "build.ninja").write_text("\n".join(text))
        run_ninja(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


def escape(path: Path) -> str:
    """As build.ninja spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(folder: Path) -> None:
    """Raises CompileError with the errors, and the end of what the compiler said."""
    try:
        import ninja

        command = str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CompileError("ninja is not found: pip install ninja") from None
        command = found
    result = subprocess.run([command, "-C", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder / "build.log").write_text(result.stdout)
    print(result.stdout)
    if result.returncode != 0:
        lines = result.stdout.splitlines()
        errors = [line for line in lines[:-20] if re.search(r"\b(fatal|error|C75\d\d)\b|FAILED", line)]
        raise CompileError("\n".join([*errors[:10], *lines[-20:]]))


setup(
    ext_modules=[Extension("ewa_kernels._C", [], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
