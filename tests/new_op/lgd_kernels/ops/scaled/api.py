"""The function `scaled`."""

from lgd_kernels.ops.scaled import op

from lgd_kernels.runtime import checks


def scaled(x, factor, *, impl=None):
    """Multiply each sample of x, `[B, ...]`, by its factor, `[B]`."""
    checks.samples("scaled", x=x)
    checks.per_sample("scaled", "factor", factor, "x", x)
    return op.scaled(op.Scaled(x, factor), impl)
