"""Tabulate omega(c, s, t) for the kernels: `OmegaTable`, and the module that learns one."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels.omega.common import in_order, know
from lgd_kernels.runtime.checks import DATA_DTYPES, dense, prediction_name, smallest
from lgd_kernels.runtime.levels import OmegaLookup, Prediction, omega_at
from lgd_kernels.runtime.shown import kind, readable, span
from lgd_kernels.sampling.schedules import Schedule

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class OmegaTable:
    """Look up omega for each condition c, bilinear in s and t between knots and clamped outside.

    Args:
        values: `[C, S, T]`, any float dtype: omega of condition c at `(s_knots[i], t_knots[j])`. Differentiable: a step
            that looks omega up adds its gradient here, summed over the samples of a cell in a fixed order.
        s_knots, t_knots: `[S]` and `[T]`, strictly increasing, float32 or float64, of one dtype.
        schedule, prediction: the schedule whose times the knots are, and what the model returned when the table was
            learned ("x0", "eps", "v" or "flow"). If given, they become attributes, and files store them
            (`lgd_kernels.omega.files`); `lgd_kernels.sample` warns about a plan with another prediction.

    An entry with `s_knots[i] >= t_knots[j]` belongs to no step. A lookup takes the value of the last row before the
    diagonal in its column instead (for a column without such a row: in the first column that has one).

    >>> import torch, lgd_kernels as lgd
    >>> table = lgd.OmegaTable(torch.tensor([[[1.0, 3.0]]]), torch.tensor([0.0]), torch.tensor([0.5, 1.0]))
    >>> lookup = table.at(torch.tensor([0]), torch.tensor([0.25]), torch.tensor([0.75]))
    >>> lgd.guided_score(torch.tensor([[1.0]]), torch.tensor([[0.0]]), lookup)
    tensor([[3.]])
    """

    schedule: Schedule  # set if it is known
    prediction: Prediction  # likewise

    def __init__(
        self,
        values: Tensor,
        s_knots: Tensor,
        t_knots: Tensor,
        *,
        schedule: Schedule | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        _tensors("OmegaTable", values=values, s_knots=s_knots, t_knots=t_knots)
        if values.ndim != 3 or values.dtype not in DATA_DTYPES or not values.numel():
            raise ValueError(
                f"OmegaTable: `values` is {list(values.shape)} {values.dtype}, expected floats [C, S, T], C, S, T > 0"
            )
        for name, knots, size in (("s_knots", s_knots, values.shape[1]), ("t_knots", t_knots, values.shape[2])):
            if knots.shape != (size,):
                raise ValueError(
                    f"OmegaTable: `{name}` has shape {list(knots.shape)}, expected [{size}] for `values` of shape "
                    f"{list(values.shape)}"
                )
            if knots.dtype not in (torch.float32, torch.float64) or knots.dtype != s_knots.dtype:
                raise TypeError(
                    f"OmegaTable: `{name}` has dtype {knots.dtype}, expected float32 or float64, the same for both"
                )
            if knots.device != values.device:
                raise ValueError(f"OmegaTable: `{name}` is on {knots.device}, expected {values.device} like `values`")
            if readable(knots) and not bool((knots.diff() > 0).all() and knots.isfinite().all()):
                finite = "" if bool(knots.isfinite().all()) else " and be finite"
                raise ValueError(f"OmegaTable: `{name}` must increase strictly{finite}, got {knots.tolist()}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(
                f"OmegaTable: `schedule` is a {type(schedule).__name__}, expected one of lgd_kernels, such "
                "as lgd_kernels.RectifiedFlow()"
            )
        if prediction is not None:
            prediction_name("OmegaTable", prediction)
        self.values, self.s_knots, self.t_knots = values, s_knots.detach(), t_knots.detach()
        know(self, schedule, prediction)

    def at(self, c: Tensor | None, s: Tensor, t: Tensor) -> OmegaLookup:
        """Return a lookup for the ops: condition c `[B]` (integers), times s and t `[B]` (float32 or float64, alike).

        A step goes from t to s, nearer the data: s <= t, and s comes first, as in omega(c, s, t). (`Schedule.levels`
        takes t first.) A table with one condition takes None for c. Integer times, those of `Discrete`, are cast to the
        dtype of the knots. The ops interpolate in their kernels; this method computes nothing. Raises ValueError for c
        outside [0, C) and for s > t, where the values are readable without a device sync; elsewhere c outside [0, C)
        gives NaN in the step, and s > t gives the value next to the diagonal.
        """
        _tensors("OmegaTable.at", s=s, t=t)
        if c is None and self.values.shape[0] == 1:
            c = torch.zeros(s.shape, dtype=torch.int64, device=s.device)
        if not isinstance(c, Tensor):
            raise TypeError(f"OmegaTable.at: `c` is a {type(c).__name__}, expected a tensor")
        dense("OmegaTable.at", "c", c)
        s, t = (time.to(self.s_knots.dtype) if time.dtype in INTEGERS else time for time in (s, t))
        if self.values.shape[1:] != (len(self.s_knots), len(self.t_knots)):
            raise ValueError(
                f"OmegaTable.at: `values` now has shape {list(self.values.shape)}, but there are {len(self.s_knots)} "
                f"and {len(self.t_knots)} knots; make a new table"
            )
        if c.dtype.is_floating_point or c.dtype.is_complex or c.dtype == torch.bool or c.ndim != 1:
            raise TypeError(f"OmegaTable.at: `c` is {list(c.shape)} {c.dtype}, expected integers [B]")
        for name, tensor in (("s", s), ("t", t)):
            if tensor.shape != c.shape:
                raise ValueError(
                    f"OmegaTable.at: `{name}` has shape {list(tensor.shape)}, expected {list(c.shape)} like `c`"
                )
            if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != s.dtype:
                raise TypeError(
                    f"OmegaTable.at: `{name}` has dtype {tensor.dtype}, expected float32 or float64, the same for both"
                )
            if tensor.requires_grad:
                raise ValueError(
                    f"OmegaTable.at: `{name}` requires grad, but no gradient flows to times; pass {name}.detach()"
                )
        for name, tensor in (("c", c), ("s", s), ("t", t)):
            if tensor.device != self.values.device:
                raise ValueError(
                    f"OmegaTable.at: `{name}` is on {tensor.device}, expected {self.values.device} like `values`; "
                    "table.to(...) moves the table"
                )
        if readable(c) and (int(c.min()) < 0 or int(c.max()) >= self.values.shape[0]):
            raise ValueError(
                f"OmegaTable.at: `c` reaches from {int(c.min())} to {int(c.max())}, expected conditions in "
                f"[0, {self.values.shape[0]})"
            )
        if readable(s) and smallest(t - s) < 0:
            in_order("OmegaTable.at", s, t)
        return OmegaLookup(self.values, self.s_knots, self.t_knots, c.long(), s, t)

    def __call__(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Compute omega `[B]`, to look at it; differentiable in `values`."""
        lookup = self.at(c, s, t)
        return omega_at(
            lookup,
            torch.empty(0, dtype=torch.promote_types(self.values.dtype, torch.float32), device=self.values.device),
        )

    def __repr__(self) -> str:
        knots = f"s_knots {span(self.s_knots)}, t_knots {span(self.t_knots)}"
        return f"OmegaTable(values {list(self.values.shape)} {kind(self.values)}, {knots})"

    def to(self, *args, **options) -> OmegaTable:
        """Return a table on another device, or with values of another dtype; arguments as in `torch.Tensor.to`.

        Knots keep their dtype. The gradient flows to the values of this table.

        >>> import torch, lgd_kernels as lgd
        >>> table = lgd.OmegaTable(torch.ones(3, 1, 1), torch.tensor([0.0]), torch.tensor([1.0]))
        >>> table.to("cpu", torch.bfloat16).values.dtype
        torch.bfloat16
        """
        values = self.values.to(*args, **options)
        if values.dtype not in DATA_DTYPES:
            raise TypeError(
                f"OmegaTable.to: the dtype is {values.dtype}, expected float32, bfloat16, float16 or float64"
            )
        moved = copy.copy(self)
        moved.values = values
        moved.s_knots, moved.t_knots = (knots.to(values.device) for knots in (self.s_knots, self.t_knots))
        return moved

    def save(
        self, path: str | os.PathLike, schedule: Schedule | None = None, prediction: Prediction | None = None
    ) -> None:
        """Write the table to a safetensors file with `lgd_kernels.omega.files.save`; `lgd_kernels.omega.files.load`
        reads it.

        `schedule` is the schedule whose times the knots are, `prediction` what the model returned when the table was
        learned; by default the attributes of the table.

        >>> import tempfile, torch, lgd_kernels as lgd
        >>> from lgd_kernels.omega.files import load
        >>> table = lgd.OmegaTable(torch.ones(3, 1, 1), torch.tensor([0.0]), torch.tensor([1.0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table.save(folder + "/omega.safetensors", lgd.RectifiedFlow())
        ...     load(folder + "/omega.safetensors").values.shape
        torch.Size([3, 1, 1])
        """
        from lgd_kernels.omega import files

        files.save(path, self, schedule, prediction)

    def plot(self, path: str | os.PathLike | None = None, schedule: Schedule | None = None) -> Any:
        """Draw omega over t (to the right) and s (upwards), one panel for each of the first few conditions.

        Args:
            path: where to write the picture: .png, .pdf or another format of matplotlib.
            schedule: the schedule whose times the knots are; the axes are then unit times, 0 at the data and 1 at the
                noise. Without a schedule the axes are times, from the first knot to the last.

        Returns the matplotlib figure. Raises ImportError where matplotlib is not installed.

        >>> import torch, lgd_kernels as lgd
        >>> knots = torch.linspace(0, 1, 5)
        >>> figure = lgd.OmegaTable(torch.ones(2, 5, 5), knots, knots).plot()
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('t', 's')
        """
        from lgd_kernels.omega import plot

        ends = (
            min(float(self.s_knots[0]), float(self.t_knots[0])),
            max(float(self.s_knots[-1]), float(self.t_knots[-1])),
        )
        conditions = torch.arange(self.values.shape[0], device=self.values.device)
        figure = plot.draw(self, conditions, schedule, ends)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


class TableModule(nn.Module):
    """Learn the values of an `OmegaTable` by gradient descent; `Trainer` wraps a table in this module.

    Values have to stay at 0 or above, and a value that a ReLU clamps has no gradient to rise again. So the forward does
    not clamp; `project`, called after each update, sets values below 0 to 0. Give the optimizer a `weight_decay` of 0
    (`AdamW` has 0.01): decay draws every value to 0, also values that no batch has read.

    Args:
        table: the initial table; its values are copied.

    `table()` returns the current values as an `OmegaTable`, for the kernels and for files.

    >>> import torch, lgd_kernels as lgd
    >>> knots = torch.linspace(0, 1, 5)
    >>> module = TableModule(lgd.OmegaTable(torch.ones(10, 4, 4), knots[:-1], knots[1:]))
    >>> module(torch.tensor([3]), torch.tensor([0.2]), torch.tensor([0.7])).tolist(), len(list(module.parameters()))
    ([1.0], 1)
    """

    s_knots: Tensor
    t_knots: Tensor

    def __init__(self, table: OmegaTable) -> None:
        super().__init__()
        if not isinstance(table, OmegaTable):
            raise TypeError(f"TableModule: `table` is a {type(table).__name__}, expected an OmegaTable")
        self.values = nn.Parameter(table.values.detach().clone())
        self.register_buffer("s_knots", table.s_knots.clone())
        self.register_buffer("t_knots", table.t_knots.clone())
        know(self, getattr(table, "schedule", None), getattr(table, "prediction", None))

    def forward(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Compute omega `[B]` from the current values, as `OmegaTable` does."""
        return OmegaTable(self.values, self.s_knots, self.t_knots)(c, s, t)

    def _apply(self, *arguments, **options) -> TableModule:
        """Apply `module.half()` and the like, but keep knots in float32 or float64, as `OmegaTable.to` does."""
        knots = {name: getattr(self, name) for name in ("s_knots", "t_knots")}
        super()._apply(*arguments, **options)
        for name, kept in knots.items():
            moved = getattr(self, name)
            if moved.dtype not in (torch.float32, torch.float64):
                setattr(self, name, kept.to(moved.device))
        return self

    @torch.no_grad()
    def project(self) -> None:
        """Set values below 0 to 0."""
        self.values.clamp_(min=0)

    def table(self) -> OmegaTable:
        """Copy the current values into an `OmegaTable`."""
        known = {name: getattr(self, name, None) for name in ("schedule", "prediction")}
        return OmegaTable(self.values.detach().clone(), self.s_knots, self.t_knots, **known)


def _tensors(where: str, **arguments: Tensor) -> None:
    """Raise TypeError unless each argument is a dense tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: `{name}` is a {type(value).__name__}, expected a tensor")
        dense(where, name, value)
