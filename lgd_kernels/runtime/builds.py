"""Find the sources an extension was built from, its other builds, and the reason why a build failed.

setup.py and `impls` share this file, so it imports nothing but the standard library. setup.py compiles the digest of
csrc/ and python/ into each extension. These functions read the digest from the file's bytes, without loading it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NEEDS = {"_C": "a C++17 compiler", "_C_cuda": "nvcc"}
MARK = "lgd-sources-"  # before the digest, in an extension's bytes
SOURCES = {".h", ".cuh", ".cpp", ".cu"}


def digest(root: Path | None = None) -> str:
    """Return the digest of the C++ and CUDA sources of a checkout, or "" if there are none beside the package.

    The digest depends on names and contents only: not on times, nor on whether lines end in CR LF.
    """
    root = root or PACKAGE.parent
    found = {path.relative_to(root).as_posix(): path for top in ("csrc", "python") for path in (root / top).rglob("*")}
    found = {name: path for name, path in found.items() if path.suffix in SOURCES}
    if not any(name.startswith("csrc/") for name in found):
        return ""
    total = hashlib.sha256()
    for name, path in sorted(found.items()):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{name}\0{len(text)}\0".encode() + text)
    return total.hexdigest()


def digest_in(extension: Path) -> str:
    """Return the digest that was compiled into an extension, or "" if the file is missing or contains none."""
    try:
        found = re.search(MARK.encode() + rb"([0-9a-f]{64})", extension.read_bytes())
    except OSError:
        return ""
    return found[1].decode() if found else ""


def extension_in(folder: Path, name: str) -> Path | None:
    """Return the file of an extension that this Python would load from a package folder."""
    paths = (folder / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def others() -> list[Path]:
    """Return other folders on `sys.path` with the name of this package: the installed one, seen from a checkout."""
    folders = [Path(entry or ".").absolute() / PACKAGE.name for entry in sys.path]
    found = {folder.resolve(): folder for folder in folders if (folder / "__init__.py").is_file()}
    return [folder for resolved, folder in found.items() if resolved != PACKAGE]


def elsewhere(name: str) -> list[Path]:
    """Return the files of an extension in other installations: on `sys.path`, or in an editable install."""
    spec = importlib.util.find_spec(f"{PACKAGE.name}.{name}")
    paths = [extension_in(folder, name) for folder in others()] + [Path(spec.origin) if spec and spec.origin else None]
    return list(dict.fromkeys(path for path in paths if path and path.resolve().parent != PACKAGE))


def same_elsewhere(name: str) -> Path | None:
    """Return the first file in `elsewhere(name)` that was built from the sources beside this package."""
    found = elsewhere(name)
    here = digest() if found else ""
    return next((path for path in found if here and digest_in(path) == here), None)


def note_path(folder: Path, name: str) -> Path:
    """Return the path of setup.py's note: why an extension was not built, or has no OpenMP. A successful build removes
    the file."""
    return folder / f"{name}.failed.log"


def note(name: str, folder: Path | None = None) -> str:
    """Return setup.py's note, from `folder` or the first folder with one: what failed, the command, its last lines."""
    for one in [folder] if folder else [PACKAGE, *others()]:
        try:
            return note_path(one, name).read_text(errors="replace").strip()
        except OSError:
            continue
    return ""


def why_missing(name: str) -> str:
    """Return why an extension is missing, and how to get it."""
    missing = f"the extension lgd_kernels.{name} is not built"
    hidden = elsewhere(name)
    foreign = [
        path for end in ("so", "pyd") for path in PACKAGE.glob(f"{name}.*.{end}") if not extension_in(PACKAGE, name)
    ]
    failed = note(name).partition("\n")[0]
    reasons = []
    if failed:
        reasons.append(f"{failed} (`python -m lgd_kernels info` shows the command and its output)")
    if hidden and digest():
        again = f"`pip install {PACKAGE.parent}` builds it again"
        reasons.append(f"{hidden[0]} was built from other sources than those in {PACKAGE.parent}; {again}")
    elif hidden:
        reasons.append(
            f"{hidden[0]} is hidden by {PACKAGE}, which comes first in sys.path and has no sources to compare"
        )
    if foreign:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        reasons.append(f"{foreign[0].name} is for another Python than this {version}")
    if reasons:
        return f"{missing}: {'; '.join(reasons)}"
    if digest():
        return f"{missing} (`pip install {PACKAGE.parent}` builds it where there is {NEEDS[name]})"
    return f"{missing} (it needs {NEEDS[name]} at install time)"


def stale(extension: Path) -> str:
    """Return a message if an extension was built from other sources than those beside this package, else ""."""
    here = digest()
    if not here or digest_in(extension) == here:
        return ""
    if extension.parent.resolve() == PACKAGE:
        again = f"`python setup.py build_ext --inplace` in {PACKAGE.parent}"
    else:
        again = f"`pip install {PACKAGE.parent}`"
    return f"built from other sources than those in {PACKAGE.parent}; {again} builds it again"
