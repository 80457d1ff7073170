"""Look the guidance weight up in a learned table: a ComfyUI node. Copy this file into `custom_nodes/`.

Install lgd_kernels in ComfyUI's Python; the node needs neither triton nor a compiler. `OmegaTable.save` writes the file
that the node reads. In ComfyUI the node reads tables from `models/omega` and from the folders that
extra_model_paths.yaml names under `omega`, and opens no other file. Outside ComfyUI `load_table` reads any path.

The node needs `model.clone()` and `model.set_model_sampler_cfg_function(fn, disable_cfg1_optimization=...)` (in ComfyUI
since early 2024, as far as we know). ComfyUI calls fn with one dictionary, and fn returns input - denoised; the keys:

    input, cond_denoised, uncond_denoised: x and the two x0, [B, ...];  cond, uncond: input - cond_denoised, likewise
    sigma, timestep: sigma [B], both the same;  cond_scale: the sampler's cfg;  model, model_options
    input_cond, input_uncond: the conditionings, lists of dicts; None where there is none

The run's sigmas are in `model_options["transformer_options"]["sample_sigmas"]` (since late 2024). With cfg 1 ComfyUI
skips the unconditional call, unless disable_cfg1_optimization is set, as here. Where no negative is evaluated, as with
BasicGuider, uncond_denoised is zeros, and the node returns the conditional prediction.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from lgd_kernels import OmegaTable

FOLDER = "omega"
NAMES = ("values", "s_knots", "t_knots")
Times = Literal["sigma", "timestep"]
TIMES = ("sigma", "timestep")
LIMITS = ("timestep_start", "timestep_end", "default")  # keys of a conditioning that is not evaluated in every call
SCALE = 8.0  # the largest factor between the last knot and the model's largest time: tables up to 80 fit SD's 14.6


def load_table(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> OmegaTable:
    """Read a file that `OmegaTable.save` wrote (`lgd_kernels.omega.files`); no code of the file runs.

    Raises ValueError, with a message of one line, for anything else. In ComfyUI a file outside the folders of tables, a
    missing file and a folder have the same message; elsewhere all files without a table have the same.
    """
    from lgd_kernels import OmegaTable
    from lgd_kernels.omega import files

    file = _file(path)
    try:
        table = files.load(file, device=device)
    except Exception:  # whatever is wrong with the file
        table = None
    if not isinstance(table, OmegaTable):
        raise ValueError(_no_table(path)) from None
    return table


class CFGFunction:
    """Compute `cond + strength omega(c, s, t) (cond - uncond)` for a step from t, the sigma of the call, to s.

    ComfyUI's cond and uncond are x - x0. Guidance is affine, so the result is x - (guided x0), in one pass. The
    sampler's cfg has no effect. Without a negative the result is cond.
    `lgd_kernels.integrations.k_diffusion.next_sigma` finds s in the run's sigmas, without a device sync.

    Raises ValueError for a table with NaN or infinities. A call raises ValueError if the scale of the table's knots is
    not that of the model's times, where the host can read them; the node checks the model itself.
    """

    def __init__(self, table: OmegaTable, condition: int = 0, strength: float = 1.0, times: Times = "sigma") -> None:
        if not all(isinstance(getattr(table, name, None), torch.Tensor) for name in NAMES):
            raise TypeError(
                f"LearnedGuidance: `table` is a {type(table).__name__}, expected an OmegaTable; OmegaNetwork.bake and "
                "load_table make one"
            )
        if times not in TIMES:
            raise ValueError(f"LearnedGuidance: `times` is {times!r}, expected one of {', '.join(TIMES)}")
        if isinstance(condition, bool) or not isinstance(condition, int) or not 0 <= condition < table.values.shape[0]:
            raise ValueError(
                f"LearnedGuidance: `condition` is {condition!r}, expected one of the table's: 0 to "
                f"{table.values.shape[0] - 1}"
            )
        if not isinstance(strength, (int, float)) or not math.isfinite(strength):
            raise ValueError(f"LearnedGuidance: `strength` is {strength!r}, expected a finite number")
        _check_finite(table)
        self.table, self.condition, self.strength, self.times = table, condition, strength, times
        self.last = float(table.t_knots[-1]) if len(table.t_knots) > 1 else None  # a single knot fits any scale

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """Return x - (guided x0) for the arguments of ComfyUI's function."""
        from lgd_kernels import OmegaTable, guided_score
        from lgd_kernels.integrations.k_diffusion import next_sigma

        cond, uncond, sigma = args["cond"], args["uncond"], args["sigma"].reshape(-1)
        run = args.get("model_options", {}).get("transformer_options", {}).get("sample_sigmas")
        if run is None:
            raise ValueError(
                "LearnedGuidance: this ComfyUI passes no sample_sigmas; update it to one of late 2024 or newer"
            )
        sampling = getattr(args.get("model"), "model_sampling", None)
        self._check_scale(sampling, run)
        t, s = sigma.float(), next_sigma(run, sigma).float()
        if self.times == "timestep":  # of the model's training table; the data is -1
            timestep = args["model"].model_sampling.timestep
            t, s = timestep(t).float(), torch.where(s > 0, timestep(s.clamp(min=1e-10)).float(), -1.0)
        if self.table.values.device != cond.device:
            self.table = OmegaTable(*(getattr(self.table, name).to(cond.device) for name in NAMES))
        c = torch.full((cond.shape[0],), self.condition, device=cond.device)
        omega = self.strength * self.table(c, *(time.to(self.table.s_knots).expand(c.shape) for time in (s, t)))
        evaluated = _evaluated(args)
        if evaluated is not None:
            omega = torch.where(evaluated, omega, torch.zeros_like(omega))
        return guided_score(cond, uncond, omega)

    def check_model(self, sampling: Any) -> None:
        """Raise ValueError if the scale of the table's knots is not that of the times of a ComfyUI model_sampling."""
        top = getattr(sampling, "sigma_max", None)
        if top is None or self.last is None:
            return
        sigma = torch.as_tensor(top, dtype=torch.float32, device=getattr(top, "device", "cpu"))
        reach = {"sigma": float(sigma)}
        if hasattr(sampling, "timestep"):
            reach["timestep"] = float(sampling.timestep(sigma))
        fits = [name for name in reach if reach[name] / SCALE <= self.last <= reach[name] * SCALE]
        if self.times in reach and self.times not in fits:
            hints = [name for name in fits if name == "sigma" or reach[name] > 100]  # not EDM's log(sigma) / 4
            self._refuse(f"this model's {self.times}s reach {reach[self.times]:g}", *hints)

    def _check_scale(self, sampling: Any, run: torch.Tensor) -> None:
        """Check the scale where the host can read it without a device sync. A run may begin below the model's largest
        sigma."""
        top = getattr(sampling, "sigma_max", None)
        if top is not None and getattr(top, "device", torch.device("cpu")).type == "cpu":
            self.check_model(sampling)
        elif self.last is not None and self.times == "sigma" and run.device.type == "cpu":
            if float(run.max()) > self.last * SCALE:
                self._refuse(f"this run's sigmas reach {float(run.max()):g}")

    def _refuse(self, said: str, *fits: str) -> None:
        """Raise ValueError for knots of another scale; `fits` are the settings of times that fit."""
        hint = f"set times to {fits[0]!r}, which fits" if fits else "make a table whose knots are times of this model"
        raise ValueError(f"LearnedGuidance: the table's t_knots end at {self.last:g}, but {said}; {hint}")


class LearnedGuidance:
    """Set a `CFGFunction` on a model: the node."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "path": ("STRING", {"default": "omega.safetensors", "tooltip": f"a file in models/{FOLDER}"}),
                "condition": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}),
                "times": (list(TIMES),),
            }
        }

    @classmethod
    def IS_CHANGED(cls, path: str = "", **_: Any) -> float:
        """Return a number that changes when the table's file does."""
        try:
            return os.path.getmtime(_file(path))
        except (OSError, ValueError):
            return math.nan  # so that the node runs and reports the error

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sampling/guidance"

    def patch(
        self, model: Any, path: str, condition: int = 0, strength: float = 1.0, times: Times = "sigma"
    ) -> tuple[Any]:
        """Return a clone of the model with learned guidance."""
        guided = model.clone()
        function = CFGFunction(load_table(path), condition, strength, times)
        if hasattr(model, "get_model_object"):
            function.check_model(model.get_model_object("model_sampling"))
        guided.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
        return (guided,)


def _evaluated(args: dict[str, Any]) -> torch.Tensor | None:
    """Return whether a negative was evaluated in this call; None if one certainly was.

    uncond_denoised is allocated as zeros. It stays zero without a negative (input_uncond is None, or an older ComfyUI
    does not pass input_uncond), and if every entry of the negative is limited to other steps.
    """
    given = args.get("input_uncond")
    for entry in given if isinstance(given, (list, tuple)) else [given]:
        limited = isinstance(entry, dict) and any(name in entry for name in LIMITS)
        if entry is not None and not limited:
            return None
    uncond = args.get("uncond_denoised")
    if uncond is None:
        return torch.zeros((), dtype=torch.bool, device=args["cond"].device) if "input_uncond" in args else None
    return (uncond != 0).any()


def _file(path: str | os.PathLike[str]) -> str:
    """Return the path of a table's file. In ComfyUI, look only in the folders of tables."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"LearnedGuidance: `path` is a {type(path).__name__}, expected the name of a file")
    try:
        import folder_paths  # type: ignore[import-not-found]  # of ComfyUI
    except ImportError:
        if os.path.isfile(path):
            return os.fspath(path)
        raise ValueError(_no_table(path)) from None
    named = getattr(folder_paths, "folder_names_and_paths", {}).get(FOLDER, ((),))[0]
    for folder in (os.path.join(folder_paths.models_dir, FOLDER), *named):
        folder = os.path.abspath(folder)
        file = os.path.abspath(os.path.join(folder, path))
        if file.startswith(os.path.join(folder, "")) and os.path.isfile(file):
            return file
    raise ValueError(
        f"LearnedGuidance: `path` is {str(path)!r}, expected the name of a file in ComfyUI's models/{FOLDER}, or in a "
        f"folder that extra_model_paths.yaml names under {FOLDER}"
    )


def _no_table(path: str | os.PathLike[str]) -> str:
    """Return the error message for a file without a table."""
    return (
        f"LearnedGuidance: `path` is {str(path)!r}, which holds no omega table; "
        "OmegaTable.save(path, schedule) writes one, also that of a network's bake()"
    )


def _check_finite(table: OmegaTable) -> None:
    """Raise ValueError for a table with NaN or infinities."""
    for name in NAMES:
        if not bool(getattr(table, name).isfinite().all()):
            raise ValueError(f"LearnedGuidance: the table's `{name}` holds NaN or infinities, expected finite numbers")


NODE_CLASS_MAPPINGS = {"LGDLearnedGuidance": LearnedGuidance}
NODE_DISPLAY_NAME_MAPPINGS = {"LGDLearnedGuidance": "Learned guidance (omega table)"}
