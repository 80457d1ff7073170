"""Find files of omega in ComfyUI's folders, and nowhere else: `models/omega`, and the folders that
extra_model_paths.yaml names under `omega`."""

from __future__ import annotations

import os
from types import ModuleType

FOLDER = "omega"
ENDINGS = {".safetensors"}


def register() -> None:
    """Add `models/omega` to ComfyUI's folders of models, and list safetensors files only."""
    import folder_paths  # type: ignore[import-not-found]  # of ComfyUI

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    named, endings = folder_paths.folder_names_and_paths[FOLDER]
    if not endings:  # no endings: every file is listed
        folder_paths.folder_names_and_paths[FOLDER] = (named, ENDINGS)


def names() -> list[str]:
    """Return the names of the files of omega, as ComfyUI lists those of other models: it looks again after a change."""
    import folder_paths

    return folder_paths.get_filename_list(FOLDER)


def found(path: str | os.PathLike[str]) -> str:
    """Return the path of a file of omega. In ComfyUI, look only in the folders of omega."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"LearnedGuidance: `path` is a {type(path).__name__}, expected the name of a file")
    comfyui = _folder_paths()
    if comfyui is None:
        return os.fspath(path)
    named = getattr(comfyui, "folder_names_and_paths", {}).get(FOLDER, ((),))[0]
    for folder in (os.path.join(comfyui.models_dir, FOLDER), *named):
        folder = os.path.abspath(folder)
        file = os.path.abspath(os.path.join(folder, path))
        if file.startswith(os.path.join(folder, "")) and os.path.isfile(file):
            return file
    raise ValueError(
        f"LearnedGuidance: `path` is {str(path)!r}, expected the name of a file in ComfyUI's models/{FOLDER}, or in a "
        f"folder that extra_model_paths.yaml names under {FOLDER}"
    )


def changed(path: str | os.PathLike[str] | None) -> float:
    """Return a number that changes when a file of omega does; NaN, which is never the same, where there is none."""
    try:
        return os.path.getmtime(found("" if path is None else path))
    except (OSError, ValueError):
        return float("nan")  # so that the node runs and reports the error


def _folder_paths() -> ModuleType | None:
    """Import ComfyUI's folder_paths; None outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return None
    return folder_paths
