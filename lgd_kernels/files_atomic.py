"""Files that are whole or absent."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all: under an unpredictable name in the same folder, then moved to its place.

    A failure, or a process that is killed, leaves the old file as it was; a failure also removes the new one. The file
    gets the permissions that any new file gets.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers"
    >>> write(path, b"1 2 3")
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'1 2 3', 1)
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(beside, "xb") as file:  # x: fails where something of that name is, a link included
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            error.filename = str(path)  # the name that the caller knows
        raise
