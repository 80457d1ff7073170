"""The specification."""

from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples


def scaled(a):
    """Compute `factor x` in float32 (float64 if x is), rounded once."""
    x = a.x.to(arithmetic_dtype(a.x))
    return (x * per_sample(a.factor.to(x.dtype), x)).to(a.x.dtype).contiguous()


def scaled_backward(b):
    """Compute the gradients to x and to the factor."""
    d = b.upstream.to(arithmetic_dtype(b.upstream, b.x))
    d_x = (d * per_sample(b.factor.to(d.dtype), d)).to(b.x.dtype)
    return d_x, sum_samples(d * b.x.to(d.dtype)).to(b.factor.dtype)
