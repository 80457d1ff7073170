"""A model and data to aim `python -m lgd_kernels learn` at: a small U-Net on crops of two photographs.

    python -m examples.patches train           # some minutes: runs/patches/model.pt and three .npz files
    python -m lgd_kernels learn --model "examples.patches:load(runs/patches)" --data runs/patches/train.npz ...
    python -m examples.patches measure runs/patches/network/omega.safetensors ...

The photographs are scikit-learn's (427 x 640 x 3). A crop is 32 x 32 x 3; its class is photograph and half, left or
right. They are cut from bands of rows that share no pixel: four to learn from, one to validate with, two to test with.
The denoiser is trained on labels that are wrong more often in each class than in the one before. docs/learning.md has
the commands and the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import lgd_kernels as lgd
from examples.data import Labelled
from examples.unet import UNet
from lgd_kernels.learn import Frozen
from lgd_kernels.metrics import energy_distance
from lgd_kernels.omega.files import load as load_omega
from lgd_kernels.runtime.progress import Track, bars, silent

SIDE, STRIDE, BAND = 32, 6, 61
BANDS = {"train": (0, 2, 4, 6), "validation": (1,), "test": (3, 5)}
CLASSES = 4
NULL = CLASSES
RATES = (0.0, 0.25, 0.5, 0.75)  # of labels that are replaced by any, for each class
CONSTANTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def crops() -> dict[str, Labelled]:
    """The three splits, x [N, 3, 32, 32] in [-1, 1] and c [N] int64."""
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
        found[split] = Labelled(torch.cat(x).contiguous(), torch.cat(c))
    return found


def train(data: Labelled, steps: int, seed: int = 0, batch: int = 32, track: Track = silent) -> UNet:
    """A U-Net trained on wrong labels for a while: flow matching over uniform times, 15 % of the labels dropped."""
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
    """What `train` left in a folder: for `--model "examples.patches:load(FOLDER)"`."""
    net = UNet(CLASSES + 1).to(memory_format=torch.channels_last)
    net.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
    return net.eval()


@torch.no_grad()
def sample(frozen: Frozen, omega, per_class: int, steps: int, seed: int, track: Track = silent) -> Tensor:
    """[classes, n, 3, 32, 32] by Euler steps (churn 0) from noise that is the same for every omega."""
    found = []
    u = torch.linspace(1, 0, steps + 1)
    for label in track(range(CLASSES), "samples"):
        c = torch.full((per_class,), label)
        x = lgd.philox_normal((per_class, 3, SIDE, SIDE), seed=seed, first_sample=label * per_class)
        for i in range(steps):
            t, s = (frozen.schedule.from_unit(one.expand(per_class).contiguous()) for one in (u[i], u[i + 1]))
            cond, uncond = frozen.predict(x, t, c)
            levels = frozen.schedule.levels(t, s)
            x = lgd.guided_step(x, cond, uncond, omega(c, s, t).detach(), levels, prediction=frozen.prediction)
        found.append(x)
    return torch.stack(found)


def distances(x: Tensor, real: Labelled) -> list[float]:
    """The energy distance between samples and crops of each class, pixels as they are."""
    return [float(energy_distance(x[label].flatten(1), real.of_class(label).flatten(1))) for label in range(CLASSES)]


def measure(args: argparse.Namespace) -> None:
    """Samples with each constant and with each omega in a file, against validation and test crops."""
    frozen = Frozen(load(str(args.folder)), lgd.RectifiedFlow(), "flow", null=NULL)
    data, track, rows = crops(), bars("patches"), {}

    def row(name: str, omega) -> None:
        started = time.perf_counter()
        x = sample(frozen, omega, args.samples, args.sampling_steps, args.seed, track)
        found = {split: distances(x, data[split]) for split in ("validation", "test")}
        rows[name] = found | {"seconds": time.perf_counter() - started}
        mean, test = (sum(found[split]) / CLASSES for split in ("validation", "test"))
        print(
            f"{name:40} {mean:10.3f} {test:10.3f}   " + " ".join(f"{value:.2f}" for value in found["test"]), flush=True
        )

    print(f"{'energy distance per class, mean':40} {'validation':>10} {'test':>10}   test, each class")
    for value in args.constants:
        row(f"constant {value:g}", lambda c, s, t, value=value: torch.full((len(s),), value))
    for path in args.omegas:
        row(str(path), load_omega(path, frozen.schedule))
    constants = [name for name in rows if name.startswith("constant ")]
    if constants:
        best = min(constants, key=lambda name: sum(rows[name]["validation"]))
        print(f"best on the validation split: {best}")
    (args.folder / "measured.json").write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.patches", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure"):
        one = commands.add_parser(name)
        one.add_argument("--folder", type=Path, default=Path("runs/patches"))
        one.add_argument("--threads", type=int, default=1)
        one.add_argument("--seed", type=int, default=0)
        if name == "train":
            one.add_argument("--steps", type=int, default=500)
        else:
            one.add_argument("omegas", type=Path, nargs="*", help="files of omega")
            one.add_argument("--samples", type=int, default=48, help="of each class")
            one.add_argument("--sampling-steps", type=int, default=20)
            one.add_argument("--constants", type=float, nargs="*", default=CONSTANTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.command == "measure":
        measure(args)
        return 0
    import numpy

    data = crops()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, (x, c) in data.items():
        numpy.savez(args.folder / f"{split}.npz", x0=x.numpy(), c=c.numpy())
    net = train(data["train"], args.steps, args.seed, track=bars("patches"))
    torch.save(net.state_dict(), args.folder / "model.pt")
    print(f"{args.folder}: model.pt, " + ", ".join(f"{split}.npz ({len(data[split].x)})" for split in data))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
