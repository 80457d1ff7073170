"""Call each function from a `Call`, and bound how far its result may be from the float64 result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import lgd_kernels as lgd
from fuzz.inputs import SCHEDULES
from lgd_kernels import metrics, testing
from lgd_kernels.ops.energy_mmd.kernels import Energy, Polynomial
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.log_prob import step_with_log_prob

FLOATS = 8 * 2.0**-24


def _curve(**arguments):
    curve = lgd.guided_energy_curve(**arguments)
    return curve.loss(0.5), curve.grad(-1.0)


def _levels(schedule, t, s):
    return tuple(SCHEDULES[schedule].levels(t, s))


def _table(table, c, s, t):
    return table(c, s, t)


def _solver(solver, step, schedule=None, **arguments):
    """Return the plan, and its first two steps."""
    if schedule is not None:
        arguments["schedule"] = SCHEDULES[schedule]
    times = arguments.pop("times")
    plan = getattr(solvers, solver)(*([arguments.pop("schedule")] if schedule else []), times, **arguments)
    step = dict(step)
    found, kept, x = [plan.table, plan.times], None, step.pop("x")
    for index in range(min(2, len(plan))):
        x, kept = plan.step(index, x, kept=kept, **step)
        found.append(x)
    return tuple(found)


CALLED = {
    "guided_energy_curve": _curve,
    "step_with_log_prob": step_with_log_prob,
    "energy_distance": metrics.energy_distance,
    "mmd_test": metrics.mmd_test,
    "kernel_inception_distance": metrics.kernel_inception_distance,
    "frechet_distance": metrics.frechet_distance,
    "levels": _levels,
    "OmegaTable.at": _table,
    "solvers": _solver,
}
NAMED = {  # the name that begins an error message, where it is not the function's own
    "levels": "",  # the schedule's
    "frechet_distance": "feature_statistics",
    "OmegaTable.at": "OmegaTable",
    "solvers": "StepPlan.step",
    "energy_distance": "energy_mmd",
}
HAVE_REFERENCE = (  # an argument `impl`
    "guided_score", "guided_step", "guided_energy", "guided_energy_curve", "energy_mmd", "moments", "combine",
    "dynamic_threshold", "energy_distance", "step_with_log_prob",
)  # fmt: skip


LINEAR_ALGEBRA = ("frechet_distance", "mmd_test")  # torch's, which does not promise the same bits on several threads


def called(name: str, arguments: dict):
    return CALLED.get(name, getattr(lgd, name, None))(**arguments)


def tensors_of(value) -> list[Tensor]:
    """Return every tensor of a result, in order; numbers as float64."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in tensors_of(one)]
    return [] if value is None else [torch.tensor(value, dtype=torch.float64, device="cpu")]


def widened(value):
    """Return arguments in float64."""
    if isinstance(value, dict):
        return {name: widened(one) for name, one in value.items()}
    return [widened(one) for one in value] if isinstance(value, list) else testing.promoted(value)


def _of(arguments, name, default=None):
    """Return an argument, or its default where it was not given."""
    value = arguments.get(name)
    return default if value is None else value


def slack(name: str, arguments: dict) -> float:
    """Return the tolerance of the noise, 1e-6 of |z|, as it enters the result, and of the moments of a rule."""
    if name == "combine" and arguments.get("noise_scale") is not None:
        scale = arguments["noise_scale"]
        scale = scale.double().abs().max().item() if isinstance(scale, Tensor) and scale.numel() else scale
        return 7e-6 * float(scale) if not isinstance(scale, Tensor) else 0.0
    if name in ("guided_step", "step_with_log_prob") and arguments.get("seed") is not None:
        noise = arguments["levels"].noise_s
        return 7e-6 * noise.double().abs().max().item() if noise.numel() else 0.0
    return 0.0


def compare(name: str, arguments: dict, found: list[Tensor], reference: list[Tensor], truth: list[Tensor]) -> None:
    """Raise AssertionError if the result is further from the truth than the budget allows."""
    comparison = COMPARED.get(name, _elementwise)
    comparison(arguments, found, reference, truth, slack(name, arguments))


def _elementwise(arguments, found, reference, truth, slack):
    for k, r, t in zip(found, reference, truth, strict=True):
        extra = slack
        if arguments.get("rule") is not None and t.numel():
            extra += 2e-6 * t.abs().max().item()
        testing.assert_elementwise(k, r, t, extra)


def _moments_only(arguments, found, reference, truth, slack):
    if "coefficients" not in arguments:
        columns = _columns(arguments, [one.double() for one in arguments["tensors"]])
        flat = torch.stack([one.reshape(one.shape[0], math.prod(one.shape[1:])).abs() for one in columns], 1)
        testing.assert_sum(found[0], truth[0], flat @ flat.transpose(1, 2))
        testing.assert_sum(found[1], truth[1], flat.sum(2))
        return
    outputs = len(found) - 2 if arguments.get("moments") else len(found)
    _elementwise(arguments, found[:outputs], reference[:outputs], truth[:outputs], slack)
    for k, r, t in zip(found[outputs:], reference[outputs:], truth[outputs:], strict=True):
        assert k.shape == t.shape and k.dtype == r.dtype  # the terms are outputs that are not written


def _columns(arguments, tensors):
    columns = arguments.get("columns") or range(len(tensors))
    return [tensors[k] if isinstance(k, int) else tensors[k[0]] - tensors[k[1]] for k in columns]


def _within(k: Tensor, t: Tensor, limit) -> None:
    error = (k.double() - t).abs()
    assert bool((error <= limit).all()), f"error {error.max():.3g}, allowed {torch.as_tensor(limit).min():.3g}"


def _mmd(arguments, found, reference, truth, slack):
    """Allow 8 * 2^-24 of the terms (float64: 64 * 2^-53), for products 1e-5, for polynomials twice as much."""
    x, y, kernel = arguments["x"].double(), arguments["y"].double(), arguments.get("kernel")
    kernel = kernel or Energy(arguments.get("beta", 1.0))
    size = kernel._replace(offset=abs(kernel.offset)) if isinstance(kernel, Polynomial) else kernel
    batched, p, q = arguments.get("batched", False), arguments.get("x_weights"), arguments.get("y_weights")

    def mean(a, b, p, q):
        found = lgd.energy_mmd(a.abs() if size is not kernel else a, b.abs() if size is not kernel else b, kernel=size,
                               lam=0.0, batched=batched, x_weights=p, y_weights=q, impl="reference")  # fmt: skip
        return found.abs()

    def apart(a, p):
        if not arguments.get("unbiased", True):
            return 1.0
        p = torch.ones(a.shape[: 1 + batched]) if p is None else p
        p = p.double() / p.double().sum(-1, keepdim=True)
        return 1 / (1 - p.square().sum(-1))

    terms = mean(x, y, p, q) + mean(x, x, p, p) * apart(x, p) + mean(y, y, q, q) * apart(y, q)
    if found[0].numel() and "kernel" not in arguments:  # energy_distance is twice energy_mmd
        terms = 2 * terms
    wide = found[0].dtype == torch.float64
    limit = 64 * 2.0**-53 if wide else FLOATS
    products = arguments.get("precision") == "product" or (
        arguments.get("precision") is None and x.shape[1 + batched :].numel() > 64
    )
    limit = max(limit, 1e-12 if wide else 1e-5) if products else limit
    if arguments.get("precision") == "product":  # coinciding points leave the square root of the rounding of products
        limit = 1e-7 if wide else 1e-3
    factor = 2 if isinstance(kernel, Polynomial) else 1
    _within(found[0], truth[0], factor * limit * terms + 1e-300)


def _energy(arguments, found, reference, truth, slack):
    """Allow 1e-5 of the terms: particles may be as close to each other as rounding."""
    if isinstance(arguments.get("lam"), (int, float)) and arguments["lam"]:
        apart = called("guided_energy", widened(arguments) | {"lam": 0.0, "impl": "reference"})
        terms = 2 * apart - truth[0]
    else:
        terms = truth[0].abs()
    exact = (
        found[0].dtype == torch.float64 and arguments.get("seed") is None and not hasattr(arguments["target"], "seed")
    )
    for k, r, t in zip(found, reference, truth, strict=True):
        own = (r.double() - t).abs().max().item() if r.numel() else 0.0
        _within(k, t, 2 * own + (1e-11 if exact else 1e-5) * terms)


def _curves(arguments, found, reference, truth, slack):
    for k, r, t in zip(found, reference, truth, strict=True):
        own = (r.double() - t).abs().max().item() if r.numel() else 0.0
        _within(k, t, 2 * own + 1e-5 * t.abs().max().item() if t.numel() else 0.0)


def _density(arguments, found, reference, truth, slack):
    """Compare the next sample as that of a step, or log p where `x_s` is given."""
    if arguments.get("x_s") is None:
        _elementwise(arguments, found[:1], reference[:1], truth[:1], slack)
    else:
        size = truth[1].abs().max().item() if truth[1].numel() else 0.0
        own = (reference[1].double() - truth[1]).abs().max().item() if truth[1].numel() else 0.0
        _within(found[1], truth[1], 2 * own + 1e-4 + 1e-6 * size)


def _normals(arguments, found, reference, truth, slack):
    _within(found[0], truth[0], 1e-6 * truth[0].abs().clamp(min=1))


def _close(relative, place=slice(None)):
    def compared(arguments, found, reference, truth, slack):
        for k, t in list(zip(found, truth, strict=True))[place]:
            if t.numel():
                _within(k, t, relative * (t.abs().max().item() + 1e-30))

    return compared


COMPARED = {
    "moments": _moments_only, "combine": _moments_only, "energy_mmd": _mmd, "energy_distance": _mmd,
    "guided_energy": _energy,
    "guided_energy_curve": _curves, "step_with_log_prob": _density, "philox_normal": _normals,
    "median_bandwidth": _close(1e-3), "levels": _close(1e-6), "OmegaTable.at": _close(2e-6),
    "churn_from_eta": _close(1e-3),
}  # fmt: skip


def truths(name: str, arguments: dict) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return (the reference on these arguments, the reference in float64), or None if there is no reference."""
    if name == "philox_normal":
        from lgd_kernels.runtime.philox import normal

        known = {"stream": 0, "first_sample": 0} | arguments
        exact = normal(
            tuple(known["shape"]), known["seed"], known["stream"], known["first_sample"], torch.device("cpu")
        )
        return [exact], [exact.double()]
    if name == "median_bandwidth":
        points = torch.cat([one.double().reshape(len(one), -1) for one in arguments.values() if one is not None])
        found = torch.pdist(points).sort().values
        exact = found[(len(found) - 1) // 2].reshape(())
        return [exact], [exact]
    if name in HAVE_REFERENCE:
        reference = tensors_of(called(name, arguments | {"impl": "reference"}))
        return reference, [one.double() for one in tensors_of(called(name, widened(arguments) | {"impl": "reference"}))]
    if name in ("levels", "churn_from_eta"):
        truth = tensors_of(called(name, widened(arguments)))
        return truth, truth
    return None


def dtypes(name: str, arguments: dict, found: list[Tensor]) -> str:
    """Return what is wrong with the dtypes of a result, or ""."""
    data = {"guided_score": "cond", "guided_step": "x", "dynamic_threshold": "x0"}.get(name)
    if data and found[0].dtype != arguments[data].dtype:
        return f"dtype {found[0].dtype} for `{data}` of {arguments[data].dtype}"
    if data and not found[0].is_contiguous():
        return "the result is not contiguous"
    return ""


def finite(value) -> bool:
    """Return whether every float in a value is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (tuple, list)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)
