"""Learn omega for a pipeline of diffusers: its network, frozen, and its VAE and text encoders for the data.

    frozen = frozen_of(pipe)
    c = frozen.denoiser.condition(prompts)          # [N, E], pooled embeddings
    x0 = latents_of(pipe, images)                   # [N, ...]
    Trainer(OmegaNetwork(frozen.schedule, embedding=c.shape[1]), frozen, (x0, c)).train(2000)

docs/pipelines.md is the guide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.learn.families import Encoded, Family, Inputs, family_of
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.runtime.checks import DIFFUSERS_PREDICTIONS
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.sampling.schedules import Discrete, RectifiedFlow, Schedule

KEPT = 2**30  # bytes of encoded prompts that a denoiser keeps on the host


class PipelineDenoiser:
    """Call the network of a pipeline as `(x [N, ...], t [N], c [N, ...]) -> prediction [N, ...]`.

    c are rows of `condition(prompts)`: a row stands for its prompt, which the network gets with all of its tokens.
    The denoiser encodes a prompt again when it needs it, and keeps the prompts that were used last. For a pipeline with
    class labels, c are labels `[N]`.

    Args:
        pipe: the pipeline, on its device.
        chunk: the most samples in one call of the network; both predictions count.
        guidance: what a guidance-distilled network (Flux dev) gets beside the prompt: its guidance_scale.
    """

    def __init__(self, pipe: Any, chunk: int = 32, guidance: float = 3.5) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"frozen_of: `chunk` is {chunk!r}, expected a number of samples, 1 or more")
        self.pipe, self.chunk, self.guidance = pipe, chunk, guidance
        self.family: Family = family_of(pipe)
        self._prompts: dict[bytes, Encoded | str] = {}  # by the bits of their rows; inputs of no prompt as they are
        self._rows: dict[str, Tensor] = {}
        self._recent: OrderedDict[bytes, Inputs] = OrderedDict()
        self._bytes = 0

    @property
    def network(self) -> Any:
        """Return the network of the pipeline."""
        return getattr(self.pipe, self.family.network)

    def condition(self, prompts: Sequence[str]) -> Tensor:
        """Return c `[N, E]`, float32 on the CPU: the pooled embedding of each prompt, which omega is a function of."""
        if self.family.encode is None:
            raise ValueError(
                f"condition: a {type(self.pipe).__name__} takes class labels, not prompts; c is a tensor [N] of labels"
            )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"condition: a prompt is a {type(prompt).__name__}, expected a text")
        return torch.stack([self._row(prompt) for prompt in prompts])

    def prompts_of(self, c: Tensor) -> list[str]:
        """Return the prompts of rows of c; "" for the row that means none."""
        found = [self._prompts[key] for key in self._keys(c)]
        return [prompt if isinstance(prompt, str) else "" for prompt in found]

    def none(self, prompt: str | None = None) -> Tensor:
        """Return the row of c that means none, `[E]`: a negative prompt; by default what the pipeline uses without one,
        the empty prompt, or zeros where the pipeline's configuration says so (SDXL)."""
        zeros = prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt", False)
        if not zeros:
            return self._row(prompt or "")
        encoded = self._encoded("")
        inputs = {name: torch.zeros_like(value) for name, value in encoded.inputs.items()}
        row = torch.zeros_like(encoded.pooled, dtype=torch.float32, device="cpu")
        self._prompts[_key(row)] = Encoded(row, inputs)
        return row

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        parts = zip(x.split(self.chunk), t.split(self.chunk), c.split(self.chunk), strict=True)
        return torch.cat([self._call(*part) for part in parts])

    def _call(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        weights = next(self.network.parameters())
        t = t * 1000 if t.is_floating_point() else t  # flow matching counts to 1000 too
        x, t = x.to(weights), t.to(weights.device)
        if self.family.encode is None:
            inputs = {"labels": c.to(weights.device)}
        else:
            rows = [self._inputs(key) for key in self._keys(c)]
            inputs = {name: torch.stack([row[name] for row in rows]).to(weights.device) for name in rows[0]}
            inputs = {
                name: value.to(weights.dtype) if value.is_floating_point() else value for name, value in inputs.items()
            }
        return self.family.call(self.pipe, x, t, inputs, self.guidance)

    def _keys(self, c: Tensor) -> list[bytes]:
        keys = [_key(row) for row in c.cpu()]
        if unknown := sum(key not in self._prompts for key in keys):
            raise ValueError(
                f"PipelineDenoiser: {unknown} of {len(keys)} rows of `c` are of no prompt that it knows; make them "
                "with denoiser.condition(prompts)"
            )
        return keys

    def _row(self, prompt: str) -> Tensor:
        """Return the row of a prompt; of two prompts with the same pooled embedding, the second differs in a bit."""
        row = self._rows.get(prompt)
        if row is None:
            row = self._encoded(prompt).pooled.float().cpu().clone()
            while self._prompts.get(_key(row), prompt) != prompt:
                row[0] = torch.nextafter(row[0], row.new_tensor(torch.inf))
            self._rows[prompt], self._prompts[_key(row)] = row, prompt
        return row

    @torch.no_grad()
    def _encoded(self, prompt: str) -> Encoded:
        assert self.family.encode is not None
        return self.family.encode(self.pipe, prompt)

    def _inputs(self, key: bytes) -> Inputs:
        """Return the network's inputs of a prompt, kept from the last use or encoded again."""
        found = self._recent.get(key)
        if found is None:
            prompt = self._prompts[key]
            made = prompt.inputs if isinstance(prompt, Encoded) else self._encoded(prompt).inputs
            found = self._recent[key] = {name: value.cpu() for name, value in made.items()}
            self._bytes += _size(found)
            while self._bytes > KEPT and len(self._recent) > 1:
                self._bytes -= _size(self._recent.popitem(last=False)[1])
        self._recent.move_to_end(key)
        return found


def frozen_of(pipe: Any, *, chunk: int = 32, negative_prompt: str | None = None, guidance: float = 3.5) -> Frozen:
    """Make the frozen denoiser of a pipeline: Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3, Flux, PixArt or DiT.

    Schedule and prediction come from the configuration of the pipeline's scheduler: `Discrete` and eps, v or x0, or
    `RectifiedFlow` and flow. `frozen.denoiser.condition(prompts)` returns c, the pooled embedding of each prompt:
    CLIP's for Stable Diffusion and Flux, both encoders' for Stable Diffusion 3, the mean over the tokens for PixArt.
    For DiT, c are labels.

    Args:
        pipe: the pipeline, on its device, in evaluation mode (`from_pretrained` returns it so).
        chunk: the most samples in one call of the network.
        negative_prompt: the prompt that means none; by default what the pipeline uses without one.
        guidance: the guidance_scale that a guidance-distilled network (Flux dev) embeds; omega guides beside it.

    Raises ValueError for another kind of pipeline, for a network that embeds guidance_scale in place of an
    unconditional prediction, and for a scheduler whose network takes other times.

    >>> import diffusers
    >>> small = {"num_attention_heads": 1, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
    >>> transformer = diffusers.DiTTransformer2DModel(**small, in_channels=4, patch_size=2, num_embeds_ada_norm=10)
    >>> pipe = diffusers.DiTPipeline(transformer.eval(), diffusers.AutoencoderKL().eval(), diffusers.DDIMScheduler())
    >>> frozen = frozen_of(pipe)
    >>> frozen.schedule, frozen.prediction, frozen.null
    (Discrete(1000 steps, alphas_cumprod 0.9999 to 4.03583e-05, float32), 'eps', 10)
    """
    denoiser = PipelineDenoiser(pipe, chunk, guidance)
    config = denoiser.network.config
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"frozen_of: the network of this {type(pipe).__name__} embeds guidance_scale (it is guidance-distilled), "
            "and has no unconditional prediction to guide from; use the network that it was distilled from"
        )
    channels = getattr(pipe, "vae", None) is not None and pipe.vae.config.get("latent_channels")
    packed = 4 if type(denoiser.network).__name__.startswith("Flux") else 1
    if channels and config["in_channels"] != packed * channels:
        raise ValueError(
            f"frozen_of: the network takes {config['in_channels']} channels and the VAE makes {channels}: it takes "
            "more than the noisy latents (inpainting, depth, control), which a function of your own has to pass"
        )
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(module.training for module in part.modules()):
            raise ValueError(
                f"frozen_of: `pipe.{name}` is in training mode, expected evaluation mode; pipe.{name}.eval()"
            )
    schedule, prediction = schedule_of(pipe.scheduler)
    null: Any = denoiser.none(negative_prompt) if denoiser.family.encode is not None else config["num_embeds_ada_norm"]
    return Frozen(denoiser, schedule, prediction, null)


def schedule_of(scheduler: Any) -> tuple[Schedule, Prediction]:
    """Return the schedule of a model, and what it predicts, from the configuration of a scheduler of diffusers."""
    config, name = scheduler.config, type(scheduler).__name__
    predicts = config.get("prediction_type", "flow_prediction" if "FlowMatch" in name else "epsilon")
    if "FlowMatch" in name or predicts == "flow_prediction" or config.get("use_flow_sigmas", False):
        return RectifiedFlow(), "flow"
    alphas = getattr(scheduler, "alphas_cumprod", None)
    counts = config.get("timestep_type", "discrete")
    if alphas is None or counts != "discrete" or predicts not in DIFFUSERS_PREDICTIONS:
        raise ValueError(
            f"frozen_of: the scheduler is a {name} with prediction_type={predicts!r} and {counts} timesteps, expected "
            f"flow matching, or a table alphas_cumprod with indices and one of {', '.join(DIFFUSERS_PREDICTIONS)}"
        )
    return Discrete(alphas.double().cpu()), DIFFUSERS_PREDICTIONS[predicts]  # type: ignore[return-value]


def condition_of(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Return the pooled embedding of each prompt, `[N, E]` on the device of the network: c of a learned omega.

    LearnedScale(omega, pipe, condition_of(pipe, prompts))
    """
    denoiser = PipelineDenoiser(pipe)
    return denoiser.condition(prompts).to(next(denoiser.network.parameters()).device)


@torch.no_grad()
def latents_of(pipe: Any, images: Tensor, chunk: int = 8) -> Tensor:
    """Encode images `[N, 3, H, W]` in [-1, 1] as the pipeline's network takes them: `[N, C, h, w]`, float32.

    The latent of an image is the mode of the VAE's posterior, shifted and scaled. A pipeline without a VAE whose
    network takes 3 channels works on pixels. Raises ValueError for one that takes others.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        channels = getattr(pipe, family_of(pipe).network).config["in_channels"]
        if channels == 3:
            return images.float()
        raise ValueError(
            f"latents_of: this {type(pipe).__name__} has no VAE, and its network takes {channels} channels, not the 3 "
            "of an image; load the pipeline with its vae"
        )
    weights = _weights(vae)
    found = []
    for part in images.split(chunk):
        posterior = vae.encode(part.to(weights)).latent_dist
        found.append((posterior.mode().float() - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"])
    return torch.cat(found)


def images_of(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents to images `[N, 3, H, W]`, in [-1, 1] up to what the VAE overshoots. Differentiable."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return latents
    weights = _weights(vae)
    raw = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
    return vae.decode(raw.to(weights), return_dict=False)[0].to(latents.dtype)


def _weights(vae: Any) -> Tensor:
    """Return some weights of a VAE. Raise ValueError for one that overflows in float16."""
    weights = next(vae.parameters())
    if weights.dtype == torch.float16 and vae.config.get("force_upcast", False):
        raise ValueError(
            "the pipeline's VAE is in float16, and its configuration (force_upcast) says that it overflows there: "
            "pipe.vae.to(torch.float32)"
        )
    return weights


def _key(row: Tensor) -> bytes:
    return row.detach().float().cpu().numpy().tobytes()


def _size(inputs: Inputs) -> int:
    return sum(value.numel() * value.element_size() for value in inputs.values())
