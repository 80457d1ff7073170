"""omega in a safetensors file: what it is, what it was learned with, and nothing that runs.

tensors   the parameters and buffers of a module; values, s_knots and t_knots of a table
header    format "lgd_kernels.omega" · version · kind · settings (JSON) · schedule (JSON, or null) · digest,
          and the prediction, if it is known

The digest is the SHA-256 of the whole file, in hex, computed with 64 zeros in place of the digest. Early files had
none: a header with only format, version, kind, settings and schedule needs no digest, any other header does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import OmegaTable, TableModule, know
from lgd_kernels.runtime import files_atomic
from lgd_kernels.runtime.checks import prediction_name
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.sampling import schedules
from lgd_kernels.sampling.schedules import Schedule

FORMAT, VERSION = "lgd_kernels.omega", 1
FIRST = {"format", "version", "kind", "settings", "schedule"}  # the header of files without a digest
BLANK = "0" * 64  # stands for the digest while it is computed
DAMAGED = "its digest does not match: it was changed after it was written"
UNREADABLE = (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError)  # RecursionError is a RuntimeError
KINDS = {
    "network": OmegaNetwork,
    "table": OmegaTable,
    "constant": Constant,
    "interval": Interval,
    "clamp-linear": ClampLinear,
}
SETTINGS = ("classes", "embedding", "hidden", "initial")  # of a network; the others are all tensors
START = {"constant": (0.0,), "interval": (0.0, 0.0, 0.0), "clamp-linear": (0.0, 0.0)}  # before the file's values
SCHEDULES = {cls.__name__: cls for cls in Schedule.__subclasses__() if cls.__module__ == schedules.__name__}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save(
    path: str | os.PathLike,
    omega: nn.Module | OmegaTable,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
) -> None:
    """Write omega to a safetensors file, whole or not at all: it is written beside the path, then moved there.

    Args:
        omega: an `OmegaNetwork`, `OmegaTable`, `Constant`, `Interval` or `ClampLinear`, on any device.
        schedule: whose times s and t are. A network knows its own; a constant needs none; for the rest it must be
            given, since a table of times means nothing without it.
        prediction: what the model returned when omega was learned. By default `omega.prediction`, if it has one.

    Raises TypeError or ValueError for anything else, and for tensors that `load` would refuse, such as NaN; ImportError
    where safetensors is not installed.

    >>> import tempfile, torch, lgd_kernels as lgd
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/omega.safetensors", Interval(0.95, 0.2, 0.8), lgd.RectifiedFlow())
    ...     load(folder + "/omega.safetensors")(None, torch.zeros(2), torch.tensor([0.5, 0.9])).tolist()
    [0.949999988079071, 0.0]
    """
    path = _path("save", path)
    kind = next((name for name, cls in KINDS.items() if type(omega) is cls), None)
    if kind is None:
        hint = "; its table() is one" if isinstance(omega, TableModule) else ""
        raise TypeError(f"save: `omega` is a {type(omega).__name__}, expected one of {_names(KINDS.values())}{hint}")
    own = getattr(omega, "schedule", None)
    if own is not None and schedule is not None and described(own) != described(schedule):
        raise ValueError(f"save: `schedule` is {_brief(schedule)}, but omega was made for {_brief(own)}")
    schedule = own or schedule
    prediction = _prediction("save", prediction, getattr(omega, "prediction", None), "omega")
    if schedule is None and kind != "constant":
        raise ValueError(f"save: `schedule` is missing; the times of a {kind} mean nothing without one")
    if kind == "table":
        tensors = {name: getattr(omega, name) for name in ("values", "s_knots", "t_knots")}
    else:
        tensors = omega.state_dict()
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
        _made(kind, settings, schedule and schedule_of(described(schedule)), tensors)
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
    """Read what `save` wrote: the same values, bit for bit, and no code but ours runs.

    The tensors are copies: later changes of the file do not affect them. The schedule and the prediction that the file
    was saved with become `omega.schedule` and `omega.prediction`, if they are known.

    Args:
        schedule: if given, the file must have been saved with this one.
        device: where the tensors shall be.
        prediction: if given, the file must have been saved with this one, or with none.

    Raises ValueError, naming the file and what is wrong with it, for anything that `save` did not write: no
    safetensors file, a foreign one, a damaged or edited one (the digest covers every bit), another version or
    kind, another schedule or an invalid one (negative betas, sigma_max below sigma_min), tensors that are missing, of
    another shape or dtype or not finite, knots that do not increase. Random state is left alone, and a header that lies
    about sizes allocates nothing.
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
    prediction: str | None,
) -> nn.Module | OmegaTable:
    if header.get("version") != str(VERSION):
        raise ValueError(
            f"load: {path} has version {header.get('version')}, expected {VERSION}; update lgd_kernels, or save again"
        )
    kind = header.get("kind")
    if kind not in KINDS:
        raise ValueError(f"load: {path} holds a {kind}, expected one of {', '.join(KINDS)}")
    try:
        settings, saved = json.loads(header["settings"]), json.loads(header["schedule"])
        own = None if saved is None else schedule_of(saved)
    except UNREADABLE as error:
        raise ValueError(f"load: the header of {path} cannot be read: {error}") from error
    if saved is None and kind != "constant":
        raise ValueError(
            f"load: the header of {path} names no schedule; the times of a {kind} mean nothing without one"
        )
    if schedule is not None and saved is not None and described(schedule) != saved:
        raise ValueError(f"load: {path} was saved with the schedule {_brief(own)}, expected {_brief(schedule)}")
    known = _prediction("load", prediction, header.get("prediction"), str(path))
    try:
        omega = _made(kind, settings, own, tensors)
    except UNREADABLE as error:
        raise ValueError(f"load: {path} does not hold what its header says, a {kind}: {error}") from error
    know(omega, own, known)
    return omega


def described(schedule: Schedule) -> dict:
    """A schedule of `sampling.schedules` as JSON can hold it, exactly; equal if and only if the schedules are.

    >>> import lgd_kernels as lgd
    >>> described(lgd.EDM())
    {'name': 'EDM', 'sigma_min': 0.002, 'sigma_max': 80.0, 'rho': 7.0}
    """
    name = type(schedule).__name__
    if SCHEDULES.get(name) is not type(schedule):
        raise TypeError(f"`schedule` is a {name}, expected one of {', '.join(SCHEDULES)}: others cannot be saved")
    found = {"name": name}
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, Tensor):
            found[field.name] = [str(value.dtype).removeprefix("torch."), value.tolist()]
        elif isinstance(value, torch.dtype):
            found[field.name] = str(value).removeprefix("torch.")
        elif not field.name.startswith("_"):
            found[field.name] = value
    return found


def schedule_of(description: dict) -> Schedule:
    """The schedule of a description. Raises for what `described` did not make, and for numbers that make no
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
    rises = bool((times.diff() > 0).all()) or name == "Discrete"  # a short table rounds neighbouring times to one
    signal, noise = (level.double() for level in schedule.signal_noise(times))
    slack = 1e-12 * noise[-1]  # where levels saturate, rounding is not monotone
    falls = bool((signal.diff() <= slack).all() and (noise.diff() >= -slack).all() and noise[-1] > noise[0] >= 0)
    if not rises or not falls:
        raise ValueError(
            f"{_brief(schedule)} is no schedule: from data to noise, times and noise must rise and signal must not"
        )
    return schedule


def _prediction(where: str, given: str | None, known: str | None, of: str) -> str | None:
    """The prediction of omega, if it is known. Raises ValueError if the two differ, or for a name that is none."""
    for name, one in (("", given), (f": {of}", known)):
        if one is not None:
            prediction_name(f"{where}{name}", one)
    if None not in (given, known) and given != known:
        raise ValueError(
            f"{where}: {of} was learned with prediction={known!r}, expected {given!r}; pass what the model returns"
        )
    return known if given is None or where == "load" else given


def _path(where: str, path: str | os.PathLike) -> Path:
    """One that can name a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: `path` is a {type(path).__name__}, expected the name of a file")
    if os.fspath(path) in ("", b"") or "\0" in str(path):
        raise ValueError(f"{where}: `path` is {str(path)!r}, expected the name of a file")
    return Path(path)


def _made(kind: str, settings: dict, schedule: Schedule | None, tensors: dict[str, Tensor]) -> nn.Module | OmegaTable:
    """omega from tensors on the CPU. Raises ValueError that says what does not fit."""
    if kind == "table":
        _fit(tensors, {name: None for name in ("values", "s_knots", "t_knots")})
        return OmegaTable(**tensors)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        module = OmegaNetwork(schedule, **settings) if kind == "network" else KINDS[kind](*START[kind])
    _fit(tensors, {name: tensor.shape for name, tensor in module.state_dict().items()})
    if kind == "interval" and not tensors["low"] <= tensors["high"]:
        raise ValueError(f"low = {float(tensors['low'])} is above high = {float(tensors['high'])}")
    module.load_state_dict(tensors, assign=True)
    return module


def _fit(tensors: dict[str, Tensor], expected: dict[str, torch.Size | None]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"it holds the tensors {_names(tensors)}, expected {_names(expected)}")
    for name, shape in expected.items():
        if tensors[name].dtype not in FLOATS or (shape is not None and tensors[name].shape != shape):
            raise ValueError(
                f"`{name}` is {tensors[name].dtype} {list(tensors[name].shape)}, expected floats"
                + (f" {list(shape)}" if shape is not None else "")
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"`{name}` is not finite")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor], bool]:
    """(header, tensors, whether the digest matches). The file is read, not mapped: rewriting a mapped file would change
    the tensors, and truncating it would end the process."""
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


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("omega is kept in safetensors files: pip install safetensors") from error
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


def _names(things) -> str:
    return ", ".join(thing if isinstance(thing, str) else thing.__name__ for thing in things)
