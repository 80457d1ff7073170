"""Keep predictions in files, for more than memory holds and for the next run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.learn.particles import Particles
from lgd_kernels.runtime import files_atomic
from lgd_kernels.sampling.schedules import Schedule

FIELDS = ("c", "s", "t", "x0", "x_t", "cond", "uncond")  # of Particles.tensors()
META = "predictions.json"  # written last: a folder without it is not complete
CLOSE = 0.02  # relative to the largest value: predictions of the same model in bfloat16, in batches of another size


def kept(
    folder: Path,
    schedule: Schedule,
    count: int,
    parts: Callable[[], Iterable[Particles]],
    again: Callable[[], Particles],
) -> Particles:
    """Return `count` predicted items whose tensors are mapped from the files of a folder; predict and write them first
    if it has none.

    Args:
        parts: yields the items in batches.
        again: predicts the first few items again, to compare with the files.

    Raises ValueError for a folder with predictions of another model, other data or other settings.
    """
    path = folder / META
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, count, parts())
    meta = json.loads(path.read_text())
    tensors = [_mapped(folder / f"{name}.bin", meta["tensors"][name], False) for name in FIELDS]
    c, s, t, x0, x_t, cond, uncond = tensors
    levels = schedule.levels(t, s)
    found = Particles(c, s, t, levels, x0, x_t, cond, uncond, meta["prediction"], meta["seed"])
    new = again().to("cpu")
    few = len(new.t)
    if meta["count"] != count or not all(
        old.shape[1:] == now.shape[1:] and _close(old[:few], now)
        for old, now in zip(tensors, new.tensors(), strict=True)
    ):
        raise ValueError(
            f"cache_folder: {folder} holds predictions of another model, other data or other settings; remove it, or "
            "pass another folder"
        )
    return found


def _write(folder: Path, count: int, parts: Iterable[Particles]) -> None:
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
    meta = {"count": count, "prediction": prediction, "seed": seed, "tensors": shapes}
    files_atomic.write(folder / META, (json.dumps(meta, indent=1) + "\n").encode())


def _mapped(path: Path, form: Sequence[Any], shared: bool) -> Tensor:
    """Map a file as a tensor of a form, (shape, dtype): shared to write it, private to read it."""
    size, kind = torch.Size(form[0]), getattr(torch, form[1])
    if not shared and path.stat().st_size != size.numel() * kind.itemsize:
        raise ValueError(f"cache_folder: {path} is damaged; remove its folder")
    return torch.from_file(str(path), shared=shared, size=size.numel(), dtype=kind, device="cpu").view(size)


def _close(old: Tensor, new: Tensor) -> bool:
    if not new.is_floating_point():
        return torch.equal(old, new)
    return bool((old.float() - new.float()).abs().max() <= CLOSE * new.float().abs().max() + 1e-6)
