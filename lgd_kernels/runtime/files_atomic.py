"""Write files that are either complete or absent."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file completely or not at all: under an unpredictable name in the same folder, then rename it.

    An old file stays as it was if writing fails or the process is killed. A failed write removes its partial file. The
    file gets the default permissions of a new file.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers"
    >>> write(path, b"1 2 3")
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'1 2 3', 1)
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(beside, "xb") as file:  # x: fails if the name exists, even as a link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(beside)):
            error.filename = str(path)  # the name that the caller knows; a full disk names none
        raise
