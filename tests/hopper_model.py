"""csrc/hopper in the model of sm_90a on the host, for Python: its structures, its library, its functions."""

import ctypes
import importlib.util
import itertools
import subprocess
import sysconfig

import pybind11
import torch
from host_model import MODEL, ROOT, compiler, flags

from ewa_kernels.kernels.triton.permutation import radices

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "identity")
NUMBER_TYPES = [None, torch.float32, torch.bfloat16, torch.float16]
CALLS = ("up", "down", "grad_pre", "grad_x", "grad_weight")
POINTER, INT, INT64, UINT32, UINT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
BOOL, FLOAT = ctypes.c_bool, ctypes.c_float


class Seed(ctypes.Structure):
    """`ewa::hopper::Seed`, and likewise those that follow."""

    _fields_ = (("value", UINT64), ("at", POINTER))


class Where(ctypes.Structure):
    _fields_ = (("device", INT), ("multiprocessors", INT), ("stream", POINTER), ("overlaps", BOOL))


class Layer(ctypes.Structure):
    _fields_ = (
        ("is_bfloat16", BOOL),
        *((name, INT) for name in ("num_rows", "num_experts", "d_model", "d_ff", "top_k")),
        ("is_given", BOOL),
        ("activation", INT),
        ("gated", BOOL),
        *((name, UINT32) for name in ("radix_a", "radix_b", "rounds", "dropout_threshold")),
        ("dropout_scale", FLOAT),
        ("seed", Seed),
        ("table", POINTER),
        ("where", Where),
    )

    @property
    def num_up(self):
        return self.d_ff * (2 if self.gated else 1)

    @property
    def sizes(self):
        """Rows of each expert."""
        if self.is_given:
            return self.given
        starts = [e * self.num_rows // self.num_experts for e in range(self.num_experts + 1)]
        return [b - a for a, b in itertools.pairwise(starts)]

    @property
    def first_slots(self):
        """Of each expert, and one past all that are used."""
        of_expert = [-(-size // 64) * 64 if self.is_given else max(self.sizes) for size in self.sizes]
        return [0, *itertools.accumulate(of_expert)]

    @property
    def slots(self):
        return (self.num_rows // 64 + self.num_experts) * 64 if self.is_given else self.first_slots[-1]

    def by_slot(self, rows):
        """`[slots, …]` of `[R, …]`, zeros where there is no row, and NaN where no expert is."""
        slots = torch.full((self.slots, rows.shape[-1]), torch.nan, dtype=rows.dtype)
        slots[: self.first_slots[-1]] = 0
        for slot, of_expert in zip(self.first_slots, rows.split(self.sizes), strict=False):
            slots[slot : slot + len(of_expert)] = of_expert
        return slots

    def by_row(self, slots):
        return torch.cat([slots[slot : slot + n] for slot, n in zip(self.first_slots, self.sizes, strict=False)])

    def empty(self, columns, dtype):
        return torch.full((self.slots, columns), torch.nan, dtype=dtype)


def layer_of(
    dtype, num_rows, groups, d_model, d_ff, activation="gelu", gated=False, seed=0, dropout_p=0.0, top_k=1
):  # fmt: skip
    """`groups`: how many experts, or how many rows each has."""
    is_given = not isinstance(groups, int)
    layer = Layer(
        dtype == torch.bfloat16, num_rows, len(groups) if is_given else groups, d_model, d_ff, top_k, is_given,
        ACTIVATIONS.index(activation), gated, *radices(max(num_rows, 1)), round(dropout_p * 2**32), 1 / (1 - dropout_p),
        Seed(seed), None, Where(0, 132, None, True),
    )  # fmt: skip
    layer.given = list(groups) if is_given else None
    assert not is_given or sum(groups) == num_rows
    return layer


class Rows(ctypes.Structure):
    _fields_ = (("data", POINTER), ("by_token", BOOL), ("permutation", POINTER), ("dealt", POINTER))


class Number(ctypes.Structure):
    """`Bias`, and `Output`."""

    _fields_ = (("data", POINTER), ("type", INT))


class Operands(ctypes.Structure):
    _fields_ = (
        ("rows", Rows),
        ("a", POINTER),
        ("b", POINTER),
        ("bias", Number),
        *(
            (name, POINTER)
            for name in ("permutation", "routing_weights", "partial_routing", "pre_activation", "hidden")
        ),
        ("out", Number),
        ("size_m", INT),
        ("size_n", INT),
        ("splits", INT),
        ("parts", POINTER),
        ("part_sums", POINTER),
        ("sums", Number),
    )


class Gathered(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("x", "grad_y", "of_grad_y", "weighted", "routing_weights"))


def compile_sources(folder, others, target):
    """The kernels, and other sources, for the model."""
    sources = [*sorted((ROOT / "csrc/hopper").glob("*.cu")), MODEL / "hopper_layer.cpp", *others]
    objects = [folder / f"{source.stem}.o" for source in sources]
    python = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    commands = [
        [compiler(), *flags(), *python, "-fPIC", "-x", "c++", "-c", source, "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    subprocess.run([compiler(), "-shared", *objects, "-o", folder / target], check=True)
    return str(folder / target)


def build_module(folder):
    """What `ewa_kernels._C` has of the kernels, and `set_machine`."""
    others = [ROOT / "csrc/hopper/bindings.cpp", MODEL / "hopper_module.cpp"]
    path = compile_sources(folder, others, "hopper_on_host.so")
    spec = importlib.util.spec_from_file_location("hopper_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder):
    """The library of the kernels."""
    library = ctypes.CDLL(compile_sources(folder, [], "hopper.so"))
    for name in ("run", "forward", "gather", "tabulate"):
        getattr(library, name).restype = ctypes.c_char_p
    library.table_size.restype = INT64
    return library


def pointers(tensors):
    return {name: None if t is None else t.data_ptr() for name, t in tensors.items()}


def number(tensor):
    return Number() if tensor is None else Number(tensor.data_ptr(), NUMBER_TYPES.index(tensor.dtype))


def tabulate(kernels, layer, offsets=None):
    """Once, where groups are given. Returns the table."""
    if not layer.is_given or (layer.table is not None and offsets is None):
        return None
    layer.of_table = torch.full((kernels.table_size(ctypes.byref(layer)),), -1, dtype=torch.int32)
    offsets = torch.tensor([0, *itertools.accumulate(layer.given)]).int() if offsets is None else offsets
    layer.table = layer.of_table.data_ptr()
    at = [ctypes.c_void_p(t.data_ptr()) for t in (offsets, layer.of_table)]
    assert kernels.tabulate(ctypes.byref(layer), *at) == b""
    return layer.of_table


def operands_of(*, rows=None, bias=None, out=None, sums=None, size_m=0, size_n=0, splits=1, **tensors):
    numbers = {"bias": number(bias), "out": number(out), "sums": number(sums)}
    return Operands(rows=rows or Rows(), size_m=size_m, size_n=size_n, splits=splits, **numbers, **pointers(tensors))


def run(kernels, call, layer, **operands):
    tabulate(kernels, layer)
    assert kernels.run(CALLS.index(call), ctypes.byref(layer), ctypes.byref(operands_of(**operands))) == b""
