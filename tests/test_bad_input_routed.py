"""What `route`, `partition_by_expert`, `grouped_ffn` and `RoutedMoE` say to what they cannot take."""

import re

import pytest
import torch
from parity import random_ffn

import ewa_kernels as ewa

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
LOGITS = torch.zeros(5, 4)
CHOICES = torch.zeros(5, 2, dtype=torch.int64)


def grouped_ffn(**changes):
    options = {
        "permutation": torch.arange(10),
        "expert_offsets": torch.tensor([0, 3, 10]),
        "routing_weights": torch.ones(5, 2),
        **changes,
    }
    return ewa.functional.grouped_ffn(X, *random_ffn(2, 6, 8, dtype=torch.float32), **options)


CASES = [
    (lambda: ewa.functional.route([1.0], 1), TypeError, "logits must be a Tensor, got list"),
    (
        lambda: ewa.functional.route(CHOICES, 1),
        TypeError,
        "logits must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (lambda: ewa.functional.route(LOGITS[0], 1), ValueError, "logits must be [T, E] with E ≥ 1, got [4]"),
    (lambda: ewa.functional.route(LOGITS[:, :0], 1), ValueError, "logits must be [T, E] with E ≥ 1, got [5, 0]"),
    (lambda: ewa.functional.route(LOGITS, 0), ValueError, "top_k must be at least 1, got 0"),
    (lambda: ewa.functional.route(LOGITS, 5), ValueError, "top_k must be less than 5, got 5"),
    (lambda: ewa.functional.route(LOGITS, 1.0), TypeError, "top_k must be an int, got float 1.0"),
    (lambda: ewa.functional.route(LOGITS, 1, renormalize=1), TypeError, "renormalize must be a bool, got int 1"),
    (lambda: ewa.functional.partition_by_expert([[0]], 2), TypeError, "choices must be a Tensor, got list [[0]]"),
    (
        lambda: ewa.functional.partition_by_expert(LOGITS, 2),
        TypeError,
        "choices must be int32 or int64, got torch.float32",
    ),
    (lambda: ewa.functional.partition_by_expert(CHOICES[0], 2), ValueError, "choices must be [T, k], got [2]"),
    (lambda: ewa.functional.partition_by_expert(CHOICES + 2, 2), ValueError, "choices must be in 0…1, got 2…2"),
    (lambda: ewa.functional.partition_by_expert(CHOICES - 1, 2), ValueError, "choices must be in 0…1, got -1…-1"),
    (lambda: ewa.functional.partition_by_expert(CHOICES, 0), ValueError, "num_experts must be at least 1, got 0"),
    (lambda: grouped_ffn(routing_weights=0.5), TypeError, "routing_weights must be a Tensor, got float"),
    (
        lambda: grouped_ffn(routing_weights=CHOICES),
        TypeError,
        "routing_weights must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (
        lambda: grouped_ffn(routing_weights=torch.ones(5, 2, device="meta")),
        TypeError,
        "routing_weights must be on cpu like x, got meta",
    ),
    (
        lambda: grouped_ffn(routing_weights=torch.ones(10)),
        ValueError,
        "routing_weights must be [T, k] with T = 5 and k ≥ 1, got [10]",
    ),
    (
        lambda: grouped_ffn(routing_weights=torch.ones(2, 5)),
        ValueError,
        "routing_weights must be [T, k] with T = 5 and k ≥ 1, got [2, 5]",
    ),
    (
        lambda: grouped_ffn(routing_weights=torch.ones(5, 0)),
        ValueError,
        "routing_weights must be [T, k] with T = 5 and k ≥ 1, got [5, 0]",
    ),
    (
        lambda: grouped_ffn(routing_weights=torch.ones(5, 3)),
        ValueError,
        "permutation must be [T·k] = [15], got [10]",
    ),
    (
        lambda: grouped_ffn(expert_offsets=torch.tensor([0, 3, 5])),
        ValueError,
        "expert_offsets must rise from 0 to T·k = 10, got [0, 3, 5]",
    ),
    (
        lambda: grouped_ffn(permutation=torch.arange(10).clamp(max=8)),
        ValueError,
        "permutation must hold each of 0…9 once",
    ),
    (lambda: ewa.RoutedMoE(8, 12, 4, 5), ValueError, "top_k must be less than 5, got 5"),
    (lambda: ewa.RoutedMoE(8, 12, 4, 0), ValueError, "top_k must be at least 1, got 0"),
    (lambda: ewa.RoutedMoE(8, 12, 4, True), TypeError, "top_k must be an int, got bool True"),
    (lambda: ewa.RoutedMoE(8, 12, 4, renormalize="yes"), TypeError, "renormalize must be a bool, got str 'yes'"),
    (lambda: ewa.RoutedMoE(8, 0, 4), ValueError, "d_ff must be at least 1, got 0"),
    (lambda: ewa.RoutedMoE(6, 8, 2)(X[:, :4]), ValueError, "x must be [..., D] with D = 6, got [5, 4]"),
    (
        lambda: ewa.RoutedMoE(6, 8, 2)(X.double()),
        TypeError,
        "up_weight must be torch.float64 like x, got torch.float32",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=range(len(CASES)))
def test_message(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_no_partition_after_a_call_that_had_one(backend):
    grouped_ffn(backend=backend)
    for missing in ({"permutation": None}, {"expert_offsets": None}, {"permutation": None, "expert_offsets": None}):
        with pytest.raises(TypeError, match=f"{next(iter(missing))} must be a Tensor, got None"):
            grouped_ffn(**missing, backend=backend)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("expert_offsets", [0, 10, 0, 10], "expert_offsets must rise from 0 to T = 10, got [0, 10, 0, 10]"),
        ("expert_offsets", [0, 3, 6, 90000], "expert_offsets must rise from 0 to T = 10, got [0, 3, 6, 90000]"),
        ("expert_offsets", [0, -5, 6, 10], "expert_offsets must rise from 0 to T = 10, got [0, -5, 6, 10]"),
        ("expert_offsets", [0, 1, 2, 3], "expert_offsets must rise from 0 to T = 10, got [0, 1, 2, 3]"),
        ("permutation", [10_000_000, *range(1, 10)], "permutation must hold each of 0…9 once"),
        ("permutation", [2**32, *range(1, 10)], "permutation must hold each of 0…9 once"),
        ("permutation", [1, *range(1, 10)], "permutation must hold each of 0…9 once"),
    ],
)
def test_values_of_a_partition(name, value, message, backend, is_compiled):
    """Where a compiled graph knows them too, they are looked at before memory is read by them."""
    torch.compiler.reset()
    experts = ewa.RandomPartitionMoE(6, 10, 3).experts

    def function(x, permutation, expert_offsets):
        partition = {"permutation": permutation, "expert_offsets": expert_offsets}
        return ewa.functional.grouped_ffn(x, *experts, **partition, backend=backend)

    partition = {"permutation": torch.arange(10), "expert_offsets": torch.tensor([0, 3, 6, 10])}
    partition[name] = torch.tensor(value)
    with pytest.raises(ValueError, match=re.escape(message)):
        (torch.compile(function, backend="eager") if is_compiled else function)(torch.randn(10, 6), **partition)
