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

class Format:
    def __init__(
        self,
        bits: int,
        scales: Sequence[float],
        symmetric: tuple[int, int, Sequence[float], Sequence[float]],
        parts: Sequence[tuple[int, int, Sequence[float], Sequence[float]]],
    ) -> None: ...

def encode_rows(format: Format, rows: tuple[int, int], n: int, columns: int, codes: int, scales: int) -> None: ...
def decode_rows(format: Format, codes: int, scales: int, n: int, columns: int, rows: tuple[int, int]) -> None: ...
def encode_gradient(values: tuple[int, int], n: int, codes: int, scales: int, residual: int) -> None: ...
def decode_gradient(codes: int, scales: int, n: int, out: tuple[int, int]) -> None: ...
def sum_gradients(codes: int, scales: int, count: int, stride: int, n: int, factor: float, out: int) -> None: ...
def merge_experts(experts: int, num_experts: int, numel: int, type: int, out: int) -> None: ...
def have_products(type: int) -> bool: ...

class TimesWeights:
    workspace_bytes: int
    def __init__(
        self,
        counts: Sequence[int],
        k: int,
        n: int,
        tokens: Matrix,
        rows: int,
        weights: Matrix,
        transposed: bool,
        bfloat16: bool,
    ) -> None: ...
    def multiply(self, workspace: int, bias: int, rows: int, out: Matrix) -> None: ...

class Outer:
    workspace_bytes: int
    def __init__(
        self,
        counts: Sequence[int],
        m: int,
        n: int,
        left: Matrix,
        left_rows: int,
        right: Matrix,
        right_rows: int,
        bfloat16: bool,
    ) -> None: ...
    def multiply(self, workspace: int, out: Matrix, sums: int) -> None: ...

# Types: of tokens; of up_weight, up_bias, down_weight and down_bias.
class Layer:
    def __init__(
        self,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: Activation,
        gated: bool,
        dropout_p: float,
        bfloat16: bool,
        tokens: int,
        types: Sequence[int],
        format: Format | None,
    ) -> None: ...

class LayerPass:
    num_blocks: int
    counts: list[list[int]]
    memory_bytes: int
    def __init__(self, layer: Layer, expert_offsets: int, block_rows: int, backward: bool) -> None: ...
    def forward(
        self,
        x: int,
        up_weight: int,
        up_bias: int,
        down_weight: int,
        down_bias: int,
        routing_weights: int,
        seed: int,
        permutation: int,
        deal: bool,
        y: int,
        pre_activation: int,
        memory: int,
    ) -> None: ...
    def backward(
        self,
        grad_y: int,
        x: int,
        up_weight: int,
        up_bias: int,
        down_weight: int,
        routing_weights: int,
        seed: int,
        permutation: int,
        pre_activation: int,
        grad_x: int,
        grad_up_weight: Matrix,
        grad_up_bias: int,
        grad_down_weight: Matrix,
        grad_down_bias: int,
        grad_routing: int,
        of_bias_factor: int,
        memory: int,
    ) -> None: ...

# Which architectures the CUDA part is compiled for, as "80 86"; None without it.
cuda: str | None
# Whether csrc/hopper is.
hopper: bool

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

# Where `hopper` is true, of csrc/hopper/layer.h: a call's seed, or its address; the table of groups that are given; the
# device, multiprocessors, stream, and whether launches overlap.
HopperOfCall = tuple[int, int, int, int, int, int, bool]
HopperRows = tuple[int, bool, int, int]

class HopperActivation: ...
class HopperCall: ...

class HopperLayer:
    slots: int
    table_size: int
    num_flags: int
    def __init__(
        self,
        is_bfloat16: bool,
        num_rows: int,
        num_experts: int,
        d_model: int,
        d_ff: int,
        top_k: int,
        is_given: bool,
        activation: HopperActivation,
        gated: bool,
        radices: Sequence[int],
        dropout_threshold: int,
        dropout_scale: float,
    ) -> None: ...
    def splits_of(self, size_m: int, size_n: int) -> int: ...

def hopper_tabulate(layer: HopperLayer, of_call: HopperOfCall, expert_offsets: int, table: int) -> None: ...
def hopper_gather(
    layer: HopperLayer,
    of_call: HopperOfCall,
    rows: HopperRows,
    x: int,
    grad_y: int,
    of_grad_y: int,
    weighted: int,
    routing_weights: int,
) -> None: ...
def hopper_forward(
    layer: HopperLayer,
    of_call: HopperOfCall,
    rows: HopperRows,
    up_weight: int,
    up_bias: Matrix,
    pre_activation: int,
    hidden: int,
    down_weight: int,
    down_bias: Matrix,
    permutation: int,
    routing_weights: int,
    out: Matrix,
    flags: int,
) -> None: ...
def hopper_product(
    call: HopperCall,
    layer: HopperLayer,
    of_call: HopperOfCall,
    *,
    rows: HopperRows = ...,
    a: int = 0,
    b: int = 0,
    bias: Matrix = ...,
    permutation: int = 0,
    routing_weights: int = 0,
    partial_routing: int = 0,
    pre_activation: int = 0,
    hidden: int = 0,
    out: Matrix = ...,
    size_m: int = 0,
    size_n: int = 0,
    splits: int = 1,
    parts: int = 0,
    part_sums: int = 0,
    sums: Matrix = ...,
) -> None: ...

# (of the driver, of the build), as 1000 * major + 10 * minor.
def cuda_versions() -> tuple[int, int]: ...
