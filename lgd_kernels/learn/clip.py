"""Reward images that fit their prompt, by CLIP: the reward of the paper's text-to-image experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lgd_kernels.learn.diffusers import PipelineDenoiser, images_of


class ClipReward:
    """Compute the cosine between CLIP's embeddings of a decoded image and of its prompt: `(x0, c) -> [N]`.

    x0 are latents `[N, ...]`, c rows of `denoiser.condition(prompts)`. Images are decoded `chunk` at a time, scaled to
    CLIP's size and normalised as its processor's configuration says. Differentiable in x0, through CLIP and the VAE;
    the backward pass decodes again, so that its memory does not grow with the number of images.

    Args:
        folder: of a CLIPModel of transformers, with its tokenizer and image processor.
        denoiser: of `frozen_of(pipe)`.
        chunk: images decoded at a time.
    """

    def __init__(self, folder: Path | str, denoiser: PipelineDenoiser, chunk: int = 4) -> None:
        try:
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        except ImportError as error:
            raise ImportError(f"clip: pip install transformers ({error})") from error
        if not Path(folder).is_dir():
            raise ValueError(f"clip: there is no folder {folder}, expected a CLIPModel with tokenizer and processor")
        try:
            self.clip = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            processor: Any = CLIPImageProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clip: {folder} holds no CLIPModel with tokenizer and image processor: {error}"
            ) from error
        self.denoiser, self.chunk = denoiser, chunk
        self.device = next(denoiser.network.parameters()).device
        self.clip.to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        self.side = self.clip.config.vision_config.image_size
        self._texts: dict[str, Tensor] = {}

    def __call__(self, x0: Tensor, c: Tensor) -> Tensor:
        texts = torch.stack([self._text(prompt) for prompt in self.denoiser.prompts_of(c)])
        parts = zip(x0.split(self.chunk), texts.split(self.chunk), strict=True)
        return torch.cat([self._cosine(*part) for part in parts])

    def _cosine(self, latents: Tensor, texts: Tensor) -> Tensor:
        seen = checkpoint(self._image, latents, use_reentrant=False) if latents.requires_grad else self._image(latents)
        return (seen * texts).sum(1).to(latents.dtype)

    def _image(self, latents: Tensor) -> Tensor:
        """Return unit vectors `[N, E]` of the decoded images."""
        images = images_of(self.denoiser.pipe, latents.float()) / 2 + 0.5
        size = (self.side, self.side)
        images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        found = _features(self.clip.get_image_features(pixel_values=(images - self.mean) / self.std))
        return torch.nn.functional.normalize(found, dim=1)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """Return the unit vector of a prompt."""
        found = self._texts.get(prompt)
        if found is None:
            longest = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt")
            inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            vector = _features(self.clip.get_text_features(**inputs))[0]
            found = self._texts[prompt] = torch.nn.functional.normalize(vector, dim=0)
        return found


def _features(found: Any) -> Tensor:
    """Return the projected embedding; transformers 5 wraps it."""
    return found if isinstance(found, Tensor) else found.pooler_output
