"""Writes SCALING.md: what a training step of a ViT-g costs on 1,000 GPUs, from what was measured. `python -m
benchmarks.scaling`.

Each number of the page says where it is from: measured (m), predicted by `benchmarks.model` (p), assumed (a), or
computed from those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import model, peers, report

PAGE = Path(__file__).parent / "SCALING.md"

NUM_GPUS, GPUS_PER_NODE = 1000, 8
IMAGES_PER_GPU, NUM_EXPERTS = 32, 4
NETWORK, NVLINK = 50e9, 400e9  # bytes/s that each GPU sends: 400 Gbit/s network cards, NVLink of an H100
KINDS = ("dense", "with experts")
OTHER_OF_PRODUCT = 0.6  # attention and the rest run at this part of a large product's speed


@dataclass(frozen=True)
class Vit:
    name: str
    depth: int
    d_model: int
    d_ff: int
    gated: bool
    tokens_per_image: int

    @property
    def ffn(self) -> int:
        """Weights of one FFN; biases are left out everywhere."""
        return self.d_model * self.d_ff * (3 if self.gated else 2)

    @property
    def attention(self) -> int:
        return 4 * self.d_model**2

    @property
    def dense(self) -> int:
        return self.depth * (self.attention + self.ffn)

    @property
    def with_experts(self) -> int:
        """Every other FFN is `NUM_EXPERTS` of them."""
        return self.dense + self.depth // 2 * (NUM_EXPERTS - 1) * self.ffn


VITS = (
    Vit("DINOv2's ViT-g/14 (SwiGLU)", 40, 1536, 4096, True, 257),
    Vit("ViT-G/14", 48, 1664, 8192, False, 257),
)


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s, and where they are from."""

    product: float
    ffn: float
    experts: float
    copy: float
    origin: dict[str, str]


def rates(runs: Sequence[dict[str, Any]]) -> Rates:
    """Of the first committed run on a GPU; what it lacks is predicted or assumed."""
    shape = next(case for case in model.CASES if case.name == "DINOv2-g")
    seconds = dict(model.predictions(shape))
    predicted = shape.operations("both") / (seconds["forward, single"] + seconds["backward, single"])
    found = {"product": model.H200.matrix_rate, "copy": model.H200.copy_rate, "experts": predicted, "ffn": predicted}
    origin = {"product": "(a)", "copy": "(a)", "experts": "(p)", "ffn": "(a)"}
    for run in runs:
        if run["environment"]["kind"] != "cuda":
            continue
        found |= {"product": run["floors"]["matrix_rates"]["bf16"], "copy": run["floors"]["copy_rate"]}
        origin |= {"product": "(m)", "copy": "(m)"}
        for name, peer in (("experts", peers.OURS), ("ffn", peers.DENSE)):
            for r in run["layer"]:
                if (r["case"], r["dtype"], r["peer"]) == (shape.name, "bf16", peer) and "why_not" not in r:
                    found[name], origin[name] = r["both"]["tflops"] * 1e12, "(m)"
        break
    return Rates(**found, origin=origin)


@dataclass(frozen=True)
class Cost:
    """Of one GPU in one step: seconds, bytes."""

    arithmetic: float
    state: float
    gathered: float
    activations: float
    traffic: float
    network: float
    network_by_nodes: float


def cost(vit: Vit, experts: bool, r: Rates) -> Cost:
    parameters = vit.with_experts if experts else vit.dense
    tokens = IMAGES_PER_GPU * vit.tokens_per_image
    replaced = 0.5 if experts else 0.0
    ffn = 6.0 * tokens * vit.depth * vit.ffn
    other = 6.0 * tokens * vit.depth * (vit.attention + 2 * vit.tokens_per_image * vit.d_model)
    arithmetic = other / (OTHER_OF_PRODUCT * r.product) + ffn * (replaced / r.experts + (1 - replaced) / r.ffn)
    block = vit.attention + vit.ffn * (NUM_EXPERTS if experts else 1)
    num_up = vit.d_ff * (2 if vit.gated else 1)
    # bf16: the block's input and attention's tensors, x and pre_activation of the FFN; a dense FFN keeps hidden too.
    kept = 9 * vit.d_model + num_up + vit.d_ff * (1 - replaced)
    # Weights twice in bf16, forward and backward; gradients once in float32.
    traffic = parameters * (2 * 2 + 4)
    # Sharded inside a node, copied between nodes: there gradients alone, all-reduced, a share for each GPU.
    by_nodes = traffic / NVLINK + 2 * 4 * parameters / GPUS_PER_NODE / NETWORK
    return Cost(
        arithmetic,
        state=16.0 * parameters / NUM_GPUS,  # float32 weights, gradients and two moments
        gathered=2 * 2 * block + 4 * block,  # two blocks' weights in bf16, one block's gradients
        activations=2.0 * tokens * vit.depth * kept,
        traffic=traffic,
        network=traffic / NETWORK,
        network_by_nodes=by_nodes,
    )


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The text of SCALING.md."""
    r = rates(runs)
    measured = "(m)" in r.origin.values()
    basis = (
        "The figures marked (m) are those of the committed run on a GPU, in `results/`."
        if measured
        else "**No result from a GPU is committed yet: nothing below is measured.** `make bench` on one fills it in."
    )
    lines = [
        "# A training step on 1,000 GPUs, on paper",
        "",
        "Made by `python -m benchmarks.scaling`. " + basis,
        "(m) measured, (p) predicted by `benchmarks.model`, (a) assumed; all else is computed from these. Nothing here",
        f"was run on {NUM_GPUS:,} GPUs: times are of arithmetic and of the network alone, each as if it were all.",
        "",
        "| rate | | |",
        "| --- | --- | --- |",
        f"| a large bf16 product | {r.product / 1e12:.0f} TFLOP/s | {r.origin['product']} |",
        f"| the layer, forward and backward, DINOv2-g's FFN | {r.experts / 1e12:.0f} TFLOP/s | {r.origin['experts']} |",
        f"| a dense FFN | {r.ffn / 1e12:.0f} TFLOP/s | {r.origin['ffn']} |",
        f"| attention and the rest, of a large product | {OTHER_OF_PRODUCT:.0%} | (a) |",
        f"| copy in memory | {r.copy / 1e12:.2f} TB/s | {r.origin['copy']} |",
        f"| network, each GPU | {NETWORK / 1e9:.0f} GB/s | (a) |",
        f"| NVLink inside a node of {GPUS_PER_NODE} | {NVLINK / 1e9:.0f} GB/s | (a) |",
        "",
        f"{NUM_GPUS:,} GPUs, FSDP2, {IMAGES_PER_GPU} images on each (a), every other FFN {NUM_EXPERTS} experts,",
        "weights gathered in bf16 for forward and again for backward, gradients reduced in float32.",
        "",
        "| of one GPU, in one step | " + " | ".join(f"{v.name} {kind}" for v in VITS for kind in KINDS) + " |",
        "| --- |" + " --- |" * (len(VITS) * len(KINDS)),
    ]
    costs = [(v, cost(v, kind == KINDS[1], r), kind == KINDS[1]) for v in VITS for kind in KINDS]
    rows: list[tuple[str, list[str]]] = [
        ("parameters, 10⁹", [f"{(v.with_experts if e else v.dense) / 1e9:.2f}" for v, _, e in costs]),
        ("arithmetic, ms", [f"{1e3 * c.arithmetic:.0f}" for _, c, _ in costs]),
        ("weights, gradients, moments, MB", [f"{c.state / 1e6:.0f}" for _, c, _ in costs]),
        ("gathered blocks, MB", [f"{c.gathered / 1e6:.0f}" for _, c, _ in costs]),
        ("activations, GB", [f"{c.activations / 1e9:.1f}" for _, c, _ in costs]),
        ("sent, GB", [f"{c.traffic / 1e9:.1f}" for _, c, _ in costs]),
        (f"on the network, sharded over {NUM_GPUS:,}, ms", [f"{1e3 * c.network:.0f}" for _, c, _ in costs]),
        ("on the network, sharded inside nodes, ms", [f"{1e3 * c.network_by_nodes:.0f}" for _, c, _ in costs]),
        ("averaging by itself, µs", [_averaging(v, r) if e else "–" for v, _, e in costs]),
        ("averaging inside AdamW, bytes more", ["0" if e else "–" for _, _, e in costs]),
        ("sent for averaging", ["0" if e else "–" for _, _, e in costs]),
    ]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    first, second = (cost(VITS[0], experts, r) for experts in (False, True))
    lines += [
        "",
        "What it says:",
        "",
        "- Experts leave the number of operations as it was. They add parameters, and so memory, which sharding makes",
        "  small, and traffic, which it does not: "
        f"{first.traffic / 1e9:.1f} → {second.traffic / 1e9:.1f} GB for {VITS[0].name}.",
        f"- Sharded over all {NUM_GPUS:,}, that is {1e3 * second.network:.0f} ms on the network against\n"
        f"  {1e3 * second.arithmetic:.0f} ms of arithmetic at {IMAGES_PER_GPU} images a GPU: "
        + ("the network decides" if second.network > second.arithmetic else "arithmetic hides it")
        + f". Sharded inside nodes it is {1e3 * second.network_by_nodes:.0f} ms.",
        "- Averaging is not what costs. With `expert_shard_placement` each GPU holds the same slice of all experts, so",
        "  that it averages its shard alone and sends nothing; inside AdamW's pass it moves no byte more.",
        "- With more images on each GPU arithmetic and activations grow, and traffic does not.",
        "",
    ]
    return "\n".join(lines)


def _averaging(vit: Vit, r: Rates) -> str:
    """Experts read and written once, in float32."""
    weights = vit.depth // 2 * NUM_EXPERTS * vit.ffn
    return f"{1e6 * 8 * weights / NUM_GPUS / r.copy:.0f}"


def write() -> None:
    PAGE.write_text(page(report.committed()))


if __name__ == "__main__":
    write()
