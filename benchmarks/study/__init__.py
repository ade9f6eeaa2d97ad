"""Does averaging help where the dense model overfits? A study on two small tasks: `python -m benchmarks.study`."""
