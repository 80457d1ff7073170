"""A ComfyUI node: a model whose guidance weight is looked up in a learned table. Copy this file into `custom_nodes/`.

lgd_kernels has to be installed in ComfyUI's Python; neither triton nor a compiler has to. `save_table(table, path)`
writes what the node reads.

It relies on `model.clone()`, on `model.set_model_sampler_cfg_function(fn, disable_cfg1_optimization=...)` (in ComfyUI
since early 2024, as far as we know), and on fn being called with one dictionary and returning input - denoised, of

    input, cond_denoised, uncond_denoised: x and the two x0, [B, ...];  cond, uncond: input - cond_denoised, likewise
    sigma, timestep: sigma [B], both the same;  cond_scale: the sampler's cfg;  model, model_options

with the run's sigmas in `model_options["transformer_options"]["sample_sigmas"]` (since late 2024). With cfg 1 ComfyUI
leaves the unconditional call out, unless disable_cfg1_optimization is set, as here.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

TIMES = ("sigma", "timestep")


def save_table(table, path: str) -> None:
    """An `lgd_kernels.OmegaTable` as a file of tensors."""
    tensors = {"values": table.values, "s_knots": table.s_knots, "t_knots": table.t_knots}
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)


def load_table(path: str, device="cpu"):
    """What `save_table` wrote; nothing but tensors is read."""
    from lgd_kernels import OmegaTable

    found = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(found, dict) or set(found) != {"values", "s_knots", "t_knots"}:
        raise ValueError(f"LearnedGuidance: {path} holds no omega table; lgd_kernels.integrations.comfyui.save_table")
    return OmegaTable(**found)


class CFGFunction:
    """`cond + strength omega(c, s, t) (cond - uncond)`, t being the sigma of the call and s the next one of the run.

    On ComfyUI's cond and uncond, which are x - x0: guidance is affine, so the result is x - (guided x0), in one pass.
    The sampler's cfg does not enter.
    """

    def __init__(
        self, table, condition: int = 0, strength: float = 1.0, times: Literal["sigma", "timestep"] = "sigma"
    ) -> None:
        if times not in TIMES:
            raise ValueError(f"LearnedGuidance: `times` is {times!r}, expected one of {', '.join(TIMES)}")
        if not 0 <= condition < table.values.shape[0]:
            raise ValueError(
                f"LearnedGuidance: `condition` is {condition}, expected one of the table's: 0 to "
                f"{table.values.shape[0] - 1}"
            )
        self.table, self.condition, self.strength, self.times = table, condition, strength, times

    def __call__(self, args: dict) -> torch.Tensor:
        from lgd_kernels import OmegaTable, guided_score

        cond, uncond, sigma = args["cond"], args["uncond"], args["sigma"].float().reshape(-1)
        run = args.get("model_options", {}).get("transformer_options", {}).get("sample_sigmas")
        if run is None:
            raise ValueError("LearnedGuidance: this ComfyUI gives no sample_sigmas, expected one of late 2024 or newer")
        run = run.to(sigma)
        ahead = torch.where(run < sigma[:, None], run, torch.zeros_like(run)).amax(
            1
        )  # the next sigma, 0 after the last
        t, s = sigma, ahead
        if self.times == "timestep":  # of the model's training table; the data is -1
            timestep = args["model"].model_sampling.timestep
            t, s = timestep(sigma).float(), torch.where(ahead > 0, timestep(ahead.clamp(min=1e-10)).float(), -1.0)
        if self.table.values.device != cond.device:
            tensors = (self.table.values, self.table.s_knots, self.table.t_knots)
            self.table = OmegaTable(*(tensor.to(cond.device) for tensor in tensors))
        c = torch.full((cond.shape[0],), self.condition, device=cond.device)
        omega = self.strength * self.table(c, *(time.to(self.table.s_knots).expand(c.shape) for time in (s, t)))
        return guided_score(cond, uncond, omega)


class LearnedGuidance:
    """The node."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL",),
                "path": ("STRING", {"default": "omega.pt"}),
                "condition": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}),
                "times": (list(TIMES),),
            }
        }

    @classmethod
    def IS_CHANGED(cls, path: str, **_) -> float:
        return os.path.getmtime(path)

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sampling/guidance"

    def patch(self, model, path: str, condition: int = 0, strength: float = 1.0, times: str = "sigma") -> tuple:
        guided = model.clone()
        function = CFGFunction(load_table(path), condition, strength, times)
        guided.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
        return (guided,)


NODE_CLASS_MAPPINGS = {"LGDLearnedGuidance": LearnedGuidance}
NODE_DISPLAY_NAME_MAPPINGS = {"LGDLearnedGuidance": "Learned guidance (omega table)"}
