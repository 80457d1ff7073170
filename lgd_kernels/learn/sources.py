"""Load what the command is given: images in folders, arrays in a file, or Python objects by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lgd_kernels.learn.data import Data, Pairs, items_of, size_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def named(text: str, option: str) -> Any:
    """Return the object "module:name"; for "module:name()" and "module:name(text)", the result of calling it.

    Raises ValueError, naming the option, if there is no such module or name, or if import or call fails.

    >>> named("math:tau", "--number") > 6
    True
    >>> named("pathlib:Path(runs/a b)", "--path").name
    'a b'
    """
    module, name, argument = parsed(text, option)
    try:
        value = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise ValueError(
                f"{option}: there is no module {module!r} here or on PYTHONPATH; run the command where {module}.py lies"
            ) from error
        raise ValueError(f"{option}: {module} cannot be imported: {error}") from error
    except Exception as error:
        raise ValueError(f"{option}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{option}: {module} has no {name}")
        value = getattr(value, part)
    if argument is None:
        return value
    if not callable(value):
        raise ValueError(f"{option}: {module}:{name} is a {type(value).__name__}, expected a function to call")
    try:
        return value(argument) if argument else value()
    except Exception as error:
        raise ValueError(f"{option}: {module}:{name} failed: {type(error).__name__}: {error}") from error


def parsed(text: str, option: str) -> tuple[str, str, str | None]:
    """Return module, name and the text in brackets, if any. Raise ValueError, naming the option, for another text."""
    found = re.fullmatch(r"([\w.]+):([\w.]+)(?:\((.*)\))?", text, re.DOTALL)
    if not found:
        raise ValueError(
            f"{option} is {text!r}, expected module:name, module:name() to call it, or module:name(text) to call it "
            "with a text"
        )
    return found[1], found[2], found[3]


def load(text: str, size: int | None = None) -> Data:
    """Load clean pairs (x0, c) from a folder, a .npz or .pt file, or module:name: see `lgd_kernels learn --help`.

    Raises ValueError, naming --data, if they are missing or not such pairs.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/data.pt"
    >>> torch.save({"x0": torch.zeros(5, 3), "c": torch.arange(5)}, path)
    >>> size_of(load(path))
    5
    """
    path = Path(text)
    if path.is_dir():
        return Images(path, size)
    if path.suffix in (".npz", ".pt", ".pth"):
        if not path.is_file():
            raise ValueError(f"--data: there is no file {path}")
        return _pair(_npz(path) if path.suffix == ".npz" else _pt(path), str(path))
    if ":" not in text:
        raise ValueError(f"--data: {text} is no folder, no .npz or .pt file and no module:name")
    data = named(text, "--data")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(one, Tensor) for one in data):
        return _pair({"x0": data[0], "c": data[1]}, text)
    try:
        size_of(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--data: {text}: {error}") from error
    return data


class Images(Dataset):
    """Read images from one folder for each class, on access: (x0 [3, size, size] in [-1, 1], index of the class).

    Args:
        folder: its folders are the classes, in the order of their names.
        size: each image is cut to its middle square and scaled to this; None expects images of one size.

    Reading needs Pillow (`pip install pillow`).
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self.open, self.size = opener(), size
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        found = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in IMAGES
        ]
        if not found:
            raise ValueError(
                f"--data: {folder} holds no images in folders of their class ({folder}/cat/1.png, ...; "
                f"{', '.join(IMAGES)})"
            )
        self.paths, self.labels = [path for path, _ in found], [label for _, label in found]
        if size is None:
            first = self._opened(0).size
            other = next((path for i, path in enumerate(self.paths) if self._opened(i).size != first), None)
            if other is not None:
                raise ValueError(f"--data: {self.paths[0]} and {other} have different sizes; pass --size N")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return pixels(self._opened(i), self.size), self.labels[i]

    def _opened(self, i: int) -> Any:
        return self.open(self.paths[i])


def opener() -> Callable[[Path], Any]:
    """Return a function that opens an image with Pillow. Errors are ValueErrors that name --data."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"--data: images are read with Pillow: pip install pillow ({error})") from error

    def opened(path: Path) -> Any:
        try:
            image = Image.open(path)
            image.load()  # a truncated file fails here
            return image
        except Exception as error:
            raise ValueError(f"--data: {path} cannot be read: {error}") from error

    return opened


def pixels(image: Any, size: int | None = None) -> Tensor:
    """Return an image of Pillow as `[3, H, W]` in [-1, 1], cut to its middle square and scaled, if `size` is given.

    The camera's orientation is applied, transparency is laid over white, and 16 bits become 8.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def first(data: Data, count: int = 2) -> tuple[Tensor, Tensor]:
    """Return the first few pairs. Raise ValueError if they are not (x0, c) of floats and conditions."""
    items = torch.arange(min(count, size_of(data)), device="cpu")
    try:
        x0, c = items_of(data, items)
    except Exception as error:
        raise ValueError(f"--data: its items are not pairs of tensors (x0, c): {error}") from error
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.ndim < 2:
        raise ValueError(f"--data: x0 is {_brief(x0)}, expected floats [N, ...], scaled as the model was trained")
    if not isinstance(c, Tensor) or (c.ndim != 1 if not c.is_floating_point() else c.ndim < 2):
        raise ValueError(f"--data: c is {_brief(c)}, expected labels [N] or embeddings [N, E]")
    return x0, c


def parted(
    data: Data, held_out: str, seed: int, read: Callable[[str], Data] = load, most: int = 4096
) -> tuple[Data, Data]:
    """Split data in two, (to learn from, held out): a share of the items at random, or other data; `most` at most.

    Args:
        data: a dataset with `groups` `[N]` int64 is split between groups.
        held_out: a number between 0 and 1, or what `read` takes.

    >>> import torch
    >>> [size_of(part) for part in parted((torch.zeros(50, 2), torch.zeros(50)), "0.1", seed=0)]
    [45, 5]
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    try:
        share = float(held_out)
    except ValueError:
        try:
            other = read(held_out)
        except ValueError as error:
            raise ValueError(str(error).replace("--data", "--held-out", 1)) from error
        found, expected = (tuple(one.shape[1:] for one in first(source)) for source in (other, data))
        if found != expected:
            raise ValueError(f"--held-out: items have shapes {found}, expected {expected}, those of --data") from None
        names, known = (getattr(source, "classes", None) for source in (other, data))
        if names != known:
            raise ValueError(f"--held-out: its classes are {names}, expected {known}, those of --data") from None
        return data, _part(other, torch.randperm(size_of(other), generator=generator, device="cpu")[:most])
    order = torch.randperm(size_of(data), generator=generator, device="cpu")
    groups = getattr(data, "groups", None)
    if groups is not None:  # whole groups stay on one side
        place = torch.randperm(int(groups.max()) + 1, generator=generator, device="cpu")
        order = order[place[groups[order]].argsort(stable=True)]
    cut = min(most, max(1, round(share * len(order)))) if 0 < share < 1 else len(order)
    while groups is not None and cut < len(order) and groups[order[cut]] == groups[order[cut - 1]]:
        cut += 1
    if cut >= len(order):
        raise ValueError(
            f"--held-out is {held_out} of {len(order)} items, expected a share that leaves some on each side"
        )
    return _part(data, order[cut:]), _part(data, order[:cut])


def _part(data: Data, items: Tensor) -> Data:
    return items_of(data, items) if isinstance(data, tuple) else _Some(data, items.tolist())


class _Some(Dataset):
    """Hold some items of a dataset."""

    def __init__(self, data: Pairs, items: list[int]) -> None:
        self.data, self.items = data, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.data[self.items[i]]


def _npz(path: Path) -> dict[str, Tensor]:
    import numpy

    try:
        with numpy.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in ("x0", "c") if name in file.files}
    except Exception as error:
        raise ValueError(f"--data: {path} cannot be read as .npz: {error}") from error


def _pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--data: {path} cannot be read as tensors: {type(error).__name__}") from error


def _pair(found: Any, where: str) -> tuple[Tensor, Tensor]:
    if isinstance(found, (tuple, list)) and len(found) == 2:
        found = dict(zip(("x0", "c"), found, strict=True))
    if not isinstance(found, dict) or not all(isinstance(found.get(name), Tensor) for name in ("x0", "c")):
        raise ValueError(f"--data: {where} does not hold the arrays x0 [N, ...] and c [N] or [N, E]")
    x0, c = found["x0"], found["c"]
    if x0.ndim < 2 or not x0.is_floating_point():
        raise ValueError(f"--data: x0 is {_brief(x0)}, expected floats [N, ...], scaled as the model was trained")
    if len(x0) != len(c) or not len(x0):
        raise ValueError(f"--data: x0 holds {len(x0)} items and c {len(c)}, expected the same number, 1 or more")
    return x0, c if c.is_floating_point() else c.long()


def _brief(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
