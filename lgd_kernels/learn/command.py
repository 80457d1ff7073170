"""Learn omega for a model and data of your own, and compare samples: `python -m lgd_kernels learn`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels.learn import (
    checkpoint,
    command_fits,
    command_lines,
    command_pipeline,
    command_samples,
    readings,
    sources,
)
from lgd_kernels.learn import command_options as options
from lgd_kernels.learn.batches import Batches, Settings
from lgd_kernels.learn.data import Data, items_of, size_of
from lgd_kernels.learn.diffusers import PipelineDenoiser
from lgd_kernels.learn.distributed import process_group, rank_and_size
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.logs import Csv, JsonLines
from lgd_kernels.learn.losses import self_consistency_loss
from lgd_kernels.learn.particles import Particles
from lgd_kernels.learn.reward import Loss, black_box_reward_loss, reward_loss, with_reward
from lgd_kernels.learn.trainer import NotFinite, Trainer
from lgd_kernels.omega.files import described
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime import files_atomic
from lgd_kernels.runtime.progress import bars
from lgd_kernels.sampling.schedules import Schedule

ROUNDS = 8  # draws of each held-out item
# Options that may differ when a run is resumed.
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
    "chunk",
    "cache_folder",
)


def main(arguments: list[str]) -> int:
    """Run the command. Return the exit status: 0; 1 for NaN, or a file that cannot be written; 2 for wrong options or
    inputs."""
    args = options.parse(arguments)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the user's modules
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        with process_group("gloo" if args.device == "cpu" else None) as device:
            if args.device == "cuda" and device.type != "cuda":
                raise ValueError("--device cuda: PyTorch sees no GPU here")
            settings = options.settings(args)
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
    if args.pipeline is not None:
        frozen = command_pipeline.opened(args, device)
        read: Callable[[str], Data] = partial(command_pipeline.read, args, frozen, track)
        data = read(args.data)
        x0, c = sources.first(data)
        classes = command_pipeline.conditions_of(frozen)
    else:
        read = partial(sources.load, size=args.size)
        data = read(args.data)
        x0, c = sources.first(data)
        classes = None if c.is_floating_point() else _classes(args, data)
        frozen = _frozen(args, c, classes, device)
    if args.omega == "table" and classes is None:
        raise ValueError("--omega table: a table's conditions are labels, but c are embeddings; --omega network")
    _try(frozen, x0.to(device), c.to(device))
    learning, held = sources.parted(data, args.held_out, args.seed, read)
    if first:
        _compare_readings(frozen, learning, min(320, 2 * args.m * args.batch), device)
        files_atomic.write(args.out / "settings.json", (json.dumps(_asked(args), indent=1) + "\n").encode())
    loss = partial(self_consistency_loss, beta=args.beta, lam=args.lam, churn=args.churn, impl=args.impl)
    batches = Batches(frozen, learning, settings, device, args.cache_folder)
    if args.omega == "network":
        torch.manual_seed(args.seed)
        network = OmegaNetwork(frozen.schedule, classes, None if classes else c.shape[1], args.hidden).to(device)
        log = Csv(args.out / "log.csv") if args.log == "csv" else JsonLines(args.out / "log.jsonl")
        own: dict[str, Any] = {"held_out": held, "folder": args.out, "every": args.every, "logs": [log]}
        own["cache_folder"] = args.cache_folder
        trainer = Trainer(network, frozen, learning, settings, loss=_rewarded(args, frozen, loss), **own)
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
    omegas = command_fits.others_of(args, fits) | {args.omega: learned}
    losses = _losses(batches.parts(held, min(4096, ROUNDS * size_of(held)), args.seed + 1), loss, omegas)
    command_fits.save(args, fits, learned, frozen, losses, c.to(device), classes)
    print(command_fits.summary(args, fits, losses), flush=True)
    found = command_samples.compare(args, frozen, omegas, held, device, track)
    file = command_samples.file(found)
    if args.pipeline is not None:
        print("\n".join(command_pipeline.lines(args, frozen, held, device.type, file)))
    else:
        print("\n".join(command_lines.lines(args, frozen, x0, classes, device.type, file)))
    return 0


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that belong to a run, as JSON values."""
    kept = {name: value for name, value in vars(args).items() if name not in FREE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def _same_run(args: argparse.Namespace) -> None:
    """Refuse to resume a run with other options, or to overwrite a run."""
    path = args.out / "settings.json"
    asked = _asked(args)
    if args.resume and path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--resume: {path} is damaged ({error}); remove it to go on with these options") from error
        for name, value in asked.items():
            if before.get(name) != value:
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
    if args.schedule in options.SCHEDULES:
        schedule = options.SCHEDULES[args.schedule]()
    elif ":" in args.schedule:
        schedule = sources.named(args.schedule, "--schedule")
    else:
        raise ValueError(
            f"--schedule is {args.schedule!r}, expected one of {', '.join(options.SCHEDULES)}, or MODULE:NAME"
        )
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
        named, hint = "--prediction is", f"pass --prediction {best}"
        if isinstance(frozen.denoiser, PipelineDenoiser):
            named, hint = "the pipeline's scheduler says", "correct prediction_type in its scheduler_config.json"
        print(
            f"learn: warning: {named} {frozen.prediction}, but read as {best} the model's output fits the data better "
            f"(mean squared error of x0: {errors}); if the model returns {best}, {hint}",
            file=sys.stderr,
        )


def _rewarded(args: argparse.Namespace, frozen: Frozen, loss: Loss) -> Loss:
    if not args.reward:
        return loss
    if args.reward.startswith("clip:") and args.pipeline is not None:
        reward = command_pipeline.reward_of(args.reward, frozen)
    else:
        reward = sources.named(args.reward, "--reward")
    if not callable(reward):
        raise ValueError(f"--reward: {args.reward} is a {type(reward).__name__}, expected a callable (x0, c) -> [N]")
    estimate = partial(black_box_reward_loss if args.black_box else reward_loss, impl=args.impl)
    return with_reward(reward, args.gamma, loss, estimate=estimate)


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
