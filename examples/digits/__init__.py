"""Learned guidance on real data with wrong labels: `python -m examples.digits`."""
