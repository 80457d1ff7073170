"""Read images with captions from a folder, and encode them for a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lgd_kernels.learn.sources import IMAGES, opener, pixels
from lgd_kernels.runtime.progress import Track

METADATA = "metadata.jsonl"
NAMES = ("text", "caption", "captions", "prompt")  # of a caption in metadata.jsonl
EXPECTED = (
    f'expected images with a {METADATA} (a line {{"file_name": ..., "text": ...}} for each), with a .txt beside '
    "each, or in folders of their class"
)


class Captioned(NamedTuple):
    """Hold an image and its captions; those of a class folder have its name."""

    path: Path
    captions: tuple[str, ...]


class Latents(Dataset):
    """Hold pairs (x0, c): an image with k captions gives k pairs, and shares its latent between them.

    Args:
        x0: `[I, ...]`, of each image.
        image: `[N]` int64, the image of each pair.
        c: `[N, E]` or `[N]`, the condition of each pair.
    """

    def __init__(self, x0: Tensor, image: Tensor, c: Tensor) -> None:
        self.x0, self.groups, self.c = x0, image, c  # pairs of a group are held out together

    def __len__(self) -> int:
        return len(self.c)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x0[self.groups[i]], self.c[i]


def captioned(folder: Path) -> list[Captioned]:
    """List the images of a folder with their captions, in the order of their names.

    * metadata.jsonl: a line `{"file_name": "a.png", "text": "a cat"}` for each image; the text may be a list of them,
      and "caption", "captions" or "prompt" is understood too.
    * a .txt of the same name beside each image: a caption in every line; an empty file is the empty caption.
    * folders of classes: the name of the folder is the caption.

    An image that several lines name has all of their captions. Raises ValueError, naming --data and the file, for
    anything else, and for a folder that mixes these.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is no folder, {EXPECTED}")
    if (folder / METADATA).is_file():
        known: dict[Path, tuple[str, ...]] = {}
        for number, line in enumerate(_text(folder / METADATA).split("\n"), 1):
            if line.strip():
                path, texts = _line(folder, number, line)
                known[path] = known.get(path, ()) + texts
        return [Captioned(path, texts) for path, texts in known.items()] or _nothing(folder)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if beside := _images(folder):
        deeper = next((path for part in classes for path in _images(part)), None)
        if deeper is not None:
            raise ValueError(
                f"--data: {folder} holds images, and so does {deeper.parent}; pass one of them, {EXPECTED}"
            )
        return [Captioned(path, _beside(path)) for path in beside]
    for part in classes:
        own = next((path.with_suffix(".txt") for path in _images(part) if path.with_suffix(".txt").is_file()), None)
        own = part / METADATA if (part / METADATA).is_file() else own
        if own is not None:
            raise ValueError(
                f"--data: {part} holds captions of its own ({own.name}), so it is no class; pass --data {part}"
            )
    found = [Captioned(path, (part.name,)) for part in classes for path in _images(part)]
    return found or _nothing(folder)


def encoded(
    found: list[Captioned],
    size: int,
    latents: Callable[[Tensor], Tensor],
    condition: Callable[[str], Tensor],
    track: Track,
    chunk: int = 8,
) -> Latents:
    """Encode the images as latents and the captions as conditions.

    Args:
        size: each image is cut to its middle square and scaled to this side.
        latents: `[N, 3, size, size]` in [-1, 1] -> `[N, ...]`.
        condition: a caption -> `[E]`, or a label of no dimension.
    """
    open_image = opener()
    x0 = []
    for start in track(range(0, len(found), chunk), "latents"):
        part = [pixels(open_image(one.path), size) for one in found[start : start + chunk]]
        x0.append(latents(torch.stack(part)).cpu())
    captions = [(i, caption) for i, one in enumerate(found) for caption in one.captions]
    known: dict[str, Tensor] = {}
    for _, caption in track(captions, "captions"):
        if caption not in known:
            known[caption] = condition(caption).cpu()
    image = torch.tensor([i for i, _ in captions], device="cpu")
    return Latents(torch.cat(x0), image, torch.stack([known[caption] for _, caption in captions]))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.name[0] != ".")


def _nothing(folder: Path) -> list[Captioned]:
    raise ValueError(f"--data: {folder} holds no images, {EXPECTED}; images are {', '.join(IMAGES)}")


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data: {path} is not in UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from error


def _line(folder: Path, number: int, line: str) -> tuple[Path, tuple[str, ...]]:
    where = f"--data: line {number} of {folder / METADATA}"
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from error
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f'{where} has no "file_name", the path of an image in the folder')
    value = next((row[key] for key in NAMES if row.get(key) is not None), None)
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(one, str) for one in captions):
        raise ValueError(f'{where} has no caption: "text" is {value!r}, expected a text, or a list of texts')
    if not (folder / name).is_file():
        raise ValueError(f"{where} names {name}, which is not in the folder")
    return (folder / name).resolve(), tuple(captions)


def _beside(path: Path) -> tuple[str, ...]:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"--data: {path} has no caption, expected {text.name} beside it, or {METADATA} in the folder")
    lines = [line.strip() for line in _text(text).split("\n")]
    return tuple(line for line in lines if line) or ("",)
