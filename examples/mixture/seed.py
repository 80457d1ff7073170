"""Run all denoisers of one seed."""

from __future__ import annotations

import time
from typing import Any

import torch

from examples.mixture.plane import CLASSES, NULL, Mixture, pinwheel
from examples.mixture.study import Config, Plane, l2_bias, study
from examples.shared.denoiser import Denoiser, train_denoiser
from lgd_kernels.learn import Frozen
from lgd_kernels.runtime.progress import Track
from lgd_kernels.sampling.schedules import RectifiedFlow

DENOISERS = ("exact", "150 steps", "200 steps", "even labels", "uneven labels")


def run_seed(seed: int, config: Config, track: Track) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what goes into metrics.json, and what only the pictures need."""
    started = time.perf_counter()
    schedule, truth = RectifiedFlow(), pinwheel()

    def stream(stage: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + stage)

    def pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        c = torch.randint(0, CLASSES, (config.train,), generator=generator)
        return truth.sample(c, generator), c

    def exact(mixture: Mixture) -> Frozen:
        return Frozen(lambda x, t, c: mixture.denoise(x, *schedule.signal_noise(t), c), schedule, null=NULL)

    data = Plane(
        train=pairs(stream(0)),
        held=pairs(stream(1)),
        validation=truth.per_class(config.validation_real, stream(2)),
        test=truth.per_class(config.test_real, stream(3)),
    )

    def trained(steps: int) -> Frozen:
        torch.manual_seed(seed)  # initial weights
        net = undecided(config.denoiser_width)
        train_denoiser(net, *data.train, schedule, stream(4), steps=steps, batch=128, track=track)
        return Frozen(net, schedule, null=NULL)

    labels = (truth.mislabelled(config.wrong, torch.tensor(falls)) for falls in (config.even, config.uneven))
    frozen = [exact(truth), *map(trained, config.denoiser_steps), *map(exact, labels)]
    found: dict[str, Any] = {}
    shown: dict[str, Any] = {"real": data.test[:, : config.shown]}
    for i, (name, one) in enumerate(zip(DENOISERS, frozen, strict=True)):
        torch.manual_seed(seed)  # initial weights of omega
        found[name], shown[name] = study(one, data, 1000 * seed + 100 * (i + 1), config, track)
    bias = l2_bias(frozen[0], data.train, 1000 * seed + 5, config.bias_items)
    return {"seed": seed, "denoisers": found, "l2_bias": bias, "seconds": time.perf_counter() - started}, shown


def undecided(width: int) -> Denoiser:
    """Return a network that ignores its condition: the embeddings start at 0.

    After a short training the condition has too little effect, which guidance can repair.
    """
    net = Denoiser(CLASSES, dim=2, width=width, embedding=8)
    torch.nn.init.zeros_(net.condition.weight)
    return net
