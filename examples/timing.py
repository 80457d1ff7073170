"""Which share of a training step the loss takes, in eager PyTorch and in one pass. `python -m examples.timing`.

The command measures with predictions in each step and from a cache, and says what the parts of a cached step take.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch
from torch import Tensor, nn

from examples.data import CLASSES
from lgd_kernels.learn import Frozen, Particles, Settings, Trainer, particle_energy, self_consistency_loss
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime.levels import per_sample, step_coefficients
from lgd_kernels.runtime.progress import Track, silent

WARM_UP = 5


def eager_loss(particles: Particles, omega: Tensor, beta: float = 1.75, lam: float = 1.0, churn: float = 1.0) -> Tensor:
    """`self_consistency_loss` as one writes it in PyTorch: noise, targets and guided particles are tensors."""
    p, z = particles, torch.randn(2, *particles.x_t.shape)  # of the step and of the targets
    signal, noise, a, b, v, w = (
        per_sample(one, p.x_t)
        for one in (p.levels.signal_s, p.levels.noise_s, *step_coefficients(p.levels, p.prediction, churn), omega)
    )
    x_s = a * p.x_t + b * (p.cond + w * (p.cond - p.uncond)) + v * z[0]
    return particle_energy(x_s, signal * p.x0[:, None] + noise * z[1], beta, lam)


def loss_share(
    frozen: Frozen, data: tuple[Tensor, Tensor], *, cache: int = 0, rounds: int = 60, track: Track = silent
) -> dict[str, float]:
    """Train a network, one update with each form of the loss in turn, and time both.

    An update is a batch with its predictions (from a cache of so many items, where there is one), omega, the loss, its
    gradient, clipping, AdamW and the average. The loss is drawing the noise, the guided step, the energy, and the
    gradient from there down to omega, as part of the update's one backward pass. Medians over the rounds:

        eager, one_pass      the loss's share of an update
        loss_ratio           time of the loss in eager PyTorch / in one pass
        step_ratio           the same of whole updates
    """
    forms = {"eager": eager_loss, "one_pass": self_consistency_loss}
    trainer = Trainer(OmegaNetwork(frozen.schedule, CLASSES), frozen, data, Settings(cache=cache))
    taken = began = 0.0  # by the loss in an update; and when its gradient did

    def timed(loss):
        def measured(particles: Particles, omega: Tensor) -> Tensor:
            nonlocal taken
            started = time.perf_counter()
            each = loss(particles, omega)
            taken = time.perf_counter() - started
            each.register_hook(arrived)
            omega.register_hook(left)
            return each

        return measured

    def arrived(_: Tensor) -> None:
        nonlocal began
        began = time.perf_counter()

    def left(_: Tensor) -> None:
        nonlocal taken
        taken += time.perf_counter() - began

    losing, stepping = ({name: [] for name in forms} for _ in range(2))
    for i in track(range(WARM_UP + rounds), "share of the loss"):
        for name in sorted(forms, reverse=i % 2 == 1):
            trainer.loss = timed(forms[name])
            started = time.perf_counter()
            trainer.update()
            ended = time.perf_counter()
            if i >= WARM_UP:
                losing[name].append(taken)
                stepping[name].append(ended - started)

    def middle(above: list[float], below: list[float]) -> float:
        return median(a / b for a, b in zip(above, below, strict=True))

    return {
        **{name: middle(losing[name], stepping[name]) for name in forms},
        "loss_ratio": middle(losing["eager"], losing["one_pass"]),
        "step_ratio": middle(stepping["eager"], stepping["one_pass"]),
    }


def parts(frozen: Frozen, data: tuple[Tensor, Tensor], *, cache: int = 2048, rounds: int = 200) -> dict[str, float]:
    """Medians, in milliseconds, of the parts of `Trainer.update` with the loss in one pass, one after the other."""
    trainer = Trainer(OmegaNetwork(frozen.schedule, CLASSES), frozen, data, Settings(cache=cache))
    taken: dict[str, list[float]] = {}
    for i in range(WARM_UP + rounds):
        at = time.perf_counter()

        def mark(name: str, i: int = i) -> None:
            nonlocal at
            now = time.perf_counter()
            if i >= WARM_UP:
                taken.setdefault(name, []).append(1e3 * (now - at))
            at = now

        particles = trainer.batches.next()
        mark("batch from the cache")
        omega = trainer.omega(particles.c, particles.s, particles.t)
        mark("network, forward")
        leaf = omega.detach().requires_grad_()
        each = self_consistency_loss(particles, leaf)
        (slope,) = torch.autograd.grad(each.mean(), leaf)
        mark("loss and its gradient to omega")
        trainer.optimizer.zero_grad()
        omega.backward(slope)
        mark("network, backward")
        nn.utils.clip_grad_norm_(trainer.weights, trainer.settings.clip)
        mark("clipping")
        trainer.optimizer.step()
        mark("AdamW")
        trainer._average()
        trainer.step += 1
        mark("average")
    return {name: median(times) for name, times in taken.items()}


def main(argv: list[str]) -> int:
    from examples.data import load_digits
    from examples.denoiser import NULL, Denoiser
    from lgd_kernels.sampling.schedules import RectifiedFlow

    parser = argparse.ArgumentParser(prog="python -m examples.timing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    digits = load_digits("rising", "any", torch.Generator().manual_seed(0))
    frozen = Frozen(Denoiser().requires_grad_(False).eval(), RectifiedFlow(), null=NULL)  # its weights take no time
    data = (digits.train.x, digits.train.c)
    for name, cache in (("predictions in each step", 0), ("cached predictions", 2048)):
        found = loss_share(frozen, data, cache=cache, rounds=args.rounds)
        print(
            f"{name}: the loss takes {100 * found['eager']:.1f} % of a step in eager PyTorch, "
            f"{100 * found['one_pass']:.1f} % in one pass; loss {found['loss_ratio']:.2f} times, step "
            f"{found['step_ratio']:.2f} times as fast"
        )
    found = parts(frozen, data, rounds=args.rounds)
    for name, milliseconds in found.items():
        print(f"  {name:32} {milliseconds:6.3f} ms  {100 * milliseconds / sum(found.values()):5.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
