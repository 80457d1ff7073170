"""Guidance rules, and the functions that run them."""
