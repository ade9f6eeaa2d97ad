"""Does averaging help, with a router and without? A study on two small tasks: `python -m benchmarks.study`."""
