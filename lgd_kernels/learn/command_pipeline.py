"""Open a pipeline of diffusers and images with captions for the command, and print the lines that sample with it."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.learn import captions, diffusers, sources
from lgd_kernels.learn.data import Data
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.runtime.progress import Track

PROMPTS = 4  # of the data, to sample


def opened(args: argparse.Namespace, device: torch.device) -> Frozen:
    """Load the pipeline of a folder, and return its frozen denoiser. Raises ValueError, naming --pipeline."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(f"--pipeline: pip install 'lgd_kernels[diffusers]' transformers ({error})") from error
    if not (args.pipeline / "model_index.json").is_file():
        raise ValueError(
            f"--pipeline: {args.pipeline} holds no model_index.json, expected a folder that pipe.save_pretrained "
            "wrote; a model of a hub is saved by DiffusionPipeline.from_pretrained(name).save_pretrained(folder)"
        )
    try:
        options: dict[str, Any] = {_dtype(): getattr(torch, args.dtype)}
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, local_files_only=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"--pipeline: {args.pipeline} cannot be opened: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    vae = getattr(pipe, "vae", None)
    if vae is not None and vae.config.get("force_upcast", False):
        vae.to(torch.float32)  # SDXL's overflows in float16
    options = {"chunk": args.chunk, "negative_prompt": args.negative_prompt, "guidance": args.embedded_guidance}
    return diffusers.frozen_of(pipe.to(device), **options)


def read(args: argparse.Namespace, frozen: Frozen, track: Track, data: str) -> captions.Latents:
    """Encode a folder of images with captions: latents, and the condition of each caption."""
    denoiser: Any = frozen.denoiser
    pipe = denoiser.pipe
    found = captions.captioned(sources.Path(data))
    size = args.size or _side(denoiser)
    labels = denoiser.family.encode is None
    condition: Callable[[str], Tensor] = partial(_label, pipe) if labels else lambda text: denoiser.condition([text])[0]
    return captions.encoded(found, size, partial(diffusers.latents_of, pipe), condition, track)


def conditions_of(frozen: Frozen) -> int | None:
    """Return the number of class labels of a pipeline's network; None for one that takes prompts."""
    denoiser: Any = frozen.denoiser
    return denoiser.network.config["num_embeds_ada_norm"] if denoiser.family.encode is None else None


def reward_of(text: str, frozen: Frozen) -> Any:
    """Return the reward `clip:FOLDER` for a pipeline."""
    from lgd_kernels.learn.clip import ClipReward

    denoiser: Any = frozen.denoiser
    if denoiser.family.encode is None:
        raise ValueError(f"--reward {text}: CLIP compares images with prompts, and this pipeline takes class labels")
    return ClipReward(text.removeprefix("clip:"), denoiser)


def lines(args: argparse.Namespace, frozen: Frozen, data: Data, device: str, file: str) -> list[str]:
    """Return lines to paste that sample the pipeline with the learned omega."""
    denoiser: Any = frozen.denoiser
    pipe, there = denoiser.pipe, "" if device == "cpu" else f'.to("{device}")'
    known = inspect.signature(type(pipe).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    negative = "" if args.negative_prompt is None and scale == "true_cfg_scale" else args.negative_prompt
    rows = sources.items_of(data, torch.arange(min(PROMPTS, sources.size_of(data)), device="cpu"))[1]
    where = "" if device == "cpu" else f', device="{device}"'
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    dtype = "" if args.dtype == "float32" else f", {_dtype()}=torch.{args.dtype}"
    opened = [f"pipe = DiffusionPipeline.from_pretrained({json.dumps(str(args.pipeline))}{dtype}){there}"]
    if denoiser.family.encode is None:
        condition, call = f"torch.tensor(labels{where})", "class_labels=labels"
        opened.append(f"labels = {rows.tolist()}")
    else:
        condition, call = "condition_of(pipe, prompts)", "prompts"
        imports.append("from lgd_kernels.learn.diffusers import condition_of")
        prompts = list(dict.fromkeys(denoiser.prompts_of(rows)))
        opened.append(f"prompts = {json.dumps(prompts, ensure_ascii=False)}")
        call += f", negative_prompt={json.dumps([negative] * len(prompts))}" if negative is not None else ""
    size = args.size or _side(denoiser)
    call += f", height={size}, width={size}" if "height" in known else ""
    for option in ("use_resolution_binning", "clean_caption"):  # as in learning
        call += f", {option}=False" if option in known else ""
    return [
        *imports,
        "from lgd_kernels.integrations.diffusers import LearnedScale",
        "from lgd_kernels.omega.files import load",
        *opened,
        f"omega = load({json.dumps(str(args.out / f'{file}.safetensors'))}{where})",
        f"scale = LearnedScale(omega, pipe, {condition})",
        f"images = pipe({call}, {scale}=scale, num_inference_steps={args.sample_steps or 50}).images",
        f"images[0].save({json.dumps(str(args.out / 'sample.png'))})",
    ]


def _dtype() -> str:
    """Return the name of from_pretrained's argument, which has changed."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


def _side(denoiser: Any) -> int:
    """Return the side of the images that a pipeline makes."""
    side = denoiser.network.config.get("sample_size") or getattr(denoiser.pipe, "default_sample_size", None)
    factor = getattr(denoiser.pipe, "vae_scale_factor", None)
    if factor is None:
        vae = getattr(denoiser.pipe, "vae", None)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1) if vae is not None else 1
    if not isinstance(side, int):
        raise ValueError(f"--size is missing: the pipeline says {side!r}, expected the side of its square images")
    return side * factor


def _label(pipe: Any, name: str) -> Tensor:
    """Return the label of a class folder: its number, or the name of a class of the pipeline."""
    known = getattr(pipe, "labels", {})
    label = known.get(name, int(name) if name.isdigit() else None)
    if label is None or not 0 <= label < pipe.transformer.config["num_embeds_ada_norm"]:
        raise ValueError(
            f"--data: {name!r} is no class of the pipeline; name each folder by the number of its class, or by one of "
            f"pipe.labels ({', '.join(list(known)[:3])}, ...)"
        )
    return torch.tensor(label, device="cpu")
