"""Write and read the checkpoint of a run, and lock the folder of a run."""

from __future__ import annotations

import errno
import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from lgd_kernels.runtime import files_atomic

LOCK = "trainer.lock"
HELD: ContextVar[tuple[Path, ...]] = ContextVar("HELD", default=())  # folders that this thread has locked
PARTIAL = "[0-9a-f]" * 16  # the names that files_atomic gives to incomplete files
MAGIC = b"lgd_kernels trainer 1\n"
DIGEST = 32


def write(path: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, strings, and lists and dicts of them. A process that is killed leaves the old file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    files_atomic.write(path, MAGIC + hashlib.sha256(content).digest() + content)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote, and run no code from it. Raise FileNotFoundError, or ValueError with what is wrong."""
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        kind = MAGIC.decode().strip()
        raise ValueError(f"{path} is no checkpoint of a trainer (it does not begin with {kind!r}); nothing was loaded")
    digest, content = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its content is not what was written; nothing was loaded")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def with_nan(state: Any, name: str = "") -> list[str]:
    """Return the names of the tensors in a checkpoint that contain NaN."""
    if isinstance(state, torch.Tensor):
        return [name] if bool(state.isnan().any()) else []
    if not isinstance(state, dict):
        return []
    return [found for key, value in state.items() for found in with_nan(value, f"{name}.{key}" if name else str(key))]


@contextmanager
def locked(folder: Path, argument: str) -> Iterator[None]:
    """Create the folder if needed and hold its lock, so that one run at a time writes there.

    The system releases the lock when the process ends, however it ends, so a stale lock never blocks a run. The empty
    lock file stays. If the system or the file system has no locks, no lock is taken, nor in a thread that already holds
    it. Incomplete files of a killed process are removed from the folder.

    Raises ValueError, naming the argument, for a folder that cannot be made or written, or whose lock is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            file = open(folder / LOCK, "ab")  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        reason = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise ValueError(
            f"{argument} is {folder}, which cannot be made or written ({reason}); pass a folder where files can be "
            "written"
        ) from error
    with file:
        place = folder.resolve()
        if place in HELD.get():
            yield
            return
        if not _lock(file.fileno()):
            raise ValueError(
                f"{argument} is {folder}, where another run is at work: wait until it ends, or pass another folder"
            )
        for left in folder.glob(f".{PARTIAL}.partial"):
            left.unlink(missing_ok=True)
        token = HELD.set((*HELD.get(), place))
        try:
            yield
        finally:
            HELD.reset(token)


def _lock(descriptor: int) -> bool:
    """Take the lock until the file is closed; return whether the lock was free."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        try:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows
        except ImportError:
            return True
        except OSError:
            return False
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # otherwise: a file system without locks
    return True
