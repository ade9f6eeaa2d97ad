"""Bad input: the exact message, before anything is launched or changed."""

import copy

import pytest
import torch
from models import Mlp, Transformer
from torch import nn

import ewa_kernels as ewa

X = torch.zeros(5, 6)
OPERANDS = {
    "x": X,
    "up_weight": torch.zeros(4, 10, 6),
    "up_bias": torch.zeros(4, 10),
    "down_weight": torch.zeros(4, 6, 10),
    "down_bias": torch.zeros(4, 6),
}


def moe_ffn(**changes):
    arguments = {**OPERANDS, "seed": 0, **changes}
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
    operands = [arguments.pop(name) for name in names]
    return ewa.functional.moe_ffn(*operands, **arguments)


def grouped_ffn(**changes):
    partition = {"permutation": torch.arange(5), "expert_offsets": torch.tensor([0, 1, 1, 3, 5])}
    arguments = {**OPERANDS, **partition, **changes}
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias")
    operands = [arguments.pop(name) for name in names]
    return ewa.functional.grouped_ffn(*operands, **arguments)


def average(tensors, share_rate=0.3, **options):
    return ewa.functional.average_experts_(tensors, share_rate, **options)


def replace(**options):
    return ewa.replace_ffn_(Transformer(Mlp(), Mlp()), **options)


E46 = torch.zeros(4, 6)

CASES = [
    # moe_ffn: kinds, dtypes, devices
    (lambda: moe_ffn(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (
        lambda: moe_ffn(x=X.int()),
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    (lambda: moe_ffn(x=X.double()), TypeError, "up_weight must be torch.float64 like x, got torch.float32"),
    (lambda: moe_ffn(up_weight=None), TypeError, "up_weight must be a Tensor, got NoneType"),
    (
        lambda: moe_ffn(down_bias=torch.zeros(4, 6, device="meta")),
        TypeError,
        "down_bias must be on cpu like x, got meta",
    ),
    (lambda: moe_ffn(gated=1), TypeError, "gated must be a bool, got int 1"),
    (lambda: moe_ffn(dropout_p="0.1"), TypeError, "dropout_p must be a number in [0, 1], got str '0.1'"),
    (lambda: moe_ffn(seed=1.0), TypeError, "seed must be an int or an int64 tensor, got float 1.0"),
    (lambda: moe_ffn(seed=True), TypeError, "seed must be an int or an int64 tensor, got bool True"),
    (
        lambda: moe_ffn(seed=torch.tensor(1, dtype=torch.int32)),
        TypeError,
        "seed must be an int or an int64 tensor, got a torch.int32 tensor",
    ),
    (
        lambda: moe_ffn(seed=torch.zeros((), dtype=torch.int64, device="meta")),
        TypeError,
        "seed must be on the CPU or on cpu like x, got meta",
    ),
    # moe_ffn: shapes and ranges
    (lambda: moe_ffn(x=torch.zeros(5, 7)), ValueError, "x must be [..., D] with D = 6, got [5, 7]"),
    (lambda: moe_ffn(x=torch.zeros(())), ValueError, "x must be [..., D] with D = 6, got []"),
    (
        lambda: moe_ffn(up_weight=torch.zeros(10, 6)),
        ValueError,
        "up_weight must be [E, F, D] with no size 0, got [10, 6]",
    ),
    (
        lambda: moe_ffn(up_weight=torch.zeros(0, 10, 6)),
        ValueError,
        "up_weight must be [E, F, D] with no size 0, got [0, 10, 6]",
    ),
    (
        lambda: moe_ffn(down_weight=torch.zeros(3, 6, 10)),
        ValueError,
        "down_weight must be [E, D, F] = [4, 6, 10], got [3, 6, 10]",
    ),
    (
        lambda: moe_ffn(gated=True),
        ValueError,
        "down_weight must be [E, D, F] = [4, 6, 5], got [4, 6, 10]",
    ),
    (
        lambda: moe_ffn(up_weight=torch.zeros(4, 11, 6), gated=True),
        ValueError,
        "up_weight must have an even number of rows (gate, then value) if gated, got 11",
    ),
    (lambda: moe_ffn(up_bias=torch.zeros(10)), ValueError, "up_bias must be [E, F] = [4, 10], got [10]"),
    (lambda: moe_ffn(down_bias=torch.zeros(4, 1)), ValueError, "down_bias must be [E, D] = [4, 6], got [4, 1]"),
    (lambda: moe_ffn(seed=-1), ValueError, "seed must be in 0…2^63−1, got -1"),
    (lambda: moe_ffn(seed=2**63), ValueError, "seed must be in 0…2^63−1, got 9223372036854775808"),
    (lambda: moe_ffn(seed=torch.tensor(-5)), ValueError, "seed must be in 0…2^63−1, got -5"),
    (
        lambda: moe_ffn(x=X.to_sparse()),
        TypeError,
        "x must be dense (torch.strided), got torch.sparse_coo",
    ),
    (lambda: moe_ffn(seed=torch.zeros(2).long()), ValueError, "seed must have one element, got shape [2]"),
    (
        lambda: moe_ffn(activation="tanh"),
        ValueError,
        "activation must be one of gelu, gelu_tanh, quick_gelu, relu, relu2, silu, identity, got 'tanh'",
    ),
    (lambda: moe_ffn(dropout_p=1.5), ValueError, "dropout_p must be in [0, 1], got 1.5"),
    (lambda: moe_ffn(dropout_p=float("nan")), ValueError, "dropout_p must be in [0, 1], got nan"),
    (
        lambda: moe_ffn(x=torch.zeros(1, 6).expand(2**31, 6)),
        ValueError,
        "x must hold fewer than 2^31 tokens, got 2147483648",
    ),
    # backends
    (
        lambda: moe_ffn(backend="fast"),
        ValueError,
        "backend must be one of auto, reference, torch, triton, triton-single, triton-split, triton-onchip, cublas, "
        "hopper, cuda, cpp, got 'fast'",
    ),
    (
        lambda: moe_ffn(backend="cuda"),
        ewa.BackendError,
        "backend='cuda' cannot run moe_ffn on cpu: ewa_kernels 0.2.0 has triton, cpp, torch, reference, triton-single, "
        "triton-split, triton-onchip, cublas and hopper only",
    ),
    (
        lambda: moe_ffn(**{name: t.double() for name, t in OPERANDS.items()}, backend="triton"),
        ewa.BackendError,
        "backend='triton' cannot run moe_ffn on cpu: it is for torch.float16, torch.bfloat16 and torch.float32, "
        "not torch.float64",
    ),
    (
        lambda: moe_ffn(
            x=torch.zeros(5, 500),
            up_weight=torch.zeros(4, 10, 500),
            down_weight=torch.zeros(4, 500, 10),
            down_bias=None,
            backend="triton-onchip",
        ),
        ValueError,
        "backend='triton-onchip' is for 16-bit types and small d_model, got torch.float32 and 500: "
        "use backend='triton'",
    ),
    (lambda: moe_ffn(recompute=1), TypeError, "recompute must be a bool, got int 1"),
    # a given partition
    (lambda: grouped_ffn(permutation=[0]), TypeError, "permutation must be a Tensor, got list [0]"),
    (lambda: grouped_ffn(permutation=X), TypeError, "permutation must be int32 or int64, got torch.float32"),
    (lambda: grouped_ffn(permutation=torch.arange(4)), ValueError, "permutation must be [T] = [5], got [4]"),
    (
        lambda: grouped_ffn(permutation=torch.tensor([0, 1, 2, 3, 3])),
        ValueError,
        "permutation must hold each of 0…4 once",
    ),
    (
        lambda: grouped_ffn(expert_offsets=torch.tensor([0, 5])),
        ValueError,
        "expert_offsets must be [E + 1] = [5], got [2]",
    ),
    (
        lambda: grouped_ffn(expert_offsets=torch.tensor([0, 3, 2, 5, 5])),
        ValueError,
        "expert_offsets must rise from 0 to T = 5, got [0, 3, 2, 5, 5]",
    ),
    (
        lambda: grouped_ffn(expert_offsets=torch.zeros(5, dtype=torch.int32, device="meta")),
        TypeError,
        "expert_offsets must be on cpu like x, got meta",
    ),
    (
        lambda: average([E46], backend="torch"),
        ewa.BackendError,
        "backend='torch' cannot run average_experts_ on cpu: "
        "ewa_kernels 0.2.0 has cuda, triton, cpp and reference only",
    ),
    (
        lambda: moe_ffn(**{name: t.double() for name, t in OPERANDS.items()}, backend="cpp"),
        ewa.BackendError,
        "backend='cpp' cannot run moe_ffn on cpu: it is for torch.float16, torch.bfloat16 and torch.float32, not "
        "torch.float64",
    ),
    # permutation
    (lambda: ewa.functional.random_permutation(-1, 0), ValueError, "num_tokens must be at least 0, got -1"),
    (
        lambda: ewa.functional.random_permutation(2**31, 0),
        ValueError,
        "num_tokens must be less than 2147483648, got 2147483648",
    ),
    (lambda: ewa.functional.random_permutation(1.0, 0), TypeError, "num_tokens must be an int, got float 1.0"),
    (lambda: ewa.functional.expert_offsets(4, 0), ValueError, "num_experts must be at least 1, got 0"),
    # averaging
    (lambda: average(E46), TypeError, "tensors must be a list of stacked tensors [E, ...], got one Tensor"),
    (lambda: average(3), TypeError, "tensors must be a list of stacked tensors [E, ...], got int"),
    (lambda: average([E46, 3]), TypeError, "tensors[1] must be a Tensor, got int"),
    (
        lambda: average([E46.long()]),
        TypeError,
        "tensors[0] must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (
        lambda: average([E46, torch.zeros(())]),
        ValueError,
        "tensors[1] must have a leading expert dimension [E, ...], got shape []",
    ),
    (
        lambda: average([torch.zeros(0, 3)]),
        ValueError,
        "tensors[0] must hold at least one expert, got shape [0, 3]",
    ),
    (
        lambda: average([[E46, torch.zeros(4, 5)]]),
        ValueError,
        "tensors[0][1] must have the shape of tensors[0][0], torch.Size([4, 6]), got torch.Size([4, 5])",
    ),
    (
        lambda: average([[E46, E46.double()]]),
        TypeError,
        "tensors[0][1] must have the dtype of tensors[0][0], torch.float32, got torch.float64",
    ),
    (lambda: average([[]]), ValueError, "tensors[0] must hold at least one expert, got an empty list"),
    (
        lambda: average([E46, E46]),
        ValueError,
        "tensors[1] must not be given twice: it would be averaged twice",
    ),
    (
        lambda: average([E46.expand(2, 4, 6)]),
        ValueError,
        "tensors[0] must have memory of its own for every element, got strides [0, 6, 1] for shape [2, 4, 6]",
    ),
    (lambda: average([E46], 1.5), ValueError, "share_rate must be in [0, 1], got 1.5"),
    (lambda: average([E46], float("nan")), ValueError, "share_rate must be in [0, 1], got nan"),
    (lambda: average([E46], torch.tensor(-0.5)), ValueError, "share_rate must be in [0, 1], got -0.5"),
    (lambda: average([E46], torch.zeros(2)), ValueError, "share_rate must have one element, got shape [2]"),
    (lambda: average([E46], rounding="up"), ValueError, "rounding must be one of stochastic, nearest, got 'up'"),
    (lambda: average([E46], seed=torch.tensor(-1)), ValueError, "seed must be in 0…2^63−1, got -1"),
    (lambda: average([E46], seed=-1), ValueError, "seed must be in 0…2^63−1, got -1"),
    (lambda: average([E46], found_inf=torch.zeros(2)), ValueError, "found_inf must have one element, got shape [2]"),
    (lambda: average([E46], found_inf=True), TypeError, "found_inf must be a Tensor, got bool"),
    (
        lambda: ewa.ExpertAverager([E46], 0.3, rounding=None),
        ValueError,
        "rounding must be one of stochastic, nearest, got None",
    ),
    (lambda: ewa.ExpertAverager([E46], 0.3, seed=2**63), ValueError, f"seed must be less than {2**63}, got {2**63}"),
    (
        lambda: average([E46], backend="cuda"),
        ewa.BackendError,
        "backend='cuda' cannot run average_experts_ on cpu: it is for CUDA devices",
    ),
    (lambda: average([E46], "0.3"), TypeError, "share_rate must be a number in [0, 1], got str '0.3'"),
    (
        lambda: ewa.functional.merge_experts(torch.zeros(2).int()),
        TypeError,
        "tensor must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    # layer
    (lambda: ewa.RandomPartitionMoE(8, 0, 4), ValueError, "d_ff must be at least 1, got 0"),
    (lambda: ewa.RandomPartitionMoE(8, 16, 4.0), TypeError, "num_experts must be an int, got float 4.0"),
    (lambda: ewa.RandomPartitionMoE(8, 16, 4, dropout=-0.1), ValueError, "dropout must be in [0, 1], got -0.1"),
    (
        lambda: ewa.RandomPartitionMoE(8, 16, 4, activation="swish"),
        ValueError,
        "activation must be one of gelu, gelu_tanh, quick_gelu, relu, relu2, silu, identity, got 'swish'",
    ),
    (lambda: ewa.RandomPartitionMoE(6, 8, 4)([1.0]), TypeError, "x must be a Tensor, got list"),
    (
        lambda: ewa.RandomPartitionMoE(6, 8, 4).eval()(torch.zeros(3, 7)),
        ValueError,
        "x must be [..., D] with D = 6, got [3, 7]",
    ),
    (
        lambda: ewa.RandomPartitionMoE(6, 8, 4).eval()(torch.zeros(3, 6).double()),
        TypeError,
        "up_weight must be torch.float64 like x, got torch.float32",
    ),
    (
        lambda: ewa.RandomPartitionMoE(6, 8, 4).eval()(X, seed="abc"),
        TypeError,
        "seed must be an int or an int64 tensor, got str 'abc'",
    ),
    # surgery
    (lambda: ewa.find_ffns([1]), TypeError, "model must be an nn.Module, got list"),
    (lambda: ewa.fold_(None), TypeError, "model must be an nn.Module, got NoneType"),
    (lambda: replace(num_experts=0), ValueError, "num_experts must be at least 1, got 0"),
    (lambda: replace(init="zeros"), ValueError, "init must be one of copy, independent, got 'zeros'"),
    (
        lambda: replace(filter_fn="mlp"),
        TypeError,
        "filter_fn must be a callable (name, module) -> bool, got str",
    ),
    (
        lambda: ewa.register_ffn_adapter("Mlp", up="fc1", down="fc2"),
        TypeError,
        "module_class must be a subclass of nn.Module, got 'Mlp'",
    ),
    (
        lambda: ewa.register_ffn_adapter(Mlp, up=(), down="fc2"),
        ValueError,
        "up must be one name, or two for a GLU, got []",
    ),
    # weight decay
    (
        lambda: ewa.weight_decay_groups(Mlp(), True),
        TypeError,
        "weight_decay must be a number of at least 0, got bool True",
    ),
    (lambda: ewa.weight_decay_groups(Mlp(), 1e999), ValueError, "weight_decay must be finite and at least 0, got inf"),
    # averager
    (
        lambda: ewa.ExpertAverager(nn.Linear(2, 2), 0.3),
        ValueError,
        "experts must hold something to average, got a model without experts: call replace_ffn_(model) first",
    ),
    (
        lambda: ewa.ExpertAverager([], 0.3),
        ValueError,
        "experts must hold something to average, got an empty iterable",
    ),
    (
        lambda: ewa.ExpertAverager([("w", E46), ("w", E46.clone())], 0.3),
        ValueError,
        "experts must have names of their own, got 'w' twice",
    ),
    (
        lambda: ewa.ExpertAverager([E46], 0.3).load_state_dict({"num_steps": 7}),
        ValueError,
        "state_dict must have num_steps and schedule, lacks schedule",
    ),
    (
        lambda: ewa.register_ffn_adapter(Mlp, up=3, down="fc2"),
        TypeError,
        "up and down must be names of nn.Linear modules, got int 3",
    ),
    (
        lambda: ewa.ExpertAverager([E46, 3], 0.3),
        TypeError,
        "experts[1] must be a stacked tensor [E, ...] or a list of E tensors, got int",
    ),
    (
        lambda: ewa.ExpertAverager([("w", None)], 0.3),
        TypeError,
        "experts['w'] must be a stacked tensor [E, ...] or a list of E tensors, got NoneType",
    ),
    (lambda: ewa.ExpertAverager([E46], 2), ValueError, "share_rate must be in [0, 1], got 2"),
    (lambda: ewa.ExpertAverager([E46], lambda step: 7.0).step(), ValueError, "share_rate must be in [0, 1], got 7.0"),
    (
        lambda: ewa.ExpertAverager([E46], 0.3).attach(nn.Linear(2, 2)),
        TypeError,
        "optimizer must be a torch.optim.Optimizer, got Linear",
    ),
    (lambda: ewa.ConstantShareRate(1.1), ValueError, "value must be in [0, 1], got 1.1"),
    (lambda: ewa.LinearShareRate(0.3, 0), ValueError, "num_steps must be at least 1, got 0"),
    (
        lambda: ewa.CosineShareRate(0.3, 5, start_step=4, stop_step=3),
        ValueError,
        "stop_step must be at least 4, got 3",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[message[:50] for _, _, message in CASES])
def test_message(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_what_autocast_allows_is_not_remembered_without_it():
    wide = X.double()
    with torch.autocast("cpu", torch.bfloat16):
        moe_ffn(x=wide)
    with pytest.raises(TypeError, match=r"up_weight must be torch\.float64 like x"):
        moe_ffn(x=wide)


def test_backend_error_is_a_value_and_a_runtime_error():
    assert issubclass(ewa.BackendError, ValueError)
    assert issubclass(ewa.BackendError, RuntimeError)


def test_one_bad_tensor_in_a_list_changes_none():
    good, bad = torch.randn(4, 6), torch.zeros(())
    before = good.clone()
    for tensors in ([good, bad], [good, [good[0], bad]], [good, good]):
        with pytest.raises(ValueError, match="must"):
            average(tensors)
        assert torch.equal(good, before)


def test_attaching_twice():
    model = nn.Sequential(ewa.RandomPartitionMoE(4, 8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = ewa.ExpertAverager(model, 0.3)
    averager.attach(optimizer)
    with pytest.raises(ValueError, match="optimizer must be the only one attached to"):
        averager.attach(optimizer)


def test_a_failed_replace_leaves_the_model_alone():
    model = Transformer(Mlp(), Mlp())
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="num_experts"):
        ewa.replace_ffn_(model, -1)
    assert list(model.modules()) == modules
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
