"""Integrate with diffusers, k-diffusion, ComfyUI and trainers with policy gradients. No other module of the package
imports this one."""

from typing import TYPE_CHECKING

from lgd_kernels.runtime.first_use import lazily

if TYPE_CHECKING:
    from lgd_kernels.integrations import comfyui as comfyui
    from lgd_kernels.integrations import diffusers as diffusers
    from lgd_kernels.integrations import k_diffusion as k_diffusion
    from lgd_kernels.integrations import rl as rl
else:
    __getattr__, __dir__ = lazily(__name__, "comfyui", "diffusers", "k_diffusion", "rl")
