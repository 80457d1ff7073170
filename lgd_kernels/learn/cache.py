"""Keep predictions in files, for more than memory holds and for the next run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels.learn import checkpoint
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.particles import Particles
from lgd_kernels.runtime import files_atomic

FIELDS = ("c", "s", "t", "x0", "x_t", "cond", "uncond")  # of Particles.tensors()
META = "predictions.json"  # written last: a folder without it is not complete
CLOSE = 0.02  # relative to the largest value: predictions of the same model in bfloat16, in batches of another size


def kept(
    folder: Path,
    frozen: Frozen,
    items: Sequence[Tensor],
    parts: Callable[[], Iterable[Particles]],
    again: Callable[[], Particles],
) -> Particles:
    """Return predicted items whose tensors are mapped from the files of a folder; predict and write them first if it
    has none.

    Args:
        items: c, s, t and x0 of all items, to compare with the files.
        parts: yields the items with predictions, in batches.
        again: predicts the first few items again, to compare.

    Raises ValueError for a folder with predictions of another model, other data or other settings, and for one where
    another process is at work.
    """
    model = fingerprint(frozen)
    with checkpoint.locked(folder, "cache_folder"):
        path = folder / META
        if not path.is_file():
            _write(folder, len(items[0]), model, parts())
        meta = json.loads(path.read_text())
        tensors = [_mapped(folder / f"{name}.bin", meta["tensors"][name], False) for name in FIELDS]
    new = again().to("cpu").tensors()
    same = meta["model"] == model and all(map(torch.equal, tensors, items))
    if not same or not all(_close(old[: len(one)], one) for old, one in zip(tensors, new, strict=True)):
        raise ValueError(
            f"cache_folder: {folder} holds predictions of another model, other data or other settings; remove it, or "
            "pass another folder"
        )
    c, s, t, x0, x_t, cond, uncond = tensors
    return Particles(c, s, t, frozen.schedule.levels(t, s), x0, x_t, cond, uncond, meta["prediction"], meta["seed"])


def fingerprint(frozen: Frozen) -> str:
    """Return a digest of what is known of a model: sums of its weights, its null condition, its prediction."""
    denoiser: Any = frozen.denoiser
    network = denoiser if isinstance(denoiser, nn.Module) else getattr(denoiser, "network", None)
    tensors = dict(network.state_dict()) if isinstance(network, nn.Module) else {}
    said = [frozen.prediction, getattr(denoiser, "guidance", None), frozen.null if isinstance(frozen.null, int) else ""]
    if isinstance(frozen.null, Tensor):
        tensors["null"] = frozen.null
    for name, tensor in sorted(tensors.items()):
        wide = tensor.detach().double().flatten()
        place = torch.arange(1, len(wide) + 1, dtype=torch.float64, device=wide.device)
        said.append(f"{name} {list(tensor.shape)} {wide.sum():.10g} {(wide * place).sum():.10g}")
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _write(folder: Path, count: int, model: str, parts: Iterable[Particles]) -> None:
    files: dict[str, Tensor] = {}
    shapes: dict[str, tuple[list[int], str]] = {}
    done, prediction, seed = 0, "", 0
    for part in parts:
        if not files:
            prediction, seed = part.prediction, int(part.seed)
            for name, tensor in zip(FIELDS, part.tensors(), strict=True):
                shapes[name] = [count, *tensor.shape[1:]], str(tensor.dtype).removeprefix("torch.")
                files[name] = _mapped(folder / f"{name}.bin", shapes[name], True)
        for name, tensor in zip(FIELDS, part.tensors(), strict=True):
            files[name][done : done + len(tensor)] = tensor.cpu()
        done += len(part.t)
    meta = {"model": model, "prediction": prediction, "seed": seed, "tensors": shapes}
    files_atomic.write(folder / META, (json.dumps(meta, indent=1) + "\n").encode())


def _mapped(path: Path, form: Sequence[Any], shared: bool) -> Tensor:
    """Map a file as a tensor of a form, (shape, dtype): shared to write it, private to read it."""
    size, kind = torch.Size(form[0]), getattr(torch, form[1])
    whole = size.numel() * kind.itemsize
    if shared:
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, whole)  # a full disk would end the process at the first write
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
    elif path.stat().st_size != whole:
        raise ValueError(f"cache_folder: {path} is damaged; remove its folder")
    return torch.from_file(str(path), shared=shared, size=size.numel(), dtype=kind, device="cpu").view(size)


def _close(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return False
    if not new.is_floating_point():
        return torch.equal(old, new)
    return bool((old.float() - new.float()).abs().max() <= CLOSE * new.float().abs().max() + 1e-6)
