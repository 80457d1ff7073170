"""Learned guidance where the truth is known in closed form: `python -m examples.mixture`."""
