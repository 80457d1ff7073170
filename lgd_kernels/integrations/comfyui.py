"""Guide a ComfyUI model with a learned omega: what the node of the folder comfyui_lgd/ sets on the model.

`load` reads a file of `python -m lgd_kernels learn`, and `CFGFunction` is the function for
`model.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)`. Neither imports ComfyUI, triton or the
extension. ComfyUI calls the function with one dictionary, and takes input - denoised from it; the keys:

    input, cond_denoised, uncond_denoised: x and the two x0, [B, ...];  cond, uncond: input - cond_denoised, likewise
    sigma, timestep: sigma [B], both the same;  cond_scale: the sampler's cfg;  model, model_options
    input_cond, input_uncond: the conditionings, lists of dicts; None where there is none

The run's sigmas are in `model_options["transformer_options"]["sample_sigmas"]` (since late 2024). With cfg 1 ComfyUI
skips the unconditional call, unless disable_cfg1_optimization is set. Where no negative is evaluated, as with
BasicGuider, uncond_denoised is zeros, and the function returns the conditional prediction.
"""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels import OmegaTable, guided_score
from lgd_kernels.integrations.comfyui_files import found
from lgd_kernels.integrations.comfyui_times import check_family, times
from lgd_kernels.integrations.k_diffusion import next_sigma
from lgd_kernels.omega import files
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.sampling.schedules import Schedule

FORMS = (Constant, Interval, ClampLinear)
Omega = OmegaTable | OmegaNetwork | Constant | Interval | ClampLinear
LIMITS = ("timestep_start", "timestep_end", "default")  # keys of a conditioning that is not evaluated in every call
SCALE = 8.0  # the largest factor between a table's last knot and the model's largest time: 80 fits SD's 14.6


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Omega:
    """Read a file that `lgd_kernels.omega.files.save` wrote: a table, a network, a constant, an interval or a
    clamped line. No code of the file runs.

    Raises ValueError, with a message of one line, for anything else. In ComfyUI a file outside the folders of omega, a
    missing file and a folder have the same message; elsewhere all files without an omega have the same.

    >>> import tempfile, lgd_kernels as lgd
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lgd.omega.files.save(folder + "/omega.safetensors", Constant(0.5))
    ...     load(folder + "/omega.safetensors").omega.item()
    0.5
    """
    file = found(path)
    try:
        with torch.inference_mode(False):
            return files.load(file, device=device)  # type: ignore[return-value]  # it makes these kinds only
    except Exception:  # whatever is wrong with the file
        raise ValueError(
            f"LearnedGuidance: `path` is {str(path)!r}, which holds no omega; python -m lgd_kernels learn and "
            "lgd_kernels.omega.files.save(path, omega, schedule) write files that do"
        ) from None


class CFGFunction:
    """Compute `cond + strength omega(c, s, t) (cond - uncond)` for a step from t, the sigma of the call, to s.

    ComfyUI's cond and uncond are x - x0. Guidance is affine, so the result is x - (guided x0), in one pass. The
    sampler's cfg has no effect. Without a negative the result is cond.
    `lgd_kernels.integrations.k_diffusion.next_sigma` finds s in the run's sigmas, without a device sync.
    `lgd_kernels.integrations.comfyui_times.times` makes times of the schedule of both. c is

    * `condition` for a table and for a network with classes;
    * the pooled embedding of the positive prompt, `pooled_output`, for a network on embeddings. If the positive has
      several conditionings, omega is the mean of theirs, each weighted by its strength times its share of the picture
      (of its area, its mask, or both) while its time range lasts.

    Args:
        omega: a table, a network or a formula of `lgd_kernels.omega`. A network is copied.
        condition: the row of a table, or the class of a network.
        strength: multiplies omega; 0 is the conditional prediction.
        schedule: the schedule of omega's times, for an omega without one of its own.
        sigmas: the run's `[N + 1]`, for programs that pass no sample_sigmas.

    Raises TypeError or ValueError for anything else, also for NaN and infinities in omega. A call raises ValueError for
    a flow's omega on another model, and the other way round; for a conditioning without a pooled embedding that the
    network needs, or with one of another width; and for unknown sigmas where omega depends on s.

    >>> function = CFGFunction(Constant(0.5), strength=2.0)
    >>> function({"cond": torch.ones(1, 2), "uncond": torch.zeros(1, 2), "sigma": torch.ones(1)})
    tensor([[2., 2.]])
    """

    def __init__(
        self,
        omega: Omega,
        condition: int = 0,
        strength: float = 1.0,
        schedule: Schedule | None = None,
        sigmas: Tensor | None = None,
    ) -> None:
        if not isinstance(omega, (OmegaTable, OmegaNetwork, *FORMS)):
            raise TypeError(
                f"LearnedGuidance: `omega` is a {type(omega).__name__}, expected a table, a network or a formula of "
                "lgd_kernels.omega; load(path) returns one"
            )
        rows = omega.values.shape[0] if isinstance(omega, OmegaTable) else getattr(omega, "classes", None) or 1
        if isinstance(condition, bool) or not isinstance(condition, int) or not 0 <= condition < rows:
            raise ValueError(
                f"LearnedGuidance: `condition` is {condition!r}, expected one of omega's: 0 to {rows - 1}"
                if rows > 1
                else f"LearnedGuidance: `condition` is {condition!r}, expected 0: this omega has no labels to choose"
            )
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
            raise ValueError(f"LearnedGuidance: `strength` is {strength!r}, expected a finite number")
        known = getattr(omega, "schedule", None) or schedule
        if known is None and not isinstance(omega, Constant):
            raise ValueError(
                "LearnedGuidance: `schedule` is missing, and omega has none of its own; pass the schedule whose times "
                "omega takes, such as lgd_kernels.EDM() for sigmas"
            )
        if isinstance(omega, nn.Module):
            with torch.inference_mode(False):  # ComfyUI runs nodes in it; such tensors cannot be moved outside it
                omega = copy.deepcopy(omega).requires_grad_(False)
        for name, tensor in _tensors(omega).items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"LearnedGuidance: omega's `{name}` holds NaN or infinities, expected finite numbers")
        self.omega, self.condition, self.strength, self.sigmas = omega, condition, strength, sigmas
        self.schedule: Schedule | None = known
        self.width = omega.embedding if isinstance(omega, OmegaNetwork) else None
        self.labelled = isinstance(omega, OmegaTable) or getattr(omega, "classes", None) is not None
        flat = isinstance(omega, OmegaTable) and omega.values.shape[1] == 1
        self.takes_s = not flat and not isinstance(omega, FORMS)

    @torch.no_grad()
    def __call__(self, args: dict[str, Any]) -> Tensor:
        """Return x - (guided x0) for the arguments of ComfyUI's function."""
        cond, uncond, sigma = args["cond"], args["uncond"], args["sigma"].reshape(-1)
        batch, device = cond.shape[0], cond.device
        if next(iter(_tensors(self.omega).values())).device != device:
            with torch.inference_mode(False):
                self.omega = self.omega.to(device)
        s, t = (time.to(device).expand(batch) for time in self._times(args, sigma))
        if self.width is not None:
            omega = self._by_prompt(args, s, t)
        else:
            c = torch.full((batch,), self.condition, device=device) if self.labelled else None
            omega = self.omega(c, s, t)
        omega = self.strength * omega
        evaluated = _evaluated(args)
        if evaluated is not None:
            omega = torch.where(evaluated, omega, torch.zeros_like(omega))
        return guided_score(cond, uncond, omega)

    def check_model(self, sampling: Any) -> None:
        """Raise ValueError if omega's times cannot be those of a model with this model_sampling: a flow's schedule on
        another model, or knots of a table that end far from the model's largest time."""
        if self.schedule is None:
            return
        check_family(self.schedule, sampling)
        top = getattr(sampling, "sigma_max", None)
        if top is None or not isinstance(self.omega, OmegaTable) or len(self.omega.t_knots) == 1:
            return
        top = torch.as_tensor(top, device=getattr(top, "device", "cpu")).detach().float().reshape(1)
        reach = float(times(self.schedule, top, sampling))
        last = float(self.omega.t_knots[-1])
        if not reach / SCALE <= last <= reach * SCALE:
            raise ValueError(
                f"LearnedGuidance: the table's t_knots end at {last:g}, but this model's times reach {reach:g}, "
                f"counted as {type(self.schedule).__name__} counts; make a table whose knots are times of this model, "
                "and save it with their schedule"
            )

    def _times(self, args: dict[str, Any], sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and t `[B]`, times of the schedule, for the sigma of the call."""
        sampling = getattr(args.get("model"), "model_sampling", None)
        if self.schedule is not None:
            check_family(self.schedule, sampling)
        run = args.get("model_options", {}).get("transformer_options", {}).get("sample_sigmas")
        run = self.sigmas if run is None else run
        if run is None and self.takes_s:
            raise ValueError(
                "LearnedGuidance: this omega depends on s, where the step goes, and nothing says so: the program "
                "passes no sample_sigmas; update ComfyUI to one of late 2024 or newer, or pass the run's sigmas, "
                "CFGFunction(..., sigmas=sigmas)"
            )
        s, t = sigma if run is None else next_sigma(run, sigma).to(sigma.device), sigma
        s, t = s.float(), t.float()
        if self.schedule is not None:
            s, t = (times(self.schedule, one, sampling) for one in (s, t))
        s = torch.minimum(s, t)
        if isinstance(self.omega, OmegaTable):
            s, t = (one.to(self.omega.s_knots.dtype) for one in (s, t))
        return s, t

    def _by_prompt(self, args: dict[str, Any], s: Tensor, t: Tensor) -> Tensor:
        """Compute omega `[B]` for the pooled embeddings of the positive's conditionings."""
        entries = args.get("input_cond")
        if not entries:
            raise ValueError(
                "LearnedGuidance: this omega takes the prompt's pooled embedding, and the program passes no "
                "input_cond; update ComfyUI, or bake a table of the prompts' omegas (OmegaNetwork.bake)"
            )
        negatives = {one.get("uuid") for one in args.get("input_uncond") or ()} - {None}
        # ComfyUI copies an area that only the negative has to the positive, with the negative's embedding
        entries = [one for one in entries if one.get("uuid") not in negatives] or entries
        batch, device = len(t), t.device
        c = torch.cat([_rows(self._pooled(one), batch).to(device) for one in entries])
        omega = self.omega(c, s.repeat(len(entries)), t.repeat(len(entries))).view(len(entries), batch)
        if len(entries) == 1:
            return omega[0]
        weights = torch.stack([_weight(one, args, batch, device) for one in entries])
        return (weights * omega).sum(0) / weights.sum(0).clamp(min=1e-30)

    def _pooled(self, entry: dict[str, Any]) -> Tensor:
        """Return the pooled embedding of a conditioning `[k, E]`, or raise ValueError."""
        pooled = entry.get("pooled_output")
        hint = "take the text encoders that omega was learned with, or an omega for labels, or for none"
        if not isinstance(pooled, Tensor):
            raise ValueError(
                "LearnedGuidance: a conditioning of the positive prompt has no pooled_output, but omega is a network "
                f"on pooled embeddings [B, {self.width}]; this model's text encoders return none; {hint}"
            )
        if pooled.ndim != 2 or pooled.shape[1] != self.width:
            raise ValueError(
                f"LearnedGuidance: the pooled_output of the positive prompt is {list(pooled.shape)}, but omega is a "
                f"network on pooled embeddings [B, {self.width}]; {hint}"
            )
        return pooled.float()


def _tensors(omega: Omega) -> dict[str, Tensor]:
    """Return the tensors of omega by name."""
    if isinstance(omega, nn.Module):
        return omega.state_dict()
    return {name: getattr(omega, name) for name in files.TABLE}


def _rows(tensor: Tensor, batch: int) -> Tensor:
    """Return rows 0, 1, ... of a tensor, over and over, one for each sample: what ComfyUI does with conditionings."""
    return tensor.repeat(-(-batch // len(tensor)), *[1] * (tensor.ndim - 1))[:batch]


def _weight(entry: dict[str, Any], args: dict[str, Any], batch: int, device: torch.device) -> Tensor:
    """Return the weight `[B]` of a conditioning: strength times its share of the picture, 0 outside its time range."""
    weight = torch.full((batch,), max(float(entry.get("strength", 1.0)), 0.0), device=device)
    sigma = args["sigma"].reshape(-1)[0]
    for name, sign in (("timestep_start", 1), ("timestep_end", -1)):
        if name in entry:
            weight = weight * (sign * (entry[name] - sigma) >= 0)
    if "area" in entry:
        sizes = entry["area"][: len(entry["area"]) // 2]
        whole = args["cond"].shape[-len(sizes) :]
        weight = weight * min(1.0, math.prod(sizes) / math.prod(whole))
    if "mask" in entry:
        share = entry["mask"].to(device).float().flatten(1).mean(1) * float(entry.get("mask_strength", 1.0))
        weight = weight * _rows(share, batch)
    return weight


def _evaluated(args: dict[str, Any]) -> Tensor | None:
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
