"""What users call."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels import checks
from lgd_kernels.impls import Impl
from lgd_kernels.levels import OmegaLookup
from lgd_kernels.ops.guided_score import op
from lgd_kernels.rules import Rule


def guided_score(
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    *,
    rule: Rule | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Classifier-free guidance with one weight for each sample, in a single pass over memory.

        guided = cond + omega (cond - uncond)

    omega = 0 is the conditional prediction alone; libraries that write `uncond + w (cond - uncond)` mean
    `w = 1 + omega`.

    Args:
        cond, uncond: predictions with the condition and without it, `[B, ...]`; float32, bfloat16, float16 or float64,
            mixed as you like, with any strides. An `uncond` that is `expand`ed over the batch is not copied.
        omega: a float; a tensor `[B]` of any float dtype; or `OmegaTable.at(c, s, t)`, looked up inside the kernel.
        rule: another rule than the one above, from `lgd_kernels.rules` or your own: `guided = k_c cond + k_d (cond -
            uncond)` with coefficients it makes of omega and, in a pass of their own, of moments. It runs on "triton",
            "cpu" and "reference".
        impl: "triton", "cuda", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `[B, ...]`, contiguous, in the dtype of `cond`. Arithmetic is float32 (float64 where a tensor is), rounded
    once. A condition outside the table gives NaN.

    Differentiable in cond, uncond and omega (in the table's values, for a lookup), any number of times; also under
    vmap, jvp and func.grad, where the reference runs. `torch.ops.lgd.guided_score`, the raw operator, is not.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, device or impl.

    Source: Ho and Salimans, arXiv 2207.12598; omega per sample: arXiv 2510.00815, Eq. 5.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.guided_score(torch.tensor([[2.0]]), torch.tensor([[1.0]]), omega=0.5)
    tensor([[2.5000]])
    """
    checks.samples("guided_score", cond=cond, uncond=uncond)
    checks.omega("guided_score", omega, "cond", cond)
    if rule is not None:
        from lgd_kernels import rule_passes

        return rule_passes.guided_score(cond, uncond, omega, rule, impl)
    return op.guided_score(cond, uncond, omega, impl)
