"""Declare the options of the command `python -m lgd_kernels learn`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from lgd_kernels.learn import command_samples, runs
from lgd_kernels.learn.batches import Settings
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, VPCosine, VPLinear

SCHEDULES = {
    "flow": RectifiedFlow,
    "cosine": VPCosine,
    "linear": VPLinear.ddpm,
    "edm": EDM,
    "ddpm": Discrete.ddpm,
    "stable-diffusion": Discrete.stable_diffusion,
}
KINDS = ("network", "table", "constant", "interval")
OURS = Settings()
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {  # of options that are no settings of the trainer: tests
    "beta": (lambda beta: 0 < beta <= 2, "a power in (0, 2]"),
    "lam": (lambda lam: 0 <= lam <= 1, "a weight in [0, 1]"),
    "churn": (lambda churn: 0 <= churn <= 1, "a number in [0, 1]"),
    "gamma": (math.isfinite, "a finite number"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options. Exit with status 2 and a message for an invalid one."""
    parser = argparse.ArgumentParser(
        prog="python -m lgd_kernels learn",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage="python -m lgd_kernels learn --data DATA (--model MODULE:NAME | --pipeline FOLDER) [options]",
        description="Learn the guidance weight omega(c, s, t) of a frozen model from clean data. docs/learning.md is "
        "the guide, docs/pipelines.md that for pipelines of diffusers. MODULE:NAME is a Python object; MODULE:NAME() "
        "calls it, MODULE:NAME(TEXT) calls it with a text.",
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="a folder of images in folders of their class (Pillow; [3, H, W] in [-1, 1]); "
        "a .npz or .pt file with x0 [N, ...] and c, labels [N] or embeddings [N, E]; or MODULE:NAME, such a pair of "
        "tensors or a dataset of pairs (x0, c). With --pipeline, images with captions: a folder with metadata.jsonl, "
        "with a .txt beside each image, or with a folder for each class",
    )
    add("--size", type=int, help="side of the images of a folder: each is cut to the middle square and scaled")
    add("--classes", type=int, help="number of labels; by default the largest label + 1, or the number of folders")
    add(
        "--held-out",
        default="0.1",
        help="share of the data to compare on, or other data like --data; 4096 items at most",
    )
    add("--model", help="MODULE:NAME, a callable (x [N, ...], t [N], c [N, ...]) -> prediction")
    add("--prediction", choices=PREDICTIONS, help="what the model returns; by default x0")
    add(
        "--schedule",
        help=f"of the model's times: {', '.join(SCHEDULES)}, or MODULE:NAME, a Schedule; by default flow",
    )
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
    add(
        "--particles",
        "--m",
        dest="m",
        type=int,
        default=OURS.particles,
        help="of each item (torchrun takes --m for an option of its own)",
    )
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
    add(
        "--cache-folder",
        type=Path,
        help="keep the cached predictions in files there, for more than memory holds, and for the next run",
    )
    add(
        "--reward",
        help="MODULE:NAME, R(x0 [N, ...], c [N, ...]) -> [N], to add to the network's loss; with --pipeline also "
        "clip:FOLDER, CLIP's cosine between the decoded image and its prompt",
    )
    add("--gamma", type=float, default=0.0, help="weight of the reward")
    add("--black-box", action="store_true", help="the reward has no gradient")
    add(
        "--sample-steps",
        type=int,
        default=50,
        help="steps that you will sample with, and that samples are compared in at the end; 0 compares losses only",
    )
    add("--by-hand", type=float, help="the omega that you use today, guidance_scale - 1, to compare with")
    add("--samples", type=int, help="samples to compare, of all classes together; by default 64 to 1024, by their size")
    add("--out", type=Path, default=Path("runs/omega"), help="folder for omega, its picture, the log, the checkpoint")
    add("--every", type=int, default=200, help="updates between two rows of the log, and between two checkpoints")
    add("--log", choices=("csv", "jsonl"), default="csv")
    add("--resume", action="store_true", help="continue from the checkpoint in the folder, with the same bits")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), help="by default a GPU, if there is one")
    add("--threads", type=int, help="threads of PyTorch and of the kernels")
    add("--impl", choices=impls.NAMES, help="implementation of the loss; by default the first that can compute it")
    add = parser.add_argument_group("pipelines of diffusers, in place of --model").add_argument
    add("--pipeline", type=Path, help="a folder that pipe.save_pretrained wrote")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the pipeline's weights")
    add("--chunk", type=int, default=32, help="the most samples in one call of the pipeline's network")
    add("--negative-prompt", help="the prompt that means none; by default what the pipeline uses without one")
    add(
        "--embedded-guidance", type=float, default=3.5, help="guidance_scale that a distilled network (Flux dev) embeds"
    )
    args = parser.parse_args(arguments)
    _check_model(parser, args)
    for name in ("m", "steps", "batch", "every", "items", "hidden", "threads", "size", "classes", "chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            shown = "particles" if name == "m" else name
            parser.error(f"--{shown} is {getattr(args, name)}, expected 1 or more")
    if args.sample_steps < 0:
        parser.error(f"--sample-steps is {args.sample_steps}, expected 1 or more, or 0 to compare losses only")
    if args.samples is not None and args.samples < runs.LEAST:
        parser.error(f"--samples is {args.samples}, expected {runs.LEAST} or more")
    args.delta = command_samples.delta(args.sample_steps) if args.delta is None else args.delta
    if args.by_hand is not None and not 0 <= args.by_hand < math.inf:
        parser.error(f"--by-hand is {args.by_hand}, expected omega = guidance_scale - 1, 0 or more")
    if args.knots < 2:
        parser.error(f"--knots is {args.knots}, expected 2 or more")
    if args.omega != "network" and (args.reward or args.resume):
        parser.error("--reward and --resume are for --omega network; the fits are exact, and take seconds")
    if (args.black_box or args.gamma) and not args.reward:
        parser.error("--black-box and --gamma are options of a reward: pass --reward")
    if args.cache_folder is not None and not args.cache:
        parser.error("--cache-folder keeps cached predictions: pass --cache N, the number of items")
    return args


def _check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit unless there is one model, with options of its own. Fill in the defaults of --model."""
    if (args.model is None) == (args.pipeline is None):
        parser.error("pass one of --model MODULE:NAME and --pipeline FOLDER")
    if args.pipeline is not None:
        for name in ("prediction", "schedule", "null", "classes"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is an option of --model; a pipeline's configuration says it")
        return
    for name in ("dtype", "chunk", "negative_prompt", "embedded_guidance"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is an option of --pipeline")
    args.prediction, args.schedule = args.prediction or "x0", args.schedule or "flow"


def settings(args: argparse.Namespace) -> Settings:
    """Return the trainer's settings. Raise ValueError, naming the option, for a number out of range."""
    for name, (holds, expected) in NUMBERS.items():
        if not holds(value := getattr(args, name)):
            raise ValueError(f"--{name} is {value}, expected {expected}")
    if args.m < 2 and args.lam > 0:
        raise ValueError(
            f"--particles is {args.m}, but with --lam above 0 particles repel each other: pass --particles 2 or --lam 0"
        )
    try:
        own = {name: getattr(args, name) for name in ("batch", "delta", "zeta", "s_min", "lr", "ema", "seed", "cache")}
        return Settings(particles=args.m, **own)
    except ValueError as error:
        named = re.sub(r"^Settings: `(\w+)`", lambda found: "--" + found[1].replace("_", "-"), str(error))
        raise ValueError(named.replace("Settings: ", "")) from error
