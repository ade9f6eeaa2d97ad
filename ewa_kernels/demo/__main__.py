"""`make demo`: a small ViT on scikit-learn's digits, dense and with averaged experts; then the experts are folded.

Both trainings of a seed start from the same weights, on the same split, and see the same batches. The difference
in accuracy is reported with its 95 % interval and nothing is claimed beyond it: a few seeds cannot show a gain. Over
20 seeds with 100 training images the difference was +0.4 ± 0.4 points for one tiny ViT, and −0.1 ± 0.4 for this one
(`--seeds 20 --train-images 100 --epochs 100`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .training import NUM_IMAGES, Options, fail, run_pair


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_options(argv: Sequence[str] | None) -> Options:
    parser = OneLineParser(
        prog="ewa_kernels.demo",
        description="A small ViT on scikit-learn's digits: dense, with averaged experts, and folded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experts", default=4, type=_number(int, 2, 64), help="experts per replaced FFN")
    add("--share-rate", default=0.3, type=_number(float, 0, 1), help="final β")
    add("--schedule", default="linear", choices=("constant", "linear", "cosine"), help="how β gets there")
    add("--init", default="independent", choices=("copy", "independent"), help="how the experts start")
    add("--seeds", default=3, type=_number(int, 1, 100), help="paired trainings")
    add("--train-images", default=1000, type=_number(int, 20, NUM_IMAGES - 100), help=f"of {NUM_IMAGES}, to train on")
    add("--epochs", default=20, type=_number(int, 1, 1000), help="epochs of each training")
    add("--output", default="ewa_demo.png", type=_png_path, help="where the plot goes")
    return Options(**vars(parser.parse_args(argv)))


def _number(kind: type[int] | type[float], low: int, high: int) -> Callable[[str], float]:
    """What makes a number of that kind and range out of an option's text."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # a NaN fails too
            raise argparse.ArgumentTypeError(f"must be of type {kind.__name__}, from {low} to {high}, got {text}")
        return value

    return parse


def _png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .png file in a folder that exists, got {text}")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    start = time.perf_counter()
    try:
        import sklearn  # noqa: F401

        from . import plot
    except ImportError as error:
        fail(f"{str(error).splitlines()[0]}: pip install 'ewa_kernels[demo]'")
    console = plot.make_console()
    with plot.make_progress(console) as progress:
        total = options.seeds * options.num_steps
        bars = [plot.add_bar(progress, name, total) for name in ("dense", "experts")]
        pairs = [run_pair(options, seed, *bars) for seed in range(options.seeds)]
    plot.show(console, options, pairs)
    try:
        plot.save_plot(options, pairs)
    except OSError as error:
        fail(f"the plot was not saved: {error}")
    console.print(f"plot: {options.output.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
