"""The public function of the op: its arguments, checks and documentation."""

from __future__ import annotations

import math

from torch import Tensor

from lgd_kernels.ops.dynamic_threshold import op
from lgd_kernels.ops.dynamic_threshold.structs import DynamicThreshold
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.impls import Impl


def dynamic_threshold(
    x0: Tensor, *, quantile: float = 0.995, max_value: float = math.inf, impl: Impl | None = None
) -> Tensor:
    """Clip each sample to a quantile of its own magnitudes, and divide by that quantile: dynamic thresholding.

        s = quantile of |x0[b]|, clamped to [1, max_value]        out[b] = clip(x0[b], -s, s) / s

    The quantile is that of `torch.quantile`, linear between two elements. Radix selection finds it without sorting, in
    samples of any size (`torch.quantile` refuses more than 2^24 elements). The position `quantile * (n - 1)` is
    computed in float64; `torch.quantile` computes it in float32, with an error of up to 2^-24 of itself.

    Args:
        x0: predictions of the data, `[B, ...]`; float32, bfloat16, float16 or float64, with any strides.
        quantile: in [0, 1]. diffusers' dynamic_thresholding_ratio.
        max_value: the largest s, 1 or more; with 1 the function clips to [-1, 1]. diffusers' sample_max_value, which
            is 1 there by default.
        impl: "triton", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `[B, ...]`, contiguous, in the dtype of x0, within [-1, 1]. Arithmetic is float32 (float64 where x0 is),
    rounded once. Same inputs, same bits, on any thread count. A sample with a NaN is NaN throughout. A sample whose s
    is infinite is 0, and NaN at its infinite elements.

    Differentiable in x0, any number of times; also under vmap, jvp and func.grad, where the reference runs. The
    gradient goes through the clip (to elements with |x0| <= s) and through s: to the two elements that the quantile
    lies between, shared evenly among elements of the same magnitude, and to none where s is clamped. (`torch.quantile`
    gives the gradient of a tie to one of its elements.) The backward is plain PyTorch for every implementation.
    `torch.ops.lgd.dynamic_threshold`, the raw operator, is not differentiable.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, quantile, max_value or impl.

    Source: Saharia et al. (Imagen), arXiv 2205.11487, section 2.3.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.dynamic_threshold(torch.tensor([[-4.0, 0.5, 1.0, 2.0]]), quantile=2 / 3)
    tensor([[-1.0000,  0.2500,  0.5000,  1.0000]])
    """
    checks.samples("dynamic_threshold", x0=x0)
    checks.number("dynamic_threshold", "quantile", quantile, 0, 1)
    checks.number("dynamic_threshold", "max_value", max_value, 1, math.inf)
    return op.dynamic_threshold(DynamicThreshold.of(x0, quantile, max_value), impl)
