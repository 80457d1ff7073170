"""Calls that launch the GPU kernels of each op, for tests/aot.py."""
