"""See the headers in csrc/. Addresses and sizes in elements; 0 stands for no tensor."""

from collections.abc import Sequence

class Activation:
    gelu: Activation
    gelu_tanh: Activation
    quick_gelu: Activation
    relu: Activation
    relu2: Activation
    silu: Activation
    identity: Activation

def random_permutation(num_tokens: int, seed: int, out: int) -> None: ...

# Address and type of rows: see ewa_kernels/kernels/blocked/cpp_rows.py.
Matrix = tuple[int, int]

def gather_rows(in_: Matrix, tokens: int, n: int, d: int, out: Matrix) -> None: ...
def scatter_rows(
    in_: Matrix, bias: int, factor: int, tokens: int, n: int, rows_per_expert: int, d: int, out: Matrix
) -> None: ...

class Block:
    def __init__(
        self, n: int, rows_per_expert: int, d_ff: int, gated: bool, rows: int, seed: int, dropout_p: float
    ) -> None: ...

def activate(activation: Activation, block: Block, bias: int, product: Matrix, pre: Matrix, hidden: Matrix) -> None: ...
def activate_backward(
    activation: Activation,
    block: Block,
    pre: Matrix,
    grad_hidden: Matrix,
    factor: int,
    grad_pre: Matrix,
    hidden: Matrix,
    grad_factor: int,
) -> None: ...
def have_products(type: int) -> bool: ...

class Tokens:
    def __init__(self, matrix: Matrix, rows: int, factor: int) -> None: ...

# `rows`: of each expert.
class TimesWeights:
    def __init__(
        self, rows: Sequence[int], k: int, n: int, tokens: Tokens, weights: Matrix, transposed: bool, bfloat16: bool
    ) -> None: ...
    def workspace_floats(self) -> int: ...

class Outer:
    def __init__(self, rows: Sequence[int], m: int, n: int, left: Tokens, right: Tokens, bfloat16: bool) -> None: ...
    def workspace_floats(self) -> int: ...

def multiply_and_activate(
    product: TimesWeights,
    workspace: int,
    activation: Activation,
    block: Block,
    bias: int,
    pre: Matrix,
    hidden: Matrix,
) -> None: ...
def multiply_and_scatter(
    product: TimesWeights, workspace: int, bias: int, factor: int, tokens: int, out: Matrix
) -> None: ...
def multiply_and_activate_backward(
    product: TimesWeights,
    workspace: int,
    activation: Activation,
    block: Block,
    pre: Matrix,
    factor: int,
    grad_pre: Matrix,
    hidden: Matrix,
    grad_factor: int,
) -> None: ...
def multiply_outer(product: Outer, workspace: int, beta: float, result: Matrix, sums: int) -> None: ...

# Which architectures the CUDA part is compiled for, as "80 86"; None without it.
cuda: str | None

class Table:
    def __init__(
        self,
        groups: Sequence[tuple[int, int, int, int, bool]],
        rows: Sequence[tuple[Sequence[int], Sequence[int], int]],
    ) -> None: ...
    def set(self, addresses: Sequence[int], options: Sequence[tuple[float, ...]]) -> bool: ...

class Scalars:
    def __init__(
        self,
        share_rate: float,
        share_rate_at: int,
        share_rate_is_double: bool,
        stochastic: bool,
        seed: int,
        seed_at: int,
        grad_scale: int,
        found_inf: int,
    ) -> None: ...

def parameter_pass_cpu(table: Table, scalars: Scalars) -> None: ...

# Where `cuda` is None, there is nothing of what follows.
class CudaPlan:
    memory_bytes: int
    def __init__(self, table: Table) -> None: ...

def parameter_pass_cuda(
    plan: CudaPlan, scalars: Scalars, memory: int, counter: int, device: int, stream: int
) -> None: ...

# (of the driver, of the build), as 1000 * major + 10 * minor.
def cuda_versions() -> tuple[int, int]: ...
