"""Call the networks of diffusers' pipelines: what each family takes of a prompt, and how its network is called.

A family encodes prompts one at a time, so that what a prompt gives does not depend on the rest of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor]  # what the network takes of the condition, [N, ...]


class Encoded(NamedTuple):
    """Hold one prompt: the vector `[E]` that omega is a function of, and the inputs of the network, `[...]` each."""

    pooled: Tensor
    inputs: Inputs


class Family(NamedTuple):
    """Hold how one kind of network is used.

    Attributes:
        network: the name of the network in the pipeline.
        encode: `(pipe, prompt) -> Encoded`; None for class labels.
        call: `(pipe, x [N, ...], t [N], inputs, guidance) -> prediction`; t are indices, or times of a flow up to 1000.
    """

    network: str
    encode: Callable[[Any, str], Encoded] | None
    call: Callable[[Any, Tensor, Tensor, Inputs, float], Tensor]


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline. Raise ValueError that names the pipeline, if it belongs to none."""
    for part in ("transformer", "unet"):
        kind = type(getattr(getattr(pipe, part, None), "_orig_mod", getattr(pipe, part, None))).__name__
        found = FAMILIES.get(kind)
        if found is not None:
            return found if kind != UNET else (SDXL if getattr(pipe, "tokenizer_2", None) is not None else SD)
    raise ValueError(
        f"frozen_of: `pipe` is a {type(pipe).__name__}, whose network is none of {', '.join(FAMILIES)}; call its "
        "network in a function (x, t, c) of your own, and pass that to Frozen, or to the command as --model"
    )


def _device(pipe: Any, network: str) -> torch.device:
    return next(getattr(pipe, network).parameters()).device


def _rows(tensors: dict[str, Tensor]) -> Inputs:
    """Return the only row of each tensor."""
    return {name: tensor[0] for name, tensor in tensors.items()}


def _mean(embeds: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens `[L, E]` of a prompt that a mask `[L]` keeps, in float32."""
    weights = torch.ones(len(embeds), 1, device=embeds.device) if mask is None else mask[:, None].float()
    return (embeds.float() * weights).sum(0) / weights.sum(0).clamp(min=1)


# Stable Diffusion 1 and 2: a U-Net; CLIP's state at the end of the prompt is its pooled embedding.


def _encode_sd(pipe: Any, prompt: str) -> Encoded:
    device = pipe.text_encoder.device
    tokens = pipe.tokenizer(
        [prompt], padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    masked = getattr(pipe.text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    pooled = pipe.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[1]
    embeds = pipe.encode_prompt([prompt], device, 1, False)[0]
    return Encoded(pooled[0], _rows({"embeds": embeds}))


def _call_sd(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    return pipe.unet(x, t, encoder_hidden_states=inputs["embeds"], return_dict=False)[0]


# SDXL: two text encoders; the U-Net takes the second one's pooled embedding, and the size of the image.


def _encode_sdxl(pipe: Any, prompt: str) -> Encoded:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt=[prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Encoded(pooled[0], _rows({"embeds": embeds, "pooled": pooled}))


def _call_sdxl(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    size = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)  # original, corner, target
    added = {"text_embeds": inputs["pooled"], "time_ids": size}
    return pipe.unet(
        x, t, encoder_hidden_states=inputs["embeds"], added_cond_kwargs=added, return_dict=False
    )[0]  # fmt: skip


# Stable Diffusion 3.


def _encode_sd3(pipe: Any, prompt: str) -> Encoded:
    embeds, _, pooled, _ = pipe.encode_prompt(
        [prompt], None, None, device=_device(pipe, "transformer"), do_classifier_free_guidance=False
    )
    return Encoded(pooled[0], _rows({"embeds": embeds, "pooled": pooled}))


def _call_sd3(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    return pipe.transformer(
        hidden_states=x, timestep=t, encoder_hidden_states=inputs["embeds"], pooled_projections=inputs["pooled"],
        return_dict=False,
    )[0]  # fmt: skip


# Flux: latents in patches of 2 x 2, t in [0, 1]; a guidance-distilled network takes `guidance` beside them.


def _encode_flux(pipe: Any, prompt: str) -> Encoded:
    embeds, pooled, _ = pipe.encode_prompt([prompt], None, device=_device(pipe, "transformer"))
    return Encoded(pooled[0], _rows({"embeds": embeds, "pooled": pooled}))


def _call_flux(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    n, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    packed = x.view(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, 4 * channels)
    where = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    where[..., 1] = torch.arange(rows, device=x.device)[:, None]
    where[..., 2] = torch.arange(columns, device=x.device)
    embeds = inputs["embeds"]
    embedded = torch.full((n,), guidance, device=x.device) if pipe.transformer.config.guidance_embeds else None
    found = pipe.transformer(
        hidden_states=packed, timestep=t.to(x.dtype) / 1000, guidance=embedded, pooled_projections=inputs["pooled"],
        encoder_hidden_states=embeds, txt_ids=where.new_zeros(embeds.shape[1], 3), img_ids=where.view(-1, 3),
        return_dict=False,
    )[0]  # fmt: skip
    return found.view(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


# PixArt: T5 alone, so the pooled embedding is the mean over the tokens of the prompt.


def _encode_pixart(pipe: Any, prompt: str) -> Encoded:
    embeds, mask, _, _ = pipe.encode_prompt(
        [prompt], do_classifier_free_guidance=False, device=_device(pipe, "transformer"), clean_caption=False
    )
    return Encoded(_mean(embeds[0], mask[0]), _rows({"embeds": embeds, "mask": mask}))


def _call_pixart(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == 128:
        height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
        ratio = x.new_full((len(x), 1), height / width)
        added = {"resolution": x.new_tensor([height, width]).expand(len(x), -1), "aspect_ratio": ratio}
    found = pipe.transformer(
        x, encoder_hidden_states=inputs["embeds"], encoder_attention_mask=inputs["mask"], timestep=t,
        added_cond_kwargs=added, return_dict=False,
    )[0]  # fmt: skip
    return found[:, : x.shape[1]]  # without the learned variance


# DiT: labels.


def _call_dit(pipe: Any, x: Tensor, t: Tensor, inputs: Inputs, guidance: float) -> Tensor:
    return pipe.transformer(x, timestep=t, class_labels=inputs["labels"], return_dict=False)[0][:, : x.shape[1]]


UNET = "UNet2DConditionModel"
SD, SDXL = Family("unet", _encode_sd, _call_sd), Family("unet", _encode_sdxl, _call_sdxl)
FAMILIES = {
    UNET: SD,
    "SD3Transformer2DModel": Family("transformer", _encode_sd3, _call_sd3),
    "FluxTransformer2DModel": Family("transformer", _encode_flux, _call_flux),
    "PixArtTransformer2DModel": Family("transformer", _encode_pixart, _call_pixart),
    "DiTTransformer2DModel": Family("transformer", None, _call_dit),
}
