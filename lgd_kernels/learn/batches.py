"""Draw batches to learn from: items, times and noise all follow from one seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.learn import cache
from lgd_kernels.learn.data import Data, items_of, size_of
from lgd_kernels.learn.distributed import part_of
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.objective import check_times, sample_times
from lgd_kernels.learn.particles import Particles, draw, joined

EXPECTED: dict[str, tuple[type, Callable[[Any], bool], str]] = {  # of a setting: type, test, and the test in words
    "batch": (int, lambda n: n >= 1, "an integer, 1 or more"),
    "particles": (int, lambda n: n >= 1, "an integer, 1 or more"),
    "delta": (float, lambda time: 0 < time < math.inf, "a number above 0"),
    "zeta": (float, lambda time: 0 <= time < math.inf, "a number, 0 or more"),
    "s_min": (float, lambda time: 0 <= time < math.inf, "a number, 0 or more"),
    "lr": (float, lambda lr: 0 < lr < math.inf, "a finite number above 0"),
    "weight_decay": (float, lambda decay: 0 <= decay < math.inf, "a finite number, 0 or more"),
    "clip": (float, lambda norm: norm > 0, "a number above 0, or None"),
    "ema": (float, lambda decay: 0 <= decay < 1, "a number in [0, 1)"),
    "seed": (int, lambda seed: -(2**63) <= seed < 2**63, "an integer in [-2^63, 2^63)"),
    "cache": (int, lambda n: n >= 0, "an integer, 0 or more"),
}


@dataclass(frozen=True)
class Settings:
    """Hold the settings of a run. The paper states batch 256, 4 particles and delta 0.1; the other defaults are ours.

    Attributes:
        batch: items of an update, over all processes; 1 or more.
        particles: m of each item; 1 or more.
        delta, zeta, s_min: the times, as in `sample_times`: delta > 0, zeta >= 0, 0 <= s_min <= 1 - zeta - delta. A
            run of N steps takes steps of 1 / N, and omega is not learned for steps shorter than delta: for more than
            ten, delta = 1 / N learns them too (the command's default).
        lr, weight_decay: of AdamW; lr > 0, weight_decay >= 0.
        clip: the largest norm of a gradient, above 0; larger gradients are scaled to it. None disables clipping.
        ema: decay of the average of the weights, `mean <- d mean + (1 - d) omega`, in [0, 1); d rises to this as
            (1 + n)/(10 + n).
        seed: an int64 number, from which every draw follows.
        cache: predict this many items once and learn from them; 0 predicts each batch. With a cache each update takes
            items at random, with fresh noise in step and targets; x_t and the times stay.

    Raises TypeError or ValueError, naming the attribute.
    """

    batch: int = 256
    particles: int = 4
    delta: float = 0.1
    zeta: float = 0.01
    s_min: float = 0.01
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float | None = 1.0
    ema: float = 0.999
    seed: int = 0
    cache: int = 0

    def __post_init__(self) -> None:
        for name, (kind, holds, expected) in EXPECTED.items():
            value = getattr(self, name)
            if value is None and name == "clip":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(f"Settings: `{name}` is a {type(value).__name__}, expected {expected}")
            if not holds(value) or (isinstance(value, int) and abs(value) > 2**63):
                raise ValueError(f"Settings: `{name}` is {value}, expected {expected}")
        check_times("Settings", self.delta, self.zeta, self.s_min)


class Batches:
    """Draw any number of batches. Every process draws the same numbers and keeps its part of each batch.

    The state is that of `generator`: after it is restored, the same batches follow.
    """

    def __init__(
        self,
        frozen: Frozen,
        data: Data,
        settings: Settings,
        device: torch.device,
        cache_folder: Path | str | None = None,
    ) -> None:
        self.frozen, self.data, self.settings, self.device = frozen, data, settings, device
        self.cache_folder = None if cache_folder is None else Path(cache_folder)
        self.generator = torch.Generator(device="cpu").manual_seed(settings.seed)
        self.cached: Particles | None = None

    def next(self) -> Particles:
        """Return this process's part of the next batch."""
        batch, count, part = self.settings.batch, self.settings.cache, part_of(self.settings.batch)
        if not count:
            return self._draw(self.data, self.generator, batch, part)
        if self.cached is None:
            self.cached = self._kept(count) if self.cache_folder else self.of(self.data, count, self.settings.seed)
        items = torch.randint(0, count, (batch,), generator=self.generator, device="cpu")[part]
        there = self.cached.x0.device
        return self.cached.take(items.to(there), _seed(self.generator), part.start).to(self.device)

    def of(self, data: Data, count: int, seed: int) -> Particles:
        """Return `count` random items, predicted in batches: the same in every process, at any time."""
        return joined(list(self.parts(data, count, seed)))

    def parts(self, data: Data, count: int, seed: int) -> Iterator[Particles]:
        """Yield the items of `of` one batch at a time."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for size in self._sizes(count):
            yield self._draw(data, generator, size, slice(0, size))

    def _kept(self, count: int) -> Particles:
        """Return the cached items from the files of `cache_folder`, which are made if they are missing."""
        assert self.cache_folder is not None
        data, seed, sizes = self.data, self.settings.seed, self._sizes(count)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        drawn = [self._items(data, generator, size, slice(0, size)) for size in sizes]
        x0, c, s, t = (torch.cat(parts).cpu() for parts in zip(*(one[:4] for one in drawn), strict=True))

        def again() -> Particles:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            return self._draw(data, generator, sizes[0], slice(0, min(2, sizes[0])))

        parts = functools.partial(self.parts, data, count, seed)
        return cache.kept(self.cache_folder, self.frozen, (c, s, t, x0), parts, again)

    def _sizes(self, count: int) -> list[int]:
        return [len(part) for part in torch.arange(count, device="cpu").split(self.settings.batch)]

    def _draw(self, data: Data, generator: torch.Generator, batch: int, part: slice) -> Particles:
        x0, c, s, t, seed = self._items(data, generator, batch, part)
        return draw(self.frozen, x0, c, s, t, self.settings.particles, seed=seed, first_sample=part.start)

    def _items(
        self, data: Data, generator: torch.Generator, batch: int, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Draw x0, c, s and t of a part of a batch, and the seed of its noise."""
        own, schedule = self.settings, self.frozen.schedule
        items = torch.randint(0, size_of(data), (batch,), generator=generator, device="cpu")[part]
        times = sample_times(batch, own.delta, own.zeta, own.s_min, generator)
        s, t = (schedule.from_unit(u[part].to(self.device)) for u in times)
        x0, c = (one.to(self.device) for one in items_of(data, items))
        return x0, c, s, t, _seed(generator)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
