"""Measurements. `python -m benchmarks.run` times every op, `python -m benchmarks.report` shows what it wrote."""
