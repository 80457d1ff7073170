"""Faults that are not fixed yet, as (function or "*", a pattern of `str(Fault)`); delete an entry with its fault."""

KNOWN: list[tuple[str, str]] = []
