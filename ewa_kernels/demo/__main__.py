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
from typing import Any, NoReturn

from ewa_kernels.demo.training import NUM_IMAGES, Options, fail, run_pair


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

    def add(name: str, default: Any, convert: Callable[[str], Any], requirement: str, explanation: str) -> None:
        def parse(text: str) -> Any:
            try:
                return convert(text)
            except ValueError:
                # Not a plain raise: argparse would put its own words in front.
                parser.error(f"{name} must be {requirement}, got {text}")

        parser.add_argument(name, default=default, type=parse, metavar=name[2].upper(), help=explanation)

    def add_int(name: str, default: int, low: int, high: int, explanation: str) -> None:
        add(name, default, lambda text: _in_range(int(text), low, high), f"an int from {low} to {high}", explanation)

    def add_choice(name: str, default: str, choices: tuple[str, ...], explanation: str) -> None:
        listed = ", ".join(choices)
        add(name, default, lambda text: choices[choices.index(text)], f"one of {listed}", f"{explanation}: {listed}")

    add_int("--experts", 4, 2, 64, "experts per replaced FFN")
    add("--share-rate", 0.3, lambda text: _in_range(float(text), 0, 1), "in [0, 1]", "final β")
    add_choice("--schedule", "linear", ("constant", "linear", "cosine"), "how β gets there")
    add_choice("--init", "independent", ("copy", "independent"), "how the experts start")
    add_int("--seeds", 3, 1, 100, "paired trainings")
    add_int("--train-images", 1000, 20, NUM_IMAGES - 100, f"of {NUM_IMAGES}, the rest is for testing")
    add_int("--epochs", 20, 1, 1000, "epochs of each training")
    add("--output", "ewa_demo.png", _png_path, "a .png file in a folder that exists", "where the plot goes")
    return Options(**vars(parser.parse_args(argv)))


def _in_range(value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:  # a NaN fails too
        raise ValueError
    return value


def _png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise ValueError
    return path


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    start = time.perf_counter()
    try:
        import sklearn  # noqa: F401

        from ewa_kernels.demo import plot
    except ImportError as error:
        fail(f"{str(error).splitlines()[0]}: pip install 'ewa_kernels[demo]'")
    console = plot.make_console()
    pairs = []
    with plot.make_progress(console) as progress:
        advance_dense, advance_experts = (
            plot.add_bar(progress, name, options.seeds * options.num_steps) for name in ("dense", "experts")
        )
        for seed in range(options.seeds):
            pairs.append(run_pair(options, seed, advance_dense, advance_experts))
    plot.show(console, options, pairs)
    try:
        plot.save_plot(options, pairs)
    except OSError as error:
        fail(f"the plot was not saved: {error}")
    console.print(f"plot: {options.output.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
