"""How other libraries are called: from the arguments of a workload to a call. Their packages are imported here, lazily.

A scheduler of diffusers counts its steps, and one of them remembers: before each call it is put back to the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 20
Call = Callable[[], Tensor]


def _scheduler(kind: str, config: dict):
    import diffusers

    diffusers.logging.set_verbosity_error()
    found = getattr(diffusers, kind)(**config)
    found.set_timesteps(STEPS)
    found.is_scale_input_called = True  # else some warn in each call
    return found


def _guider(omega: float):
    import diffusers

    diffusers.logging.set_verbosity_error()
    return diffusers.ClassifierFreeGuidance(guidance_scale=1 + omega)


def diffusers_step(kind: str, config: dict, index: int) -> Callable[[dict], Call]:
    """Its guider, then its scheduler's step, called as pipelines call it."""

    def bind(arguments):
        scheduler, guider = _scheduler(kind, config), _guider(arguments["omega"])
        x, cond, uncond, kept = (arguments.get(name) for name in ("x", "cond", "uncond", "kept"))
        timestep = scheduler.timesteps[index]

        def call():
            scheduler._step_index = index
            guided = guider.forward(cond, uncond).pred
            if kept is None:
                return scheduler.step(guided, timestep, x, return_dict=False)[0]
            scheduler.model_outputs, scheduler.lower_order_nums = [None, kept], 2
            return scheduler.step(guided, timestep, x, return_dict=False)[0], scheduler.model_outputs[-1]

        return call

    return bind


def fused_step(kind: str, config: dict, index: int) -> Callable[[dict], Call]:
    """Ours with its configuration, in one pass."""

    def bind(arguments):
        from lgd_kernels.integrations.diffusers import FusedScheduler

        scheduler = FusedScheduler(_scheduler(kind, config))
        scheduler.set_timesteps(STEPS)
        x, cond, uncond, kept = (arguments.get(name) for name in ("x", "cond", "uncond", "kept"))
        timestep, omega = scheduler.timesteps[index], arguments["omega"]

        def call():
            scheduler._index, scheduler._kept, scheduler._since = index, kept, scheduler._warm
            moved = scheduler.step(cond, timestep, x, return_dict=False, uncond=uncond, omega=omega)[0]
            return moved if kept is None else (moved, scheduler._kept)

        return call

    return bind


def diffusers_guidance(arguments: dict) -> Call:
    guider, cond, uncond = _guider(arguments["omega"]), arguments["cond"], arguments["uncond"]
    return lambda: guider.forward(cond, uncond).pred


def diffusers_rule(kind: str, options: dict) -> Callable[[dict], Call]:
    """A guider of its own for a rule, in the sixth step of a run: CFG-Zero* gives nothing in the first."""

    def bind(arguments):
        from diffusers import guiders

        guider, cond, uncond = getattr(guiders, kind)(**options), arguments["cond"], arguments["uncond"]
        guider.set_state(step=5, num_inference_steps=STEPS, timestep=torch.tensor(500))
        return lambda: guider.forward(cond, uncond).pred

    return bind


def learned_guidance(arguments: dict) -> Call:
    from lgd_kernels.integrations.diffusers import LearnedGuidance

    guider, cond, uncond = LearnedGuidance(arguments["omega"]), arguments["cond"], arguments["uncond"]
    return lambda: guider.forward(cond, uncond).pred


def geomloss_samples(kernel: str, factor: float, **options) -> Callable[[dict], Call]:
    """`SamplesLoss`, every distance stored (its other backend is KeOps)."""

    def bind(arguments):
        from geomloss import SamplesLoss

        loss = SamplesLoss(kernel, backend="tensorized", **options)
        return lambda: factor * loss(arguments["x"], arguments["y"])

    return bind


def geomloss_guided(guided: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[dict], Call]:
    """A guided step in eager PyTorch, then `SamplesLoss("energy")` of each item. It has half the mean distance of the
    targets from each other, which does not depend on omega, as well: added again, and worked out before."""

    def bind(arguments):
        from geomloss import SamplesLoss

        loss = SamplesLoss("energy", backend="tensorized")
        names = "x", "cond", "uncond", "omega", "levels", "target"
        given = {name: arguments[name] for name in names}
        target = arguments["target"].double()
        constant = 0.5 * torch.cdist(target, target).mean((1, 2)).to(arguments["x"].dtype)

        def call():
            x_s, y = guided(**given, prediction="x0", churn=0.0, noise=None)
            return loss(x_s[:, 0], y[:, 0]) + constant

        return call

    return bind


def keops_samples(of_square: Callable, factors: tuple[float, float]) -> Callable[[dict], Call]:
    """The mean over pairs of a function of squared distances, formed as they are needed."""

    def bind(arguments):
        import pykeops

        pykeops.set_verbose(False)  # it says what it compiles
        from pykeops.torch import LazyTensor

        between, within = factors

        def mean(a, b):
            squares = (LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])).square().sum(-1)
            return of_square(squares).sum(1).mean() / b.shape[0]

        def call():
            x, y = arguments["x"], arguments["y"]
            return between * mean(x, y) + within * (mean(x, x) + mean(y, y))

        return call

    return bind
