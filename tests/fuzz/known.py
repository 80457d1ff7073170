"""List faults that are not fixed yet, as (function or "*", a pattern of `str(Fault)`). Fixing one deletes its entry."""

KNOWN: list[tuple[str, str]] = []
