"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_energy` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy import reference
from lgd_kernels.ops.guided_energy.statistics import Statistics, energy, pair_weights
from lgd_kernels.ops.guided_energy.targets import Expected, Renoise, join_target, split_target
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import (
    contiguous,
    join_omega,
    requires_grad,
    split_number,
    split_omega,
    split_seed,
    to_omega,
)
from lgd_kernels.runtime.levels import Levels, OmegaLookup, omega_at, widest

IMPLEMENTATIONS = {
    "cuda": impls.FLOATS,
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

MOST_ROWS = 352  # kMostRows in csrc/guided_energy/guided_energy_cuda.h

_library = torch.library.Library("lgd", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_inputs = (
    "Tensor x, Tensor cond, Tensor uncond, Tensor? noise, Tensor? omega, float omega_value, Tensor[] table, "
    "Tensor[] levels, str prediction, Tensor? churn, float churn_value, Tensor? seed, SymInt? seed_value, "
    "SymInt first_sample, Tensor target, str kind, SymInt k, Tensor? target_seed, SymInt? target_seed_value"
)
_library.define(
    f"guided_energy({_inputs}, float beta, float lam, bool unbiased, str? impl) "
    "-> (Tensor loss, Tensor slope, Tensor statistics)",
    tags=_tags,
)
_library.define(
    f"guided_energy_backward(Tensor to_targets, Tensor to_particles, {_inputs}, bool[] wanted, str? impl) "
    "-> (Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_target)",
    tags=_tags,
)


def guided_energy(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    target: Tensor | Renoise | Expected,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    beta: float,
    lam: float,
    unbiased: bool,
    impl: str | None,
) -> Tensor:
    """The differentiable op."""
    noise, seed = _used(churn, noise, seed)
    beta, lam = float(beta), float(lam)
    if impls.through_reference("guided_energy", impl):
        return reference.guided_energy(
            x, cond, uncond, omega, levels, target, prediction, churn, noise, seed, first_sample, beta, lam, unbiased
        )
    data, kind, k, target_seed = split_target(target)
    omega, omega_value, table = split_omega(omega, x)
    churn, churn_value = split_number(churn, x)
    seed, seed_value = split_seed(seed)
    target_seed, target_seed_value = split_seed(target_seed)
    if torch.is_grad_enabled() and requires_grad(x, cond, uncond, noise, omega, *table[:1], data):
        given = (  # one argument: autograd looks at each there is
            churn, seed, target_seed, list(levels), table[1:],
            (omega_value, churn_value, prediction, seed_value, first_sample, target_seed_value), kind, k,
            (beta, lam, unbiased), impl,
        )  # fmt: skip
        return _GuidedEnergy.apply(x, cond, uncond, noise, omega, table[0] if table else None, data, given)
    return _run(
        x, cond, uncond, noise, omega, omega_value, table, list(levels), prediction, churn, churn_value, seed,
        seed_value, first_sample, data, kind, k, target_seed, target_seed_value, beta, lam, unbiased, impl,
    )[0]  # fmt: skip


def statistics(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    levels: Levels,
    target: Tensor | Renoise,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    impl: str | None,
) -> Statistics:
    """Around omega = 0; not differentiable."""
    noise, seed = _used(churn, noise, seed)
    with torch.no_grad():
        if impls.through_reference("guided_energy_curve", impl):
            return reference.statistics(
                x, cond, uncond, 0.0, levels, target, prediction, churn, noise, seed, first_sample
            )
        data, kind, k, target_seed = split_target(target)
        found = _run(
            x, cond, uncond, noise, None, 0.0, [], list(levels), prediction, *split_number(churn, x),
            *split_seed(seed), first_sample, data, kind, k, *split_seed(target_seed), 2.0, 0.0, True, impl,
        )[2]  # fmt: skip
        return Statistics.unpack(found, x.shape[1], k)


def unfit(impl: str, x: Tensor, *others: Tensor) -> list[str]:
    """Why `impl` cannot take these particles and targets `[B, k, ...]` (the fourth tensor); for `why_not`."""
    k = others[2].shape[1] if len(others) > 2 and others[2].ndim == x.ndim else 1
    return _too_many(impl, x, k) if x.ndim > 1 else []


def _too_many(impl, x, k):
    rows = 2 * x.shape[1] + k
    if impl != "cuda" or rows <= MOST_ROWS:
        return []
    return [f"cuda takes m particles and k targets with 2 m + k <= {MOST_ROWS}, these are m = {x.shape[1]}, k = {k}"]


def _choose(impl, x, k, dtypes):
    """`impls.choose`, also by the number of particles."""
    found = impls.choose("guided_energy", impl, x.device, *dtypes)
    reasons = _too_many(found, x, k)
    if reasons and impl is not None:
        raise ValueError(f"guided_energy: impl={impl!r} cannot run here: {reasons[0]}; impl=None chooses")
    return "reference" if reasons else found


def _used(churn, noise, seed):
    """Noise that would be multiplied by 0 is not drawn."""
    if isinstance(churn, (int, float)) and churn == 0:
        return noise if noise is not None and noise.requires_grad else None, None
    return noise, seed


class _GuidedEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cond, uncond, noise, omega, values, data, given):
        churn, seed, target_seed, levels, knots, numbers, kind, k, options, impl = given
        omega_value, churn_value, prediction, seed_value, first_sample, target_seed_value = numbers
        loss, slope, found = _run(
            x, cond, uncond, noise, omega, omega_value, [] if values is None else [values, *knots], levels, prediction,
            churn, churn_value, seed, seed_value, first_sample, data, kind, k, target_seed, target_seed_value,
            *options, impl,
        )  # fmt: skip
        to_data = [*ctx.needs_input_grad[:4], ctx.needs_input_grad[6]]
        again = (x, cond, uncond, noise, data, churn, seed, target_seed, *levels) if any(to_data) else (None,) * 13
        ctx.save_for_backward(slope, found, omega, *again, values, *knots)
        ctx.numbers, ctx.kind, ctx.options, ctx.impl = numbers, (kind, k), options, impl
        ctx.to_data, ctx.m = to_data, x.shape[1]
        return loss

    @staticmethod
    def backward(ctx, upstream):
        slope, found, omega, x, cond, uncond, noise, data, churn, seed, target_seed, *rest = ctx.saved_tensors
        levels, table = rest[:5], rest[5:] if rest[5] is not None else []
        omega_value, churn_value, prediction, seed_value, first_sample, target_seed_value = ctx.numbers
        kind, k = ctx.kind
        to_omega_wanted = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        d_x = d_cond = d_uncond = d_noise = d_omega = d_data = None
        arguments = (
            upstream, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
            seed_value, first_sample, data, kind, k, target_seed, target_seed_value, *ctx.options,
        )  # fmt: skip
        if any(ctx.to_data) and torch.is_grad_enabled():
            d_x, d_cond, d_uncond, d_noise, d_omega, d_data = _differentiable_backward(
                *arguments, [*ctx.to_data[:4], to_omega_wanted, ctx.to_data[4]]
            )
        else:
            again = impls.transforms_active() or impls.batched(upstream)  # forward AD or vmap, through the formula
            if any(ctx.to_data):
                weights = pair_weights(Statistics.unpack(found, ctx.m, k), upstream, *ctx.options)
                run = _backward_reference if again else torch.ops.lgd.guided_energy_backward
                grads = run(*weights, *arguments[1:-3], ctx.to_data, ctx.impl)
                d_x, d_cond, d_uncond, d_noise, d_data = (
                    grad if want else None for grad, want in zip(grads, ctx.to_data, strict=True)
                )
            if to_omega_wanted:
                impl = "reference"
                if torch.is_grad_enabled():  # a slope that has slopes itself, from what is saved
                    at, now = Statistics.unpack(found, ctx.m, k), omega_at(join_omega(omega, 0.0, table), found)
                    slope = energy(at, (now - now.detach())[:, None], *ctx.options, 1)[:, 0].to(slope.dtype)
                elif table and not again and impls.direct(upstream, slope):
                    impl = impls.choose("guided_energy", ctx.impl, slope.device)
                d_omega = to_omega(upstream * slope, omega, table, impl)
        by_omega = (None, d_omega) if table else (d_omega, None)
        return d_x, d_cond, d_uncond, d_noise, *by_omega, d_data, None


def _differentiable_backward(
    upstream, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
    seed_value, first_sample, data, kind, k, target_seed, target_seed_value, beta, lam, unbiased, wanted,
):  # fmt: skip
    """Through the reference, so that the gradients have gradients. Views, since one tensor may be two arguments."""
    omega = table[0] if table else omega
    x, cond, uncond, noise, omega, data = leaves = [
        tensor.view_as(tensor) if want else tensor
        for tensor, want in zip((x, cond, uncond, noise, omega, data), wanted, strict=True)
    ]
    loss = reference.guided_energy(
        x, cond, uncond, OmegaLookup(omega, *table[1:]) if table else join_omega(omega, omega_value, table),
        Levels(*levels), join_target(data, kind, k, target_seed_value if target_seed is None else target_seed),
        prediction, churn_value if churn is None else churn, noise, seed_value if seed is None else seed, first_sample,
        beta, lam, unbiased,
    )  # fmt: skip
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(loss, asked, upstream, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _run(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
         first_sample, data, kind, k, target_seed, *rest):  # fmt: skip
    plain = impls.direct(x, cond, uncond, noise, omega, churn, seed, data, target_seed, *levels, *table)
    forward = _forward if plain else torch.ops.lgd.guided_energy
    return forward(
        x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
        first_sample, data, kind, k, target_seed, *rest,
    )  # fmt: skip


def _forward(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
             seed_value, first_sample, data, kind, k, target_seed, target_seed_value, beta, lam, unbiased,
             impl):  # fmt: skip
    dtypes = [tensor.dtype for tensor in (x, cond, uncond, data, noise) if tensor is not None]
    impl = _choose(impl, x, k, dtypes)
    dtype, (batch, m) = widest(*dtypes), x.shape[:2]
    if impl == "reference" or not x.numel():
        target = join_target(data, kind, k, target_seed_value if target_seed is None else target_seed)
        found = reference.statistics(
            x, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), target, prediction,
            churn_value if churn is None else churn, noise, seed_value if seed is None else seed, first_sample,
        )  # fmt: skip
        at = torch.zeros(batch, 1, dtype=found.P0.dtype, device=x.device)
        loss, slope = (energy(found, at, beta, lam, unbiased, order)[:, 0] for order in (0, 1))
        if kind == "expected":
            loss = loss + levels[3].double() ** 2 * data[:1].numel()
        return loss.to(dtype), slope.to(dtype), found.pack()
    loss, slope = (torch.empty(batch, dtype=dtype, device=x.device) for _ in range(2))
    found = torch.empty((batch, Statistics.count(m, k)), dtype=torch.float64, device=x.device)
    impls.launcher("guided_energy", impl).forward(
        loss, slope, found, x, cond, uncond, noise, omega, omega_value, contiguous(table), levels, prediction, churn,
        churn_value, seed, seed_value, first_sample, data, kind, k,
        target_seed, target_seed_value, beta, lam, unbiased,
    )  # fmt: skip
    return loss, slope, found


def _fake(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
          first_sample, data, kind, k, *rest):  # fmt: skip
    dtype = widest(*(tensor.dtype for tensor in (x, cond, uncond, data, noise) if tensor is not None))
    batch, m = x.shape[:2]
    loss, slope = x.new_empty(batch, dtype=dtype), x.new_empty(batch, dtype=dtype)
    return loss, slope, x.new_empty((batch, Statistics.count(m, k)), dtype=torch.float64)


def _backward(to_targets, to_particles, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn,
              churn_value, seed, seed_value, first_sample, data, kind, k, target_seed, target_seed_value, wanted,
              impl):  # fmt: skip
    inputs = x, cond, uncond, noise, data
    impl = _choose(impl, x, k, [one.dtype for one in inputs if one is not None])
    if impl != "reference" and x.numel():
        grads = [tensor.new_empty(tensor.shape) if want else None for tensor, want in zip(inputs, wanted, strict=True)]
        impls.launcher("guided_energy", impl).backward(
            *grads, to_targets, to_particles, x, cond, uncond, noise, omega, omega_value, contiguous(table), levels,
            prediction, churn, churn_value, seed, seed_value, first_sample,
            data, kind, k, target_seed, target_seed_value,
        )  # fmt: skip
        return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
    return _backward_reference(
        to_targets, to_particles, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn,
        churn_value, seed, seed_value, first_sample, data, kind, k, target_seed, target_seed_value, wanted, impl,
    )  # fmt: skip


def _backward_reference(to_targets, to_particles, x, cond, uncond, noise, omega, omega_value, table, levels, prediction,
                        churn, churn_value, seed, seed_value, first_sample, data, kind, k, target_seed,
                        target_seed_value, wanted, impl):  # fmt: skip
    found = reference.guided_energy_backward(
        to_targets, to_particles, x, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels),
        join_target(data, kind, k, target_seed_value if target_seed is None else target_seed), prediction,
        churn_value if churn is None else churn, noise, seed_value if seed is None else seed, first_sample,
    )  # fmt: skip
    inputs = x, cond, uncond, noise, data
    return tuple(
        grad.to(tensor.dtype).view(tensor.shape).contiguous() if want else x.new_empty(0)
        for grad, tensor, want in zip(found, inputs, wanted, strict=True)
    )


def _fake_backward(to_targets, to_particles, x, cond, uncond, noise, omega, omega_value, table, levels, prediction,
                   churn, churn_value, seed, seed_value, first_sample, data, kind, k, target_seed, target_seed_value,
                   wanted, impl):  # fmt: skip
    inputs = x, cond, uncond, noise, data
    return tuple(
        tensor.new_empty(tensor.shape) if want else x.new_empty(0) for tensor, want in zip(inputs, wanted, strict=True)
    )


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("guided_energy", _forward, _device)
    _library.impl("guided_energy_backward", _backward, _device)
torch.library.register_fake("lgd::guided_energy", _fake, lib=_library)
torch.library.register_fake("lgd::guided_energy_backward", _fake_backward, lib=_library)
