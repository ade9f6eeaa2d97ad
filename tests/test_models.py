"""Models of five sources: replaced, trained, folded, loaded back.

Run as a program, it writes the table of docs/models.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import vision  # noqa: F401  # before model_zoo
from model_zoo import CASES, Case
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks import report

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MAKER = "python tests/test_models.py"


class Row(NamedTuple):
    source: str
    model: str
    replaced: str
    form: str
    skipped: str
    eval_output: str
    gradients: str
    fold: str


def tensors_of(output: object) -> list[Tensor]:
    """All floating-point tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in tensors_of(value)]


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(2)  # of ViTMAE's masks, and of all that is dropped
    return tensors_of(model(**inputs))


def examine(case: Case) -> Row:
    """Asserts what the table says."""
    torch.manual_seed(0)
    model, inputs = case.make().eval(), case.inputs()
    original = case.make().eval()
    with torch.no_grad():  # heads and scales that start at 0 would hide what is before them
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    original.load_state_dict(model.state_dict())
    expected = run(model, inputs)
    sites = ewa.find_ffns(model)
    reasons = Counter(site.skip_reason.split(":")[0] for site in sites if site.skip_reason is not None)
    skipped = "; ".join(f"{n}: {reason}" for reason, n in reasons.items()) or "–"
    num_replaceable = sum(site.skip_reason is None for site in sites)
    if not num_replaceable:
        with pytest.warns(UserWarning, match="replaced nothing"):
            ewa.replace_ffn_(model)
        assert skipped != "–"
        return Row(case.source, case.name, "–", "–", skipped, "–", "–", "–")

    report = ewa.replace_ffn_(model, 2)
    assert len(report.replaced) == num_replaceable // 2
    for after, before in zip(run(model, inputs), expected, strict=True):
        assert torch.equal(after, before)

    model.train()
    sum((output * torch.randn_like(output)).sum() for output in run(model, inputs)).backward()
    experts = dict(ewa.expert_tensors(model))
    assert experts
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert name not in experts or all(expert.any() for expert in parameter.grad), name
    with torch.no_grad():
        for parameter in experts.values():
            parameter += 0.1 * torch.randn_like(parameter)

    model.eval()
    trained = run(model, inputs)
    assert not all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))
    state = ewa.folded_state_dict(model)
    ewa.fold_(model)
    assert repr(model) == repr(original)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert list(state) == list(model.state_dict()) == list(original.state_dict())
    assert state._metadata == original.state_dict()._metadata
    original.load_state_dict(state, strict=True)
    for folded, loaded, before in zip(run(model, inputs), run(original, inputs), trained, strict=True):
        assert torch.equal(folded, before)
        assert torch.equal(loaded, before)
    replaced = f"{len(report.replaced)} of {num_replaceable}"
    form = ", ".join(sorted(set(report.forms.values())))
    return Row(case.source, case.name, replaced, form, skipped, "unchanged", "finite", "strict")


def table(rows: list[Row]) -> str:
    head = ("from", "model", "replaced", "form", "skipped", "eval output", "gradients", "fold")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ROWS: dict[str, Row] = {}


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source}-{case.name}".replace(" ", "_"))
def test_model(case):
    ROWS[case.name] = examine(case)


def test_the_page_has_this_table():
    if len(ROWS) < len(CASES):
        pytest.fail("run the whole file: the table is made by the tests before")
    _, found, _ = report.between(PAGE, "models", MAKER)
    assert found.strip() == table(list(ROWS.values())), f"{MAKER} writes it"


if __name__ == "__main__":
    report.fill(PAGE, "models", table([examine(case) for case in CASES]), MAKER)
