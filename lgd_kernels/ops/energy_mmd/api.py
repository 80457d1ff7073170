"""The public function of the op: its arguments, checks and documentation."""

from __future__ import annotations

from torch import Tensor, distributed

from lgd_kernels.ops.energy_mmd import checks, op, pieces, sharded
from lgd_kernels.ops.energy_mmd.kernels import Energy, Kernel, split_kernel
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd
from lgd_kernels.runtime import impls
from lgd_kernels.runtime import progress as reports
from lgd_kernels.runtime.impls import Impl


def energy_mmd(
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1.0,
    lam: float = 1.0,
    unbiased: bool = True,
    kernel: Kernel | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    target_term: bool = True,
    batched: bool = False,
    precision: checks.Precision | None = None,
    group: distributed.ProcessGroup | None = None,
    progress: bool | reports.Report | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Compute how far apart two laws are from samples x and y of them. The matrix of distances is never stored.

        L = E ||x - y||^beta  -  lam/2 (E ||x - x'||^beta + E ||y - y'||^beta)

    With lam = 1 that is half of the squared energy distance in statistics: for beta = 1, D = 1 and unbiased=False,
    `scipy.stats.energy_distance(x, y) ** 2 / 2`. With another MMD kernel k it is the standard

        MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

    (where lam other than 1 multiplies the first two terms).

    Args:
        x, y: samples `[n, ...]` and `[k, ...]`; with batched=True, B such problems, `[B, n, ...]` and `[B, k, ...]`.
            float32, bfloat16, float16 or float64, in any mixture, with any strides.
        beta: power of the distance, in (0, 2].
        lam: weight of the terms within a set, in [0, 1].
        unbiased: within a set, the mean over pairs of different samples. False also counts each sample with itself;
            then L of a set and itself is 0 for lam = 1.
        kernel: the MMD kernel, `Energy(beta)` by default; or `Gaussian(bandwidths)`, `Laplace(bandwidth)`,
            `RationalQuadratic(bandwidth, alpha)` or `Polynomial(degree, scale, offset)`.
        x_weights, y_weights: weights of samples, `[n]` and `[k]` (`[B, n]`, `[B, k]`), finite, not negative, of any
            positive, finite sum. Divided by their sum they are p and q. The means are sum_ij p_i q_j k(x_i, y_j) and,
            unbiased, sum_{i != j} p_i p_j k(x_i, x_j) / (1 - sum_i p_i^2), which needs two samples with a weight.
            Weights 1 change nothing. They have no gradient. Other weights raise ValueError where values can be read
            (on the CPU, outside compilation and transforms); elsewhere they give NaN.
        target_term: False leaves out the terms within y, which do not depend on x.
        precision: how squared distances are formed on the CPU. "direct": from differences. "product":
            ||x||^2 + ||y||^2 - 2 <x, y>, by a matrix product, of samples about the mean of y where that makes norms
            smaller. None takes "direct" for D <= 64 or at most 64 x 64 pairs; beyond, products, and differences for
            pairs closer than a tenth of their norms.
        group: a `torch.distributed.ProcessGroup` (`torch.distributed.group.WORLD`) whose processes each hold a part of
            the samples, of any size, even none. Each process passes its part of x and y and gets the value for all
            samples together, the same bits everywhere. `backward` gives its part of the gradient of that value: nothing
            is averaged, summed or multiplied by the number of processes. All must call, with the same options.
        progress: for calls of minutes. True draws a bar on stderr. A function is called with (done, total), numbers of
            pairs, from (0, total) to (total, total); with a group, of the share of this process. The op then computes
            some rows at a time, and the result may differ by the rounding of a sum. An exception that the function
            raises ends the call. Ignored under torch.compile, vmap, jvp and func.grad.
        impl: "triton", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns a number, 0-dim (`[B]` if batched), float32 (float64 where a tensor is). Sums of blocks are added in
    float64. Same inputs, same bits, on any thread count ("product": if torch's own matrix product does so).
    A call that records a gradient computes it in the same pass. Autocast and TF32 have no effect. A sample with NaN
    gives NaN. A sample with an infinity is infinitely far away: the result is NaN or infinity, and MMD kernels that
    vanish there count it as 0. Ctrl-C ends a long call within a second.

    Differentiable in x and y, any number of times; also under vmap, jvp and func.grad, where the reference runs and
    stores distances; with `group` or `progress` once, by `backward` alone. Samples that coincide have slope 0.
    `torch.ops.lgd.energy_mmd`, the raw operator, is not differentiable.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, device, kernel or option; with a
    group in every process, if one call is wrong or two differ.

    Source: Gretton et al., JMLR 13 (2012); Szekely and Rizzo (2013); beta and lam: arXiv 2510.00815, Eq. 9.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.energy_mmd(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [4.0]]))  # (3 + 4 + 1 + 2) / 4 - (2 + 1) / 2
    tensor(1.)
    """
    options = checks.Options(beta, lam, unbiased, kernel, target_term, precision, batched)
    report = reports.report(checks.OP, progress)
    if group is None:
        checks.call(x, y, x_weights, y_weights, options)
    else:
        parts = sharded.agreed(group, x, y, x_weights, y_weights, options, impl)
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
        x_weights, y_weights = (None if one is None else one.unsqueeze(0) for one in (x_weights, y_weights))
    x, y = (one.flatten(2) if one.ndim > 2 else one.unsqueeze(2) for one in (x, y))
    function = split_kernel(Energy(beta) if kernel is None else kernel, x.shape[2])
    terms = float(lam), unbiased, True, target_term
    call = EnergyMmd(x, y, x_weights, y_weights, function, *terms, precision, [False, False])
    if group is not None:
        loss = sharded.energy_mmd(call, impl, parts, report)
    elif report is None or impls.transformed():
        loss = op.energy_mmd(call, impl)
    else:
        loss = pieces.energy_mmd(call, impl, report)
    return loss if batched else loss.squeeze(0)
