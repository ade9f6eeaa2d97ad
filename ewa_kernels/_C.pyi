"""See csrc/cpu.h. Addresses and sizes in elements; 0 stands for no tensor."""

class Activation:
    gelu: Activation
    gelu_tanh: Activation
    relu: Activation
    relu2: Activation
    silu: Activation
    identity: Activation

def random_permutation(num_tokens: int, seed: int, out: int) -> None: ...
def gather_rows(in_: int, tokens: int, n: int, d: int, out: int) -> None: ...
def scatter_rows(in_: int, bias: int, tokens: int, n: int, rows_per_expert: int, d: int, out: int) -> None: ...
def activate(
    activation: Activation,
    gated: bool,
    n: int,
    rows_per_expert: int,
    d_ff: int,
    scale: int,
    bias: int,
    pre: int,
    hidden: int,
) -> None: ...
def activate_backward(
    activation: Activation,
    gated: bool,
    n: int,
    rows_per_expert: int,
    d_ff: int,
    scale: int,
    pre: int,
    grad_hidden: int,
    grad_pre: int,
    hidden: int,
    grad_bias: int,
    beta: float,
) -> None: ...
