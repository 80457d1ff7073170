"""Learn omega for a model and data of your own, and compare samples: `python -m lgd_kernels learn`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels.learn import checkpoint, command_fits, command_lines, command_samples, readings, runs, sources
from lgd_kernels.learn.batches import Batches, Settings
from lgd_kernels.learn.data import Data, items_of, size_of
from lgd_kernels.learn.distributed import process_group, rank_and_size
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.logs import Csv, JsonLines
from lgd_kernels.learn.losses import self_consistency_loss
from lgd_kernels.learn.particles import Particles
from lgd_kernels.learn.reward import Loss, black_box_reward_loss, reward_loss, with_reward
from lgd_kernels.learn.trainer import NotFinite, Trainer
from lgd_kernels.omega.files import described
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime import files_atomic, impls
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.runtime.progress import bars
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule, VPCosine, VPLinear

SCHEDULES = {
    "flow": RectifiedFlow,
    "cosine": VPCosine,
    "linear": VPLinear.ddpm,
    "edm": EDM,
    "ddpm": Discrete.ddpm,
    "stable-diffusion": Discrete.stable_diffusion,
}
ROUNDS = 8  # draws of each held-out item
KINDS = ("network", "table", "constant", "interval")
OURS = Settings()
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {  # of options that are no settings of the trainer: tests
    "beta": (lambda beta: 0 < beta <= 2, "a power in (0, 2]"),
    "lam": (lambda lam: 0 <= lam <= 1, "a weight in [0, 1]"),
    "churn": (lambda churn: 0 <= churn <= 1, "a number in [0, 1]"),
    "gamma": (math.isfinite, "a finite number"),
}
FREE = (
    "steps",
    "resume",
    "threads",
    "device",
    "out",
    "impl",
    "every",
    "sample_steps",
    "samples",
)  # may differ when a run is resumed


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options. Exit with status 2 and a message for an invalid one."""
    parser = argparse.ArgumentParser(
        prog="python -m lgd_kernels learn",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage="python -m lgd_kernels learn --data DATA --model MODULE:NAME [options]",
        description="Learn the guidance weight omega(c, s, t) of a frozen model from clean data. docs/learning.md is "
        "the guide. MODULE:NAME is a Python object; MODULE:NAME() calls it, MODULE:NAME(TEXT) calls it with a text.",
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="a folder of images in folders of their class (Pillow; [3, H, W] in [-1, 1]); "
        "a .npz or .pt file with x0 [N, ...] and c, labels [N] or embeddings [N, E]; or MODULE:NAME, such a pair of "
        "tensors or a dataset of pairs (x0, c)",
    )
    add("--size", type=int, help="side of the images of a folder: each is cut to the middle square and scaled")
    add("--classes", type=int, help="number of labels; by default the largest label + 1, or the number of folders")
    add(
        "--held-out",
        default="0.1",
        help="share of the data to compare on, or other data like --data; 4096 items at most",
    )
    add("--model", required=True, help="MODULE:NAME, a callable (x [N, ...], t [N], c [N, ...]) -> prediction")
    add("--prediction", choices=PREDICTIONS, default="x0", help="what the model returns")
    add("--schedule", default="flow", help=f"of the model's times: {', '.join(SCHEDULES)}, or MODULE:NAME, a Schedule")
    add(
        "--null",
        help="the condition that means none: the index of a class (by default the first after the labels), "
        "zeros (an embedding of them), or MODULE:NAME, an embedding or a function of c",
    )
    add(
        "--omega",
        choices=KINDS,
        default="network",
        help="by gradient descent (network), or an exact fit to --items items",
    )
    add("--hidden", type=int, default=64, help="width of the hidden layers of the network")
    add("--knots", type=int, default=11, help="number of knots of the table, in s and in t")
    add("--items", type=int, default=8192, help="items to predict for the fits; with --cache the cached items serve")
    add("--beta", type=float, default=1.75, help="power of the distance in the loss")
    add("--lam", type=float, default=1.0, help="weight of the repulsion between particles")
    add("--churn", type=float, default=1.0, help="churn of the step in the loss: 1 adds DDPM's noise, 0 none")
    add("--m", type=int, default=OURS.particles, help="particles of each item")
    add(
        "--delta",
        type=float,
        help="the shortest step that is learned, in unit time; by default 1 / --sample-steps, and the paper's "
        f"{OURS.delta} at most",
    )
    add("--s-min", type=float, default=OURS.s_min, help="the smallest s, in unit time")
    add("--zeta", type=float, default=OURS.zeta, help="t is below 1 - zeta, in unit time")
    add("--steps", type=int, default=2000, help="updates of the network, with those before a resume")
    add("--batch", type=int, default=OURS.batch, help="items of an update, over all processes")
    add("--lr", type=float, default=OURS.lr, help="learning rate of AdamW")
    add("--ema", type=float, default=0.99, help="decay of the average of the network's weights")
    add("--cache", type=int, default=0, help="items to predict once and to train the network on; 0 predicts each batch")
    add("--reward", help="MODULE:NAME, R(x0 [N, ...], c [N, ...]) -> [N], to add to the network's loss")
    add("--gamma", type=float, default=0.0, help="weight of the reward")
    add("--black-box", action="store_true", help="the reward has no gradient")
    add(
        "--sample-steps",
        type=int,
        default=50,
        help="steps that you will sample with, and that samples are compared in at the end; 0 compares losses only",
    )
    add("--samples", type=int, help="samples to compare, of all classes together; by default 64 to 1024, by their size")
    add("--out", type=Path, default=Path("runs/omega"), help="folder for omega, its picture, the log, the checkpoint")
    add("--every", type=int, default=200, help="updates between two rows of the log, and between two checkpoints")
    add("--log", choices=("csv", "jsonl"), default="csv")
    add("--resume", action="store_true", help="continue from the checkpoint in the folder, with the same bits")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), help="by default a GPU, if there is one")
    add("--threads", type=int, help="threads of PyTorch and of the kernels")
    add("--impl", choices=impls.NAMES, help="implementation of the loss; by default the first that can compute it")
    args = parser.parse_args(arguments)
    for name in ("m", "steps", "batch", "every", "items", "hidden", "threads", "size", "classes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if args.sample_steps < 0:
        parser.error(f"--sample-steps is {args.sample_steps}, expected 1 or more, or 0 to compare losses only")
    if args.samples is not None and args.samples < runs.LEAST:
        parser.error(f"--samples is {args.samples}, expected {runs.LEAST} or more")
    args.delta = command_samples.delta(args.sample_steps) if args.delta is None else args.delta
    if args.knots < 2:
        parser.error(f"--knots is {args.knots}, expected 2 or more")
    if args.omega != "network" and (args.reward or args.resume):
        parser.error("--reward and --resume are for --omega network; the fits are exact, and take seconds")
    if (args.black_box or args.gamma) and not args.reward:
        parser.error("--black-box and --gamma are options of a reward: pass --reward")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    """Return the trainer's settings. Raise ValueError, naming the option, for a number out of range."""
    for name, (holds, expected) in NUMBERS.items():
        if not holds(value := getattr(args, name)):
            raise ValueError(f"--{name} is {value}, expected {expected}")
    if args.m < 2 and args.lam > 0:
        raise ValueError(f"--m is {args.m}, but with --lam above 0 particles repel each other: pass --m 2 or --lam 0")
    try:
        own = {name: getattr(args, name) for name in ("batch", "delta", "zeta", "s_min", "lr", "ema", "seed", "cache")}
        return Settings(particles=args.m, **own)
    except ValueError as error:
        named = re.sub(r"^Settings: `(\w+)`", lambda found: "--" + found[1].replace("_", "-"), str(error))
        raise ValueError(named.replace("Settings: ", "")) from error


def main(arguments: list[str]) -> int:
    """Run the command. Return the exit status: 0; 1 for NaN, or a file that cannot be written; 2 for wrong options or
    inputs."""
    args = parse(arguments)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the user's modules
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        with process_group("gloo" if args.device == "cpu" else None) as device:
            if args.device == "cuda" and device.type != "cuda":
                raise ValueError("--device cuda: PyTorch sees no GPU here")
            settings = _settings(args)
            with checkpoint.locked(args.out, "--out") if rank_and_size()[0] == 0 else nullcontext():
                return run(args, settings, device)
    except BrokenPipeError:
        raise  # `... learn | head`: lgd_kernels.__main__ ends without a message
    except (NotFinite, OSError) as error:
        unnamed = isinstance(error, OSError) and error.filename is None  # a full disk, for an open file
        print(f"learn: {error}" + (f"; --out is {args.out}" if unnamed else ""), file=sys.stderr)
        return 1
    except (ValueError, TypeError, ImportError) as error:
        print(f"learn: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, settings: Settings, device: torch.device) -> int:
    """Prepare, learn, compare and save. Only the first process writes and prints."""
    first, track = rank_and_size()[0] == 0, bars("learn")
    if first:
        _same_run(args)
    data = sources.load(args.data, args.size)
    x0, c = sources.first(data)
    classes = None if c.is_floating_point() else _classes(args, data)
    if args.omega == "table" and classes is None:
        raise ValueError("--omega table: a table's conditions are labels, but c are embeddings; --omega network")
    frozen = _frozen(args, c, classes, device)
    _try(frozen, x0.to(device), c.to(device))
    learning, held = sources.parted(data, args.held_out, args.seed, args.size)
    if first:
        _compare_readings(frozen, learning, min(320, 2 * args.m * args.batch), device)
        asked = {name: value for name, value in vars(args).items() if name not in FREE}
        files_atomic.write(args.out / "settings.json", (json.dumps(asked, indent=1) + "\n").encode())
    loss = partial(self_consistency_loss, beta=args.beta, lam=args.lam, churn=args.churn, impl=args.impl)
    batches = Batches(frozen, learning, settings, device)
    if args.omega == "network":
        torch.manual_seed(args.seed)
        network = OmegaNetwork(frozen.schedule, classes, None if classes else c.shape[1], args.hidden).to(device)
        log = Csv(args.out / "log.csv") if args.log == "csv" else JsonLines(args.out / "log.jsonl")
        own: dict[str, Any] = {"held_out": held, "folder": args.out, "every": args.every, "logs": [log]}
        trainer = Trainer(network, frozen, learning, settings, loss=_rewarded(args, loss), **own)
        if not trainer.resume() and args.resume:
            raise ValueError(f"--resume: there is no checkpoint in {args.out}")
        if trainer.step > args.steps:
            raise ValueError(f"--steps is {args.steps}, but {trainer.step} updates are done in {args.out}")
        trainer.train(args.steps, track)
        batches = trainer.batches
    if not first:
        return 0
    fits = command_fits.fit(args, batches, classes, track)
    learned = trainer.ema if args.omega == "network" else getattr(fits, args.omega)
    omegas = {"unguided": _unguided, "constant": fits.constant, "interval": fits.interval, args.omega: learned}
    losses = _losses(batches.parts(held, min(4096, ROUNDS * size_of(held)), args.seed + 1), loss, omegas)
    command_fits.save(args, fits, learned, frozen, losses, c.to(device), classes)
    print(command_fits.summary(args, fits, losses), flush=True)
    found = command_samples.compare(args, frozen, omegas, held, device, track)
    file = command_samples.file(found)
    print("\n".join(command_lines.lines(args, frozen, x0, classes, device.type, file)))
    return 0


def _same_run(args: argparse.Namespace) -> None:
    """Refuse to resume a run with other options, or to overwrite a run."""
    path = args.out / "settings.json"
    if args.resume and path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--resume: {path} is damaged ({error}); remove it to go on with these options") from error
        for name, value in vars(args).items():
            if name not in FREE and before.get(name) != value:
                raise ValueError(
                    f"--resume: the run in {args.out} had {name} = {before.get(name)}, here it is {value}; pass the "
                    "same, or another --out"
                )
    if not args.resume and (args.out / "trainer.ckpt").exists():
        raise ValueError(f"{args.out} holds a checkpoint: go on from it with --resume, or pass another --out")


def _classes(args: argparse.Namespace, data: Data) -> int:
    """Return the number of labels."""
    if isinstance(data, tuple):
        low, high = int(data[1].min()), int(data[1].max())
        if low < 0 or (args.classes is not None and high >= args.classes):
            raise ValueError(f"--data: labels reach from {low} to {high}, expected 0 to --classes - 1")
        return args.classes or high + 1
    found = args.classes or (len(data.classes) if isinstance(data, sources.Images) else None)
    if found is None:
        raise ValueError("--classes is missing: a dataset does not say how many labels there are")
    return found


def _frozen(args: argparse.Namespace, c: Tensor, classes: int | None, device: torch.device) -> Frozen:
    denoiser = sources.named(args.model, "--model")
    if isinstance(denoiser, nn.Module):
        denoiser = denoiser.to(device).eval()
    if args.schedule in SCHEDULES:
        schedule = SCHEDULES[args.schedule]()
    elif ":" in args.schedule:
        schedule = sources.named(args.schedule, "--schedule")
    else:
        raise ValueError(f"--schedule is {args.schedule!r}, expected one of {', '.join(SCHEDULES)}, or MODULE:NAME")
    if not isinstance(schedule, Schedule):
        raise ValueError(f"--schedule: {args.schedule} is a {type(schedule).__name__}, expected a Schedule")
    try:
        described(schedule)
    except TypeError as error:
        raise ValueError(f"--schedule: {error}") from error
    null = classes if args.null is None else args.null
    if null is None:
        raise ValueError("--null is missing: c are embeddings; pass zeros, or MODULE:NAME")
    if null == "zeros":
        null = torch.zeros(c.shape[1:], device="cpu")
    elif isinstance(null, str):
        null = int(null) if null.lstrip("-").isdigit() else sources.named(null, "--null")
    return Frozen(denoiser, schedule, args.prediction, null)


def _try(frozen: Frozen, x0: Tensor, c: Tensor) -> None:
    """Call the model once, so that an error names a wrong model first."""
    t = frozen.schedule.from_unit(torch.full((len(x0),), 0.5, device=x0.device))
    null = frozen.null_like(c)
    try:
        with torch.no_grad():
            frozen.denoiser(torch.cat((x0, x0)), torch.cat((t, t)), torch.cat((c, null)))
    except Exception as error:
        raise ValueError(
            f"--model: it failed for x {[2 * len(x0), *x0.shape[1:]]}, t [{2 * len(t)}] and c "
            f"{[2 * len(c), *c.shape[1:]]}: {type(error).__name__}: {error}"
        ) from error
    frozen.predict(x0, t, c)


def _compare_readings(frozen: Frozen, data: Data, count: int, device: torch.device) -> None:
    """Warn if the model seems to return another prediction than --prediction."""
    size = size_of(data)
    items = torch.linspace(0, size - 1, min(count, size), device="cpu", dtype=torch.float64).long()
    x0, c = items_of(data, items)
    found = readings.readings(frozen, x0.to(device), c.to(device))
    best = readings.better(found, frozen.prediction)
    if best is not None:
        errors = f"{found[best].error:.3g} instead of {found[frozen.prediction].error:.3g}"
        print(
            f"learn: warning: --prediction is {frozen.prediction}, but read as {best} the model's output fits the data "
            f"better (mean squared error of x0: {errors}); if the model returns {best}, pass --prediction {best}",
            file=sys.stderr,
        )


def _rewarded(args: argparse.Namespace, loss: Loss) -> Loss:
    if not args.reward:
        return loss
    reward = sources.named(args.reward, "--reward")
    if not callable(reward):
        raise ValueError(f"--reward: {args.reward} is a {type(reward).__name__}, expected a callable (x0, c) -> [N]")
    estimate = partial(black_box_reward_loss if args.black_box else reward_loss, impl=args.impl)
    return with_reward(reward, args.gamma, loss, estimate=estimate)


def _unguided(c: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(len(s), device=s.device)


@torch.no_grad()
def _losses(parts: Iterable[Particles], loss: Loss, omegas: dict[str, command_fits.Omega]) -> dict[str, Tensor]:
    """Return the loss of each held-out draw, `[N]`, for every omega, on the same draws."""
    found: dict[str, list[Tensor]] = {name: [] for name in omegas}
    for part in parts:
        for name, omega in omegas.items():
            found[name].append(loss(part, omega(part.c, part.s, part.t).float()).double().cpu())
    losses = {name: torch.cat(each) for name, each in found.items()}
    for name, each in losses.items():
        if bad := int((~each.isfinite()).sum()):
            raise NotFinite(
                f"the held-out loss of {name} is NaN or infinite in {bad} of {len(each)} draws: look at the held-out "
                "data, and at what the model returns for them"
            )
    return losses
