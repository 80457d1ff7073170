"""Integrate with diffusers, k-diffusion and ComfyUI. No other module of the package imports this one."""

from typing import TYPE_CHECKING

from lgd_kernels.runtime.first_use import lazily

if TYPE_CHECKING:
    from lgd_kernels.integrations import comfyui as comfyui
    from lgd_kernels.integrations import diffusers as diffusers
    from lgd_kernels.integrations import k_diffusion as k_diffusion
else:
    __getattr__, __dir__ = lazily(__name__, "comfyui", "diffusers", "k_diffusion")
