"""A file that is either whole or refused: written beside its place, moved there at once, and held to its own digest."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

MAGIC = b"lgd_kernels trainer 1\n"
DIGEST = 32


def write(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, strings, lists and dicts of them. A run that is killed meanwhile leaves the old file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(MAGIC + hashlib.sha256(content).digest() + content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; nothing in the file is run. Raises FileNotFoundError, or ValueError saying what is wrong."""
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        kind = MAGIC.decode().strip()
        raise ValueError(f"{path} is no checkpoint of a trainer (it does not begin with {kind!r}); nothing was loaded")
    digest, content = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its content is not what was written; nothing was loaded")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
