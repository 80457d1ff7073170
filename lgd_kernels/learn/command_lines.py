"""Write the lines of Python that the command prints last: they sample the model with an omega of the run."""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch import Tensor, nn

from lgd_kernels.learn import sources
from lgd_kernels.learn.frozen import Frozen

STEPS = 20  # where the command compared no samples


def lines(
    args: argparse.Namespace, frozen: Frozen, x0: Tensor, classes: int | None, device: str, file: str = "omega"
) -> list[str]:
    """Return lines without empty lines or blocks, ready to paste. The lines import the model's module and, for
    embeddings, load the data.

    Args:
        x0: items `[N, ...]`, for their shape and dtype.
        classes: the number of labels, or None for embeddings.
        device: of the model.
        file: the name of omega's file in --out.
    """
    count = 256 if math.prod(x0.shape[1:]) <= 4096 else 16  # embeddings may be fewer
    there = "" if device == "cpu" else f', device="{device}"'
    like = there if x0.dtype == torch.float32 else f"{there}, dtype={x0.dtype}"
    steps = args.sample_steps or STEPS
    shape = ", ".join(map(str, ("len(c)", *x0.shape[1:])))
    module, model = _expression(args.model)
    if isinstance(frozen.denoiser, nn.Module):
        model += ".eval()" if device == "cpu" else f'.to("{device}").eval()'
    imports = ["import torch", f"import {module}", "from lgd_kernels import sampler, solvers"]
    if classes is not None:
        condition = f"c = torch.arange({count}{there}) % {classes}  # the labels to sample"
    else:
        imports.append("from lgd_kernels.learn import sources")
        to = "" if device == "cpu" else f'.to("{device}")'
        condition = (
            f"c = sources.first(sources.load({json.dumps(args.data)}), {count})[1]{to}  # the embeddings to sample"
        )
    if isinstance(frozen.null, int):
        null = f"torch.full_like(c, {frozen.null})"
    elif args.null == "zeros":
        null = "torch.zeros_like(c)"
    else:
        module, null = _expression(args.null)
        imports.insert(2, f"import {module}")
        null += ".to(c).expand_as(c)" if isinstance(frozen.null, Tensor) else "(c)"
    return [
        "from lgd_kernels.omega.files import load",
        *dict.fromkeys(imports),
        f"model = {model}",
        condition,
        f"null = {null}",
        f"omega = load({json.dumps(str(args.out / f'{file}.safetensors'))}{there})",
        "schedule, prediction = omega.schedule, omega.prediction",
        f"times = schedule.from_unit(torch.linspace({start(args, frozen)}, 0, {steps + 1}{there}))",
        "plan = solvers.one_step(schedule, times, prediction=prediction)",
        f"x = schedule.signal_noise(times[:1])[1] * torch.randn({shape}{like})",
        "sample = torch.no_grad()(sampler.sample)",
        "samples = sample(model, x, plan, cond=c, uncond=null, omega=omega)",
    ]


def _expression(text: str) -> tuple[str, str]:
    """Return the module, and the object as Python code, of module:name, module:name() or module:name(text).

    >>> _expression("my_model:make(some file.pt)")
    ('my_model', 'my_model.make("some file.pt")')
    """
    module, name, argument = sources.parsed(text, "--model")
    called = "" if argument is None else f"({json.dumps(argument) if argument else ''})"
    return module, f"{module}.{name}{called}"


def start(args: argparse.Namespace, frozen: Frozen) -> float:
    """Return the unit time to start at: 1, pure noise, unless the prediction is eps and the signal is 0 there."""
    signal, _ = frozen.schedule.signal_noise(frozen.schedule.from_unit(torch.ones(1, device="cpu")))
    return 1 - (args.zeta or 0.01) if frozen.prediction == "eps" and float(signal) == 0 else 1
