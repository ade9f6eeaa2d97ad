"""The demo: what it prints, what it draws, what it refuses, and that it claims no more than it measured."""

import contextlib
import io
import re
import sys

import pytest
import torch
from matplotlib.image import imread

import ewa_kernels.demo
from ewa_kernels.demo import plot, training
from ewa_kernels.demo.__main__ import main, parse_options

NUM_PARAMETERS = 202_186  # of the ViT
NUM_FFN = 33_088  # of one of its FFNs: 64·256 + 256 + 256·64 + 64


def run(*argv: str) -> str:
    """What the demo prints, on one line."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        main(argv)
    return " ".join(stdout.getvalue().split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "plot.png"
    return path, run("--train-images", "60", "--epochs", "3", "--seeds", "2", "--output", str(path))


def row(text: str, name: str) -> list[str]:
    return [cell.strip() for cell in re.search(rf"│ {name} │(.*?)│ (?:│|└)", text + " │ │")[1].split("│")]


def test_table(tiny):
    dense, experts, folded = (row(tiny[1], name) for name in ("dense", "experts in eval", "folded"))
    for cells in (dense, experts, folded):
        accuracy, _, _, seconds = cells
        mean, deviation = map(float, accuracy.split(" ± "))
        assert 5 < mean < 100
        assert 0 <= deviation < 50
        assert 0 < float(seconds) < 60
    with_experts = NUM_PARAMETERS + 2 * 3 * NUM_FFN  # two of the four FFNs, three more of each
    assert dense[1:3] == [f"{NUM_PARAMETERS:,}"] * 2
    assert experts[1:3] == [f"{with_experts:,}"] * 2
    assert folded[1:3] == [f"{with_experts:,}", f"{NUM_PARAMETERS:,}"]
    assert folded[0] == experts[0]


def test_text(tiny):
    path, text = tiny
    assert "loaded folded weights into an untouched ViT with strict=True: outputs equal" in text
    assert f"plot: {path}" in text
    assert re.search(r"dense .* 6/6 steps", text), "the progress bar"
    low, high = map(float, re.search(r"95 % interval (\S+) to (\S+),", text).groups())
    includes_0 = low <= 0 <= high
    assert ("no effect can be claimed" in text) == includes_0
    deviation = float(re.search(r"(\S+) is the largest relative deviation of 48 measurements", text)[1])
    assert 0 < deviation < 1e-3


def test_plot(tiny):
    pixels = imread(tiny[0])[..., :3]
    height, width, _ = pixels.shape
    assert width > 1500
    for panel in range(3):
        part = pixels[height // 5 : height * 3 // 4, panel * width // 3 : (panel + 1) * width // 3]
        orange = (part[..., 0] > 0.7) & (part[..., 1] < 0.6) & (part[..., 2] < 0.3)
        assert orange.mean() > 1e-4, f"nothing drawn in panel {panel}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # β = (E−1)/E: nothing is left of the spread, which has no relative deviation and no logarithm
        (("--schedule", "constant", "--share-rate", "0.75", "--init", "copy"), "the factor is below 0.01"),
        # no averaging at all, one epoch, a single point in the plot
        (("--schedule", "cosine", "--share-rate", "0", "--experts", "2"), "0.0e+00 is the largest relative deviation"),
    ],
)
def test_extremes(tmp_path, options, expected):
    output = tmp_path / "x.png"
    text = run(*options, "--train-images", "20", "--epochs", "1", "--seeds", "1", "--output", str(output))
    assert expected in text
    assert "from 1 seed. One seed gives no interval: no effect can be claimed." in text
    assert "±" not in text
    assert output.exists()


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # 0.5 ± 4.303·0.5/√3, Student's t with two degrees of freedom
        (
            [0.0, 0.5, 1.0],
            "+0.50 points, 95 % interval -0.74 to +1.74, over 3 paired seeds. This includes 0: no effect",
        ),
        ([1.0, 1.1, 1.2], "+1.10 points, 95 % interval +0.85 to +1.35, over 3 paired seeds. This does not include 0"),
        ([2.0], "+2.00 points, from 1 seed. One seed gives no interval: no effect can be claimed."),
        ([2.0, 2.0], "+2.00 points in each of 2 seeds. No interval can be estimated from that: no effect can be"),
    ],
)
def test_verdict_claims_no_more_than_measured(differences, expected):
    text = plot.verdict(differences)
    assert expected in text
    assert ("no effect can be claimed" in text) != ("does not include 0" in text)


def test_agreement_sees_a_wrong_contraction():
    options = parse_options([])
    right = training.Contraction(step=0, beta=0.3, before=[1.0, 2.0], after=[0.6, 1.2])
    wrong = right._replace(after=[0.6, 1.26])
    results = [training.Pair(*[training.Result(90.0, 1, 1, 1.0, [1.0])] * 3, [c]) for c in (right, wrong)]
    assert "5.0e-02 is the largest relative deviation of 4 measurements" in plot.agreement(options, results)
    assert "e-16 is the largest relative deviation of 2" in plot.agreement(options, results[:1])


def test_pair_starts_from_the_same_weights_and_batch():
    options = parse_options(["--init", "copy", "--train-images", "60", "--epochs", "1"])
    pair = training.run_pair(options, 7, lambda loss: None, lambda loss: None)
    assert pair.experts.losses == pytest.approx(pair.dense.losses, rel=1e-5)


def test_unequal_outputs_are_an_error():
    ones = torch.ones(2, 3)
    training.check_equal("a", ones, "b", ones.clone())
    with pytest.raises(SystemExit, match=r"^ewa_kernels.demo: a differs from b by up to 0.5$"):
        training.check_equal("a", ones, "b", ones.clone().index_fill(0, torch.tensor([1]), 0.5))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--experts", "0"], "argument --experts: must be of type int, from 2 to 64, got 0"),
        (["--experts", "1"], "argument --experts: must be of type int, from 2 to 64, got 1"),
        (["--experts", "2.5"], "argument --experts: must be of type int, from 2 to 64, got 2.5"),
        (["--share-rate", "2"], "argument --share-rate: must be of type float, from 0 to 1, got 2"),
        (["--share-rate", "-0.1"], "argument --share-rate: must be of type float, from 0 to 1, got -0.1"),
        (["--share-rate", "nan"], "argument --share-rate: must be of type float, from 0 to 1, got nan"),
        (["--schedule", "foo"], "argument --schedule: invalid choice: foo (choose from constant, linear, cosine)"),
        (["--init", "same"], "argument --init: invalid choice: same (choose from copy, independent)"),
        (["--seeds", "0"], "argument --seeds: must be of type int, from 1 to 100, got 0"),
        (["--train-images", "5000"], "argument --train-images: must be of type int, from 20 to 1697, got 5000"),
        (["--epochs", "0"], "argument --epochs: must be of type int, from 1 to 1000, got 0"),
        (["--output", "plot.jpg"], "argument --output: must be a .png file in a folder that exists, got plot.jpg"),
        (["--output", "no/x.png"], "argument --output: must be a .png file in a folder that exists, got no/x.png"),
        (["--seeds"], "argument --seeds: expected one argument"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_option_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    stdout, stderr = capsys.readouterr()
    # Choices are quoted in some versions of Python.
    assert (stdout, stderr.replace("'", "")) == ("", f"ewa_kernels.demo: {message}\n")


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich", "scipy"])
def test_missing_package_is_one_line(package, monkeypatch):
    for name in list(sys.modules):
        if name == "ewa_kernels.demo.plot" or name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ewa_kernels.demo, "plot")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_info:
        main([])
    message = str(exit_info.value.code)
    assert re.fullmatch(rf"ewa_kernels\.demo: .*{package}.*: pip install 'ewa_kernels\[demo\]'", message)
