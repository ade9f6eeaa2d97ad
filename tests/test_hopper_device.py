"""What nvcc makes of the kernels of csrc/hopper: nothing is spilled or serialised, and the instructions are there."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_model import MODEL, nvcc_as_shipped

SOURCE = MODEL / "hopper_device.cu"


@dataclass
class Kernel:
    name: str  # what the mangled name is found by
    columns: int
    products: int  # of a step: 4 of 16 k, for each block of 64 rows
    stores: bool  # by TMA
    gathers: bool = False
    sums: bool = False  # over rows: a loop has a product of 8 columns more
    second: int = 0  # columns of another product in the same launch


KERNELS = {
    "gelu": Kernel("ELb1ELb0EE.*11StoreHidden.*4GeluELb0ELb0E", 192, 8, True),
    "gelu, gathered": Kernel("ELb1ELb1EE.*11StoreHidden.*4GeluELb0ELb0E", 192, 8, True, gathers=True),
    "silu, gated": Kernel("11StoreHidden.*4SiluELb1ELb0E", 128, 8, True),
    "gelu, dropout": Kernel("11StoreHidden.*4GeluELb0ELb1E", 128, 8, True),
    "down": Kernel("5MajorE0ELS4_0E.*14StoreScattered", 256, 4, False),
    "grad_x": Kernel("5MajorE0ELS4_1E.*14StoreScattered", 256, 4, False),
    "grad_pre, gelu": Kernel("12StoreGradPre.*4GeluELb0", 128, 8, True),
    "grad_pre, silu, gated": Kernel("12StoreGradPre.*4SiluELb1", 128, 8, True),
    "grad_pre, gelu, gated, scaled": Kernel("12StoreGradPre.*4GeluELb1ELb1", 128, 8, True),
    "both projections": Kernel("11StoreHidden.*4GeluELb0ELb0E.*14StoreScattered", 128, 8, True, True, second=256),
    "gradients of weights": Kernel("StoreSummedI.*Lb0EEEEE", 256, 4, True, sums=True),
    "gradients of weights, in parts": Kernel("StoreSummedI.*Lb1EEEEE", 256, 4, True, sums=True),
}
PRODUCING, MULTIPLYING = 0x28, 0xE8  # registers of a thread


pytestmark = pytest.mark.slow  # a minute of nvcc; the default tests run what it compiles, on the host


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The cubin, and what ptxas said of each kernel."""
    cubin = tmp_path_factory.mktemp("device") / "hopper.cubin"
    result = subprocess.run([*nvcc_as_shipped(), "-cubin", SOURCE, "-o", cubin], capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    return cubin, said


@pytest.fixture(scope="module")
def code(compiled):
    """Instructions of each kernel by its mangled name."""
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    nvdisasm = shutil.which("nvdisasm") or next((shutil.which(folder / "nvdisasm") for folder in folders), None)
    if nvdisasm is None:
        pytest.skip("no nvdisasm")
    text = subprocess.run([nvdisasm, "-c", compiled[0]], capture_output=True, text=True, check=True).stdout
    names_and_code = re.split(r"^\.text\.(\S+):\n", text, flags=re.MULTILINE)[1:]
    instructions = [re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part) for part in names_and_code[1::2]]
    return dict(zip(names_and_code[::2], instructions, strict=True))


def opcode(instruction):
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0]


def test_nothing_is_spilled_or_serialised(compiled):
    # C7504 to C7515 say that setmaxnreg is ignored, or that products wait for one another.
    said = compiled[1]
    assert not re.search(r"C75\d\d", said), said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills == [("0", "0", "0")] * (len(KERNELS) + 1), said  # and the sum of parts


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_instructions(kernel, code):
    kind = "11pair_kernel" if kernel.second else "14product_kernel"
    (instructions,) = (some for name, some in code.items() if re.search(f"{kind}.*{kernel.name}", name))
    opcodes = [opcode(instruction) for instruction in instructions]

    def having(pattern):
        return [i for i, name in zip(instructions, opcodes, strict=True) if re.match(pattern, name)]

    highest = max(int(number) for i in instructions for number in re.findall(r"\bR(\d+)\b", i))
    print(f"{kernel.name}: registers up to R{highest}, {len(instructions)} instructions")
    assert highest < MULTIPLYING
    registers = sorted(int(re.search(r"0x[0-9a-f]+", i).group(), 16) for i in having("USETMAXREG"))
    assert registers == [PRODUCING, MULTIPLYING]
    assert having("LDL|STL") == []

    # All products of a step, and then a wait that leaves them in flight; after the last step one for all.
    between, waits = [0], []
    for instruction, name in zip(instructions, opcodes, strict=True):
        if name.startswith("HGMMA"):
            is_sum = kernel.sums and "HGMMA.64x8x16.F32.BF16" in instruction
            (columns,) = re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16", instruction)
            assert is_sum or int(columns) in (kernel.columns, kernel.second)
            between[-1] += 1
        elif name == "WARPGROUP.DEPBAR.LE":
            waits.append(instruction.split()[-1])
            between.append(0)
    others = ({2 * kernel.products} if kernel.sums else set()) | ({4} if kernel.second else set())
    assert set(between) == {0, kernel.products} | others
    assert {wait for wait, count in zip(waits, between, strict=False) if count} == {"0x1"}
    assert waits[-1] == "0x0"

    loads = having("UTMALDG")
    assert any(".MULTICAST" in i for i in loads)
    assert any(".MULTICAST" not in i for i in loads) != (kernel.gathers and not kernel.second)
    assert bool(having("LDGSTS")) == kernel.gathers
    assert bool(having("UTMASTG")) == kernel.stores
    # One that gathers also notes the permutation; one that scales, what routing weights get.
    others = kernel.gathers or kernel.sums or kernel.name.endswith("ELb1ELb1")
    assert bool(having("STG")) == (others or not kernel.stores)
