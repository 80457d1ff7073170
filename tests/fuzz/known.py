"""Faults that are not mended yet, as (function or "*", a pattern of what `Fault` says); delete what is mended."""

KNOWN: list[tuple[str, str]] = []
AVOIDED: tuple[str, ...] = ()  # kinds of tensors (inputs.SOUND, inputs.ODD) that end the process
