"""Save omega to a safetensors file and load it: its tensors and settings, the schedule, the prediction, and no code.

tensors   the parameters and buffers of a module; values, s_knots and t_knots of a table
header    format "lgd_kernels.omega" · version · kind · settings (JSON) · schedule (JSON, or null) · digest,
          and the prediction, if it is known

The digest is the SHA-256 of the whole file, in hex, computed with 64 zeros in place of the digest. Early files have no
digest: a header with only format, version, kind, settings and schedule needs none, any other header does.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lgd_kernels.omega.common import know
from lgd_kernels.runtime import files_atomic
from lgd_kernels.runtime.checks import prediction_name
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.sampling import schedules
from lgd_kernels.sampling.schedules import Schedule

if TYPE_CHECKING:
    from lgd_kernels.omega.table import OmegaTable

FORMAT, VERSION = "lgd_kernels.omega", 1
FIRST = {"format", "version", "kind", "settings", "schedule"}  # the header of files without a digest
BLANK = "0" * 64  # in place of the digest while it is computed
DAMAGED = "its digest does not match: it was changed after it was written"
UNREADABLE = (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError)  # RecursionError is a RuntimeError
PACKAGE = "lgd_kernels.omega"
KINDS = {  # the class of each kind, below PACKAGE; `load` imports it: an import here would be a circle with table.py
    "network": "network.OmegaNetwork",
    "table": "table.OmegaTable",
    "constant": "forms.Constant",
    "interval": "forms.Interval",
    "clamp-linear": "forms.ClampLinear",
}
SETTINGS = ("classes", "embedding", "hidden", "initial")  # of a network; everything else is a tensor
TABLE = ("values", "s_knots", "t_knots")  # the tensors of a table
START = {"constant": (0.0,), "interval": (0.0, 0.0, 0.0), "clamp-linear": (0.0, 0.0)}  # replaced by the file's values
SCHEDULES = {cls.__name__: cls for cls in Schedule.__subclasses__() if cls.__module__ == schedules.__name__}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save(
    path: str | os.PathLike,
    omega: nn.Module | OmegaTable,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
) -> None:
    """Write omega to a safetensors file, completely or not at all: write beside the path, then rename.

    Args:
        omega: an `OmegaNetwork`, `OmegaTable`, `Constant`, `Interval` or `ClampLinear`, on any device.
        schedule: the schedule whose times s and t are; by default `omega.schedule`. Only a constant needs none: the
            times of the other kinds mean nothing without a schedule.
        prediction: what the model returned when omega was learned; by default `omega.prediction`, if omega has one.

    Raises TypeError or ValueError for anything else, and for tensors that `load` would refuse, such as NaN; ImportError
    where safetensors is not installed.

    >>> import tempfile, torch, lgd_kernels as lgd
    >>> from lgd_kernels.omega.forms import Interval
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/omega.safetensors", Interval(0.95, 0.2, 0.8), lgd.RectifiedFlow())
    ...     load(folder + "/omega.safetensors")(None, torch.zeros(2), torch.tensor([0.5, 0.9])).tolist()
    [0.949999988079071, 0.0]
    """
    path = _path("save", path)
    made = type(omega)
    where = f"{made.__module__}.{made.__qualname__}"
    kind = next((kind for kind, home in KINDS.items() if where == f"{PACKAGE}.{home}"), None)
    if kind is None:
        hint = "; its table() is one" if where == f"{PACKAGE}.table.TableModule" else ""
        names = ", ".join(home.split(".")[1] for home in KINDS.values())
        raise TypeError(f"save: `omega` is a {made.__name__}, expected one of {names}{hint}")
    own = getattr(omega, "schedule", None)
    if own is not None and schedule is not None and described(own) != described(schedule):
        raise ValueError(f"save: `schedule` is {_brief(schedule)}, but omega was made for {_brief(own)}")
    schedule = own or schedule
    prediction = _prediction("save", prediction, getattr(omega, "prediction", None), "omega")
    if schedule is None and kind != "constant":
        raise ValueError(f"save: `schedule` is missing; the times of a {kind} mean nothing without one")
    tensors = omega.state_dict() if isinstance(omega, nn.Module) else {name: getattr(omega, name) for name in TABLE}
    settings = {name: getattr(omega, name) for name in SETTINGS} if kind == "network" else {}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": kind,
        "settings": json.dumps(settings),
        "schedule": json.dumps(schedule and described(schedule)),
        **({"prediction": prediction} if prediction is not None else {}),
    }
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        _made(kind, made, settings, schedule and schedule_of(described(schedule)), tensors)
    except UNREADABLE as error:
        raise ValueError(f"save: `omega` could not be loaded again: {error}") from error
    content = _safetensors().torch.save(tensors, {**header, "digest": BLANK})
    files_atomic.write(path, content.replace(BLANK.encode(), _digest(content), 1))


def load(
    path: str | os.PathLike,
    schedule: Schedule | None = None,
    device: torch.device | str = "cpu",
    prediction: Prediction | None = None,
) -> nn.Module | OmegaTable:
    """Read a file that `save` wrote: the same values, bit for bit. No code of the file runs.

    The tensors are copies: later changes of the file do not affect them. The schedule and the prediction that the file
    was saved with become `omega.schedule` and `omega.prediction`, if they are known.

    Args:
        schedule: if given, the file must have been saved with this schedule, or with none.
        device: the device of the tensors.
        prediction: if given, the file must have been saved with this prediction, or with none.

    Raises ValueError, naming the file and what is wrong with it, for anything that `save` did not write: no safetensors
    file, one of another program, a damaged or edited one (the digest covers every bit), another version or kind,
    another schedule or an invalid one (negative betas, sigma_max below sigma_min), tensors that are missing, of another
    shape or dtype or not finite, knots that do not increase. The random state does not change, and a header with wrong
    sizes allocates nothing.
    """
    path = _path("load", path)
    header, tensors, intact = _read(path)
    try:
        found = _found(path, header, tensors, schedule, prediction)
    except ValueError as error:
        raise error if intact else ValueError(f"{error} ({DAMAGED})") from error
    if not intact:
        raise ValueError(f"load: {path} is damaged: {DAMAGED}")
    return found.to(device)


def _found(
    path: Path,
    header: dict[str, str],
    tensors: dict[str, Tensor],
    schedule: Schedule | None,
    prediction: Prediction | None,
) -> nn.Module | OmegaTable:
    """Make the omega of a file from its header and tensors."""
    if header.get("version") != str(VERSION):
        raise ValueError(
            f"load: {path} has version {header.get('version')}, expected {VERSION}; update lgd_kernels, or save again"
        )
    kind = header.get("kind", "")
    if kind not in KINDS:
        raise ValueError(f"load: {path} holds a {header.get('kind')}, expected one of {', '.join(KINDS)}")
    try:
        settings, saved = json.loads(header["settings"]), json.loads(header["schedule"])
        own = None if saved is None else schedule_of(saved)
    except UNREADABLE as error:
        raise ValueError(f"load: the header of {path} cannot be read: {error}") from error
    if saved is None and kind != "constant":
        raise ValueError(
            f"load: the header of {path} names no schedule; the times of a {kind} mean nothing without one"
        )
    if schedule is not None and own is not None and described(schedule) != saved:
        raise ValueError(f"load: {path} was saved with the schedule {_brief(own)}, expected {_brief(schedule)}")
    known = _prediction("load", prediction, header.get("prediction"), str(path))
    module, name = KINDS[kind].split(".")
    try:
        omega = _made(kind, getattr(importlib.import_module(f"{PACKAGE}.{module}"), name), settings, own, tensors)
    except UNREADABLE as error:
        raise ValueError(f"load: {path} does not hold what its header says, a {kind}: {error}") from error
    know(omega, own, known)
    return omega


def described(schedule: Schedule) -> dict[str, Any]:
    """Describe a schedule of `sampling.schedules` as exact JSON values; equal if and only if the schedules are.

    >>> import lgd_kernels as lgd
    >>> described(lgd.EDM())
    {'name': 'EDM', 'sigma_min': 0.002, 'sigma_max': 80.0, 'rho': 7.0}
    """
    name = type(schedule).__name__
    if SCHEDULES.get(name) is not type(schedule):
        raise TypeError(f"`schedule` is a {name}, expected one of {', '.join(SCHEDULES)}: others cannot be saved")
    found: dict[str, Any] = {"name": name}
    for field, value in vars(schedule).items():
        if isinstance(value, Tensor):
            found[field] = [str(value.dtype).removeprefix("torch."), value.tolist()]
        elif isinstance(value, torch.dtype):
            found[field] = str(value).removeprefix("torch.")
        elif not field.startswith("_"):
            found[field] = value
    return found


def schedule_of(description: dict[str, Any]) -> Schedule:
    """Make the schedule of a description. Raises for what `described` did not make, and for numbers that give no
    schedule."""
    settings = dict(description)
    name = settings.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"the schedule is {name}, expected one of {', '.join(SCHEDULES)}")
    if name == "Discrete":
        dtype, values = settings["alphas_cumprod"]
        settings["alphas_cumprod"] = torch.tensor(values, dtype=_dtype(dtype), device="cpu")
        settings["dtype"] = _dtype(settings["dtype"])
    schedule = SCHEDULES[name](**settings)
    times = schedule.from_unit(torch.linspace(0, 1, 1025, dtype=torch.float64, device="cpu"))
    rises = bool((times.diff() > 0).all()) or name == "Discrete"  # a short table rounds neighbouring times to the same
    signal, noise = (level.double() for level in schedule.signal_noise(times))
    slack = 1e-12 * noise[-1]  # where levels saturate, rounding is not monotone
    falls = bool((signal.diff() <= slack).all() and (noise.diff() >= -slack).all() and noise[-1] > noise[0] >= 0)
    if not rises or not falls:
        raise ValueError(
            f"{_brief(schedule)} is no schedule: from data to noise, times and noise must rise and signal must not"
        )
    return schedule


def _prediction(where: str, given: Prediction | None, known: Any, of: str) -> Prediction | None:
    """Return the prediction of omega, if it is known. Raises ValueError if the two differ, or for any other name."""
    for name, one in (("", given), (f": {of}", known)):
        if one is not None:
            prediction_name(f"{where}{name}", one)
    if None not in (given, known) and given != known:
        raise ValueError(
            f"{where}: {of} was learned with prediction={known!r}, expected {given!r}; pass what the model returns"
        )
    return known if given is None or where == "load" else given


def _path(where: str, path: str | os.PathLike) -> Path:
    """Check that a path can name a file, and return it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: `path` is a {type(path).__name__}, expected the name of a file")
    if os.fspath(path) in ("", b"") or "\0" in str(path):
        raise ValueError(f"{where}: `path` is {str(path)!r}, expected the name of a file")
    return Path(path)


def _made(
    kind: str, make: Callable[..., Any], settings: dict[str, Any], schedule: Schedule | None, tensors: dict[str, Tensor]
) -> nn.Module | OmegaTable:
    """Make an omega from tensors on the CPU with the class of its kind. Raises ValueError if they do not fit."""
    if kind == "table":
        _fit(tensors, dict.fromkeys(TABLE))
        return make(**tensors)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        module = make(schedule, **settings) if kind == "network" else make(*START[kind])
    _fit(tensors, {name: tensor.shape for name, tensor in module.state_dict().items()})
    if kind == "interval" and not tensors["low"] <= tensors["high"]:
        raise ValueError(f"low = {float(tensors['low'])} is above high = {float(tensors['high'])}")
    module.load_state_dict(tensors, assign=True)
    return module


def _fit(tensors: dict[str, Tensor], expected: dict[str, torch.Size] | dict[str, None]) -> None:
    """Raise ValueError unless the tensors have the expected names and shapes (None: any), and are finite floats."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"it holds the tensors {', '.join(tensors)}, expected {', '.join(expected)}")
    for name, shape in expected.items():
        if tensors[name].dtype not in FLOATS or (shape is not None and tensors[name].shape != shape):
            raise ValueError(
                f"`{name}` is {tensors[name].dtype} {list(tensors[name].shape)}, expected floats"
                + (f" {list(shape)}" if shape is not None else "")
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"`{name}` is not finite")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor], bool]:
    """Read `(header, tensors, whether the digest matches)`. Nothing is mapped: rewriting a mapped file would change the
    tensors, and truncating it would end the process."""
    safetensors = _safetensors()
    if path.exists() and not path.is_file():
        raise ValueError(f"load: {path} is a folder or a device, expected a safetensors file")
    wrong = f"load: {path} is no safetensors file, or a damaged one"
    with open(path, "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{wrong}: its header is longer than the file")
        head = file.read(size)
        try:
            header = dict(json.loads(head).get("__metadata__", {}))
        except (AttributeError, *UNREADABLE) as error:
            raise ValueError(f"{wrong}: {error}") from error
        if header.get("format") != FORMAT:
            raise ValueError(
                f"load: {path} is a safetensors file, but holds no omega: its format is {header.get('format')}"
            )
        content = length + head + file.read()
    try:
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}
    except (safetensors.SafetensorError, AssertionError, *UNREADABLE) as error:
        raise ValueError(f"{wrong}: {error}") from error
    written = header.get("digest")
    if written is None:
        return header, tensors, header.keys() <= FIRST
    return header, tensors, _digest(content.replace(written.encode(), BLANK.encode(), 1)) == written.encode()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _safetensors() -> ModuleType:
    """Import safetensors, or raise ImportError that says how to install it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("omega is saved in safetensors files: pip install safetensors") from error
    return safetensors


def _brief(schedule: Schedule) -> str:
    if isinstance(schedule, schedules.Discrete):
        return f"Discrete of {schedule.alphas_cumprod.numel()} steps"
    return str(schedule)


def _dtype(name: str) -> torch.dtype:
    found = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    if name not in found:
        raise ValueError(f"a dtype is {name}, expected one of {', '.join(found)}")
    return found[name]
