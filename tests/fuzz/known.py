"""Faults that are not mended yet, as (function or "*", a pattern of what `Fault` says); delete what is mended."""

KNOWN: list[tuple[str, str]] = [
    ("*", r"does not name the function: \w+: (combine|moments|guided_energy): `impl`"),
    ("median_bandwidth", "does not name the function: .*: energy_mmd: "),
    ("mmd_test", "does not name the function: .*: energy_mmd: "),
    ("kernel_inception_distance", "does not name the function: .*: energy_mmd: "),
    ("kernel_inception_distance", "IndexError"),
    ("frechet_distance", "LinAlgError"),
    ("solvers", "does not name the function|not finite|raises another error"),
    ("*", "(raises|bits:) (default device|autocast|default dtype)"),
    (
        "*",
        "Cannot access data pointer of Tensor|unsupported memory format option",
    ),  # sparse, where numbers are expected
    ("*", "argument 'unbiased' but instead found"),
    ("energy_mmd", "Boolean value of Tensor|truth value of an array"),
]
SEED_LAYOUTS: tuple[str, ...] = ("expanded", "one element")  # of `[B]` seeds, which some functions draw as one seed
AVOIDED: tuple[str, ...] = ("zeros",)  # kinds of tensors (inputs.SOUND, inputs.ODD) that end the process
