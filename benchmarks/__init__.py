"""Verified first, then timed: `python -m benchmarks` from a checkout. docs/benchmarks.md says what a row means."""
