"""Benchmarks: `make bench`, or `python -m benchmarks`. One file per operation, results in `results/`."""
