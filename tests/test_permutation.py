"""The deal of the tokens: values pinned for ever, and every statistical claim of its docstring.

Statistics are deterministic (fixed seeds), with bounds of 4.5 sigma; each is shown able to fail by `TestPower`.
"""

import hashlib
import itertools
import math

import pytest
import torch

import ewa_kernels as ewa
from ewa_kernels.reference import num_rounds, random_permutations

SIGMA = 4.5


def random_seeds(count, generator_seed=0):
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(generator_seed))


def z_of_chi_square(counts, expected):
    """Standard normal if the counts are a multinomial draw with these expectations (all alike)."""
    freedom = counts.numel() - 1
    chi_square = ((counts.double() - expected) ** 2 / expected).sum()
    return float((chi_square - freedom) / (2 * freedom) ** 0.5)


def lehmer_rank(permutations):
    """Number of a permutation among all T!, `[S, T]` → `[S]`."""
    num_tokens = permutations.shape[1]
    rank = torch.zeros(len(permutations), dtype=torch.int64)
    for i in range(num_tokens):
        rank = rank * (num_tokens - i) + (permutations[:, i + 1 :] < permutations[:, i : i + 1]).sum(1)
    return rank


class TestValues:
    """These never change: a run must be reproducible by every later version, on every device."""

    @pytest.mark.parametrize(
        ("num_tokens", "seed", "expected"),
        [
            (0, 0, []),
            (1, 1, [0]),
            (2, 0, [1, 0]),
            (5, 0, [0, 2, 1, 4, 3]),
            (8, 123, [7, 5, 0, 1, 2, 3, 6, 4]),
            (10, 2**63 - 1, [9, 2, 8, 4, 6, 0, 7, 1, 3, 5]),
            (16, 42, [7, 10, 11, 1, 15, 13, 0, 3, 12, 4, 6, 14, 8, 5, 2, 9]),
        ],
    )
    def test_small(self, num_tokens, seed, expected):
        assert ewa.functional.random_permutation(num_tokens, seed).tolist() == expected

    @pytest.mark.parametrize(
        ("num_tokens", "seed", "sha256"),
        [
            (197, 1, "e587b9f0df5c489d"),
            (1023, 7, "f82384bb7f80a71c"),
            (1024, 7, "e9cdb30f669f3d5b"),
            (50_432, 2**62 + 12_345, "addab00c33adb3a1"),
            (3_000_000, 99, "fccdf1bbb5be1c73"),
        ],
    )
    def test_large(self, num_tokens, seed, sha256):
        permutation = ewa.functional.random_permutation(num_tokens, seed)
        assert hashlib.sha256(permutation.numpy().astype("<i4").tobytes()).hexdigest()[:16] == sha256

    def test_python_integers_give_the_same(self):
        """The recipe of the docstring in plain integers, one row at a time."""

        def mix64(z):
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            return z ^ z >> 31

        def mix32(h):
            h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
            h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
            return h ^ h >> 16

        for num_tokens, seed in [(1, 3), (2, 3), (7, 2**63 - 1), (30, 5), (101, 2**40), (1030, 17)]:
            words = [mix64((seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(14)]
            keys = [half for word in words for half in (word % 2**32, word >> 32)]
            a = math.isqrt(num_tokens - 1) + 1
            b = -(-num_tokens // a)
            expected = []
            for row in range(num_tokens):
                point = row ^ (keys[24] & 1) if row < 2 <= num_tokens else row
                while True:
                    left, right = point % a, point // a
                    for i in range(0, num_rounds(num_tokens), 2):
                        left = (left + (mix32(right ^ keys[i]) * a >> 32)) % a
                        right = (right + (mix32(left ^ keys[i + 1]) * b >> 32)) % b
                    point = right * a + left
                    if point < num_tokens:
                        break
                expected.append(point)
            assert ewa.functional.random_permutation(num_tokens, seed).tolist() == expected

    def test_seed_tensor_device_and_dtype(self):
        permutation = ewa.functional.random_permutation(50, torch.tensor([42]), device="cpu")
        assert permutation.dtype == torch.int32
        assert permutation.device.type == "cpu"
        assert torch.equal(permutation, ewa.functional.random_permutation(50, 42))
        assert torch.equal(permutation, ewa.reference.random_permutation(50, 42))
        on_meta = ewa.functional.random_permutation(50, torch.tensor(42), device="meta")
        assert on_meta.shape == (50,)


class TestBijection:
    def test_every_small_size(self):
        for num_tokens in range(301):
            permutations = random_permutations(num_tokens, random_seeds(8, num_tokens))
            assert torch.equal(permutations.sort().values, torch.arange(num_tokens).int().expand(8, -1)), num_tokens

    @pytest.mark.parametrize("num_tokens", [1023, 1024, 1025, 50_176, 50_432, 999_983, 2**20, 3_000_000])
    def test_large_sizes(self, num_tokens):
        permutation = ewa.functional.random_permutation(num_tokens, 5)
        assert torch.equal(permutation.sort().values, torch.arange(num_tokens).int())


class TestUniformity:
    @pytest.mark.parametrize("num_tokens", range(2, 9))
    @pytest.mark.parametrize("seeds", ["random", "consecutive"])
    def test_all_permutations_equally_likely(self, num_tokens, seeds):
        count = 240_000 if num_tokens < 8 else 480_000
        seeds = random_seeds(count, num_tokens) if seeds == "random" else torch.arange(count)
        rank = lehmer_rank(random_permutations(num_tokens, seeds))
        number = math.factorial(num_tokens)
        assert abs(z_of_chi_square(torch.bincount(rank, minlength=number), count / number)) < SIGMA

    @pytest.mark.parametrize(("num_tokens", "count"), [(16, 200_000), (64, 60_000), (197, 20_000), (1024, 4_000)])
    def test_pairs_of_tokens_share_an_expert_as_often_as_they_should(self, num_tokens, count):
        """For each distance between two tokens: too few rounds show here and not in single positions."""
        assert max(abs(z) for z in co_assignment(num_tokens, count)) < SIGMA

    @pytest.mark.parametrize(("num_tokens", "count"), [(16, 200_000), (64, 60_000), (197, 20_000)])
    def test_every_token_goes_everywhere(self, num_tokens, count):
        permutations = random_permutations(num_tokens, random_seeds(count)).long()
        cell = permutations + torch.arange(num_tokens) * num_tokens
        counts = torch.bincount(cell.flatten(), minlength=num_tokens**2).double()
        # Rows and columns are fixed sums: (T − 1)² degrees of freedom, and cells of variance p(1 − p)·n.
        expected = count / num_tokens
        chi_square = ((counts - expected) ** 2 / expected).sum() * (num_tokens - 1) / num_tokens
        freedom = (num_tokens - 1) ** 2
        assert abs(chi_square - freedom) / (2 * freedom) ** 0.5 < SIGMA

    @pytest.mark.parametrize("num_tokens", [50, 1024, 5000])
    def test_fixed_points(self, num_tokens):
        """Their number is Poisson(1)."""
        count = 2_000_000 // num_tokens
        permutations = random_permutations(num_tokens, random_seeds(count))
        fixed = (permutations == torch.arange(num_tokens)).sum()
        assert abs(fixed - count) / count**0.5 < SIGMA


def co_assignment(num_tokens, count, num_experts=4):
    """z-scores: how often tokens t and t + d share an expert, for every t together and for each t apart."""
    offsets = ewa.functional.expert_offsets(num_tokens, num_experts)
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    expert_of_row = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(sizes))
    expected = sum(n * (n - 1) for n in sizes) / (num_tokens * (num_tokens - 1)) * count
    expert_of_token = torch.empty(count, num_tokens, dtype=torch.int64)
    permutations = random_permutations(num_tokens, random_seeds(count)).long()
    expert_of_token.scatter_(1, permutations, expert_of_row.expand(count, -1))
    a = math.isqrt(num_tokens - 1) + 1
    variance = expected * (1 - expected / count)
    for distance in {1, 2, a - 1, a, a + 1, 2 * a, num_tokens // 3}:
        together = (expert_of_token == expert_of_token.roll(distance, 1)).sum(0).double()
        yield float((together.sum() - num_tokens * expected) / (num_tokens * variance) ** 0.5)
        yield float((((together - expected) ** 2 / variance).sum() - num_tokens) / (2 * num_tokens) ** 0.5)


class TestSeeds:
    """Permutations from related seeds are no more alike than from unrelated ones."""

    NUM_TOKENS = 197

    def agreement(self, first, second):
        """z-score of the number of rows in which two permutations agree: Poisson(1) for each pair of seeds."""
        ours, theirs = (random_permutations(self.NUM_TOKENS, seeds) for seeds in (first, second))
        return float(((ours == theirs).sum() - len(first)) / len(first) ** 0.5)

    def rank_correlation(self, first, second):
        """z-score of the mean correlation between the rows of a token under two permutations."""
        middle = (self.NUM_TOKENS - 1) / 2
        ours, theirs = (random_permutations(self.NUM_TOKENS, seeds).double() - middle for seeds in (first, second))
        variance = (self.NUM_TOKENS**2 - 1) / 12
        return float((ours * theirs).sum() / variance / (len(first) * (self.NUM_TOKENS + 1)) ** 0.5)

    @pytest.mark.parametrize("measure", ["agreement", "rank_correlation"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            pytest.param(torch.arange(4000), torch.arange(1, 4001), id="consecutive"),
            pytest.param(random_seeds(4000), random_seeds(4001)[1:], id="consecutive draws, as of layers"),
            *(
                pytest.param(random_seeds(4000, bit), random_seeds(4000, bit) ^ (1 << bit), id=f"bit {bit}")
                for bit in (0, 1, 15, 31, 32, 33, 47, 61, 62)
            ),
        ],
    )
    def test_unrelated(self, measure, first, second):
        assert abs(getattr(self, measure)(first, second)) < SIGMA

    def test_consecutive_layers_of_one_forward(self):
        """Seeds as the layers draw them."""
        torch.manual_seed(0)
        x = torch.empty(1)
        seeds = torch.tensor([ewa.functional.draw_seed(x) for _ in range(4001)])
        assert len(seeds.unique()) == 4001
        assert abs(self.agreement(seeds[:-1], seeds[1:])) < SIGMA


class TestPower:
    """The statistics can fail: fewer rounds, or no coin, are noticed."""

    @pytest.mark.parametrize(("num_tokens", "rounds", "count"), [(16, 4, 200_000), (64, 6, 60_000), (1024, 4, 4_000)])
    def test_few_rounds_are_noticed_in_pairs(self, monkeypatch, num_tokens, rounds, count):
        monkeypatch.setattr(ewa.reference, "num_rounds", lambda _: rounds)
        assert max(abs(z) for z in co_assignment(num_tokens, count)) > SIGMA

    def test_half_the_rounds_are_noticed_at_six_tokens(self, monkeypatch):
        monkeypatch.setattr(ewa.reference, "num_rounds", lambda _: 12)
        rank = lehmer_rank(random_permutations(6, random_seeds(240_000, 6)))
        assert abs(z_of_chi_square(torch.bincount(rank, minlength=720), 240_000 / 720)) > SIGMA

    def test_without_the_coin_half_of_all_permutations_never_come(self):
        """At T = 9 = 3·3, where every round is an even permutation."""
        seeds = random_seeds(1000)
        permutations = random_permutations(9, seeds)
        coin = ewa.reference._keys(seeds)[:, 24] & 1
        without = torch.where(coin[:, None] == 1, permutations[:, [1, 0, *range(2, 9)]], permutations)

        def number_odd(p):
            inversions = torch.triu(p[:, :, None] > p[:, None, :], diagonal=1).sum((1, 2))
            return int((inversions % 2).sum())

        assert number_odd(without) == 0
        assert abs(number_odd(permutations) - 500) < SIGMA * 250**0.5


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 3), (1, 4), (3, 5), (10, 4), (50_432, 4), (7, 1)])
def test_expert_offsets(num_tokens, num_experts):
    offsets = ewa.functional.expert_offsets(num_tokens, num_experts)
    assert offsets == [math.floor(e * num_tokens / num_experts) for e in range(num_experts + 1)]
    sizes = {b - a for a, b in itertools.pairwise(offsets)}
    assert max(sizes) - min(sizes) <= 1
