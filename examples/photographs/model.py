"""Cut crops from two photographs, and train a small U-Net on them with wrong labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.photographs.unet import UNet
from lgd_kernels.runtime.progress import Track, silent

SIDE, STRIDE, BAND = 32, 6, 61
BANDS = {"train": (0, 2, 4, 6), "validation": (1,), "test": (3, 5)}
CLASSES = 4
NULL = CLASSES
RATES = (0.0, 0.25, 0.5, 0.75)  # share of each class's labels that are replaced by any label


class Crops(NamedTuple):
    """Hold crops with their labels."""

    x: Tensor  # [N, 3, 32, 32] in [-1, 1]
    c: Tensor  # [N] int64

    def by_class(self) -> list[Tensor]:
        """Return the crops of each class, flat: [k, 3072]."""
        return [self.x[self.c == c].flatten(1) for c in range(CLASSES)]


def crops() -> dict[str, Crops]:
    """Return the three splits: x [N, 3, 32, 32] in [-1, 1] and c [N] int64."""
    from sklearn.datasets import load_sample_images

    found = {}
    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1 for image in load_sample_images().images]
    for split, bands in BANDS.items():
        x, c = [], []
        for label, photograph in enumerate(half for whole in photographs for half in whole.chunk(2, 2)):
            for band in bands:
                rows = photograph[:, band * BAND : (band + 1) * BAND]
                cut = rows.unfold(1, SIDE, STRIDE).unfold(2, SIDE, STRIDE)  # [3, i, j, 32, 32]
                x.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))
                c.append(torch.full((len(x[-1]),), label))
        found[split] = Crops(torch.cat(x).contiguous(), torch.cat(c))
    return found


def train(data: Crops, steps: int, seed: int = 0, batch: int = 32, track: Track = silent) -> UNet:
    """Train a U-Net on wrong labels for a while: flow matching over uniform times, 15 % of the labels dropped."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    replaced = torch.rand(len(data.c), generator=generator) < torch.tensor(RATES)[data.c]
    labels = torch.where(replaced, torch.randint(0, CLASSES, data.c.shape, generator=generator), data.c)
    net = UNet(CLASSES + 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 50) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    for _ in track(range(steps), "denoiser"):
        item = torch.randint(0, len(data.x), (batch,), generator=generator)
        t = torch.rand(batch, generator=generator)
        c = labels[item].masked_fill(torch.rand(batch, generator=generator) < 0.15, NULL)
        x0, z = data.x[item], torch.randn(batch, *data.x.shape[1:], generator=generator)
        x = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * z
        loss = (net(x, t, c) - (z - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval()


def load(folder: str) -> UNet:
    """Return the U-Net in a folder, for `--model "examples.photographs.model:load(FOLDER)"`."""
    net = UNet(CLASSES + 1).to(memory_format=torch.channels_last)
    net.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
    return net.eval()
