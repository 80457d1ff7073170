"""Compute omega(c, s, t) >= 0 with a small network, as in the paper (arXiv 2510.00815)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lgd_kernels.omega.common import in_order
from lgd_kernels.omega.floor import above_zero
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import OmegaLookup, omega_at
from lgd_kernels.sampling.schedules import Schedule

LOG_SNR_LIMIT = 10.0


class OmegaNetwork(nn.Module):
    """Compute a guidance weight per condition and step: `omega(c, s, t) >= 0`, s and t times of the schedule.

    The log-SNRs at s and t go through a 2-layer MLP; the embedding of the condition is added; a 6-layer MLP and a clamp
    at 0 give the weight. The network takes no x_t, so a sampling run can compute all of its weights before the loop,
    and `bake` can tabulate them for the kernels.

    log-SNR is infinite at the ends of some schedules (rectified flow at t = 0 and 1): it is clamped to
    [-10, 10], that is a signal-to-noise ratio between 4.5e-5 and 2.2e4, and divided by 10.

    The last bias starts at `initial`, and the last weights are scaled by `initial`, so that omega starts near
    `initial`, with the same relative deviation however small `initial` is. Where training has pushed omega to 0,
    gradients can raise it again (`lgd_kernels/omega/floor.py`), unlike those of a ReLU.

    Args:
        schedule: the schedule whose times s and t are, saved with the weights.
        classes: number of classes; c is then `[B]` int64.
        embedding: width of a vector that describes the condition (CLIP, T5, ...); c is then `[B, embedding]`. Vectors
            may have any scale: the network standardises each one by its own mean and deviation (ours).
            With neither classes nor embedding omega depends on s and t only; c has no effect, and may be None.
        hidden: width of both MLPs; the paper has 64 (class-conditional) and 512 (text).
        initial: omega at the start, above 0. The paper states no initialisation and no activation: 1, and SiLU
            between the layers, are ours.

    Source: Galashov et al., arXiv 2510.00815. Differentiable in its parameters.

    >>> import torch, lgd_kernels as lgd
    >>> net = OmegaNetwork(lgd.RectifiedFlow(), classes=10)
    >>> net(torch.tensor([0, 3]), s=torch.tensor([0.0, 0.5]), t=torch.tensor([1.0, 0.6])).shape
    torch.Size([2])
    >>> OmegaNetwork(lgd.RectifiedFlow())(None, torch.zeros(3), torch.ones(3)).shape
    torch.Size([3])
    """

    condition: nn.Module

    def __init__(
        self,
        schedule: Schedule,
        classes: int | None = None,
        embedding: int | None = None,
        hidden: int = 64,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"OmegaNetwork: `schedule` is a {type(schedule).__name__}, expected a Schedule such as RectifiedFlow()"
            )
        if classes is not None and embedding is not None:
            raise ValueError(
                f"OmegaNetwork: classes = {classes} and embedding = {embedding}, expected one of them, or neither"
            )
        for name, size in (("classes", classes), ("embedding", embedding), ("hidden", hidden)):
            if (size is not None or name == "hidden") and (
                isinstance(size, bool) or not isinstance(size, int) or size < 1
            ):
                raise ValueError(f"OmegaNetwork: {name} is {size!r}, expected a number of 1 or more")
        if not isinstance(initial, (int, float)) or not 0 < initial < math.inf:
            raise ValueError(
                f"OmegaNetwork: `initial` is {initial!r}, expected above 0: the last weights are scaled by it"
            )
        self.schedule, self.classes, self.embedding = schedule, classes, embedding
        self.hidden, self.initial = hidden, initial
        self.time = nn.Sequential(nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        if classes is not None:
            self.condition = nn.Embedding(classes, hidden)
        elif embedding is not None:
            standardised = nn.LayerNorm(embedding, elementwise_affine=False)
            self.condition = nn.Sequential(standardised, nn.Linear(embedding, hidden))
        layers = [layer for _ in range(5) for layer in (nn.Linear(hidden, hidden), nn.SiLU())]
        last = nn.Linear(hidden, 1)
        self.head = nn.Sequential(*layers, last)
        with torch.no_grad():
            last.weight.mul_(initial)
            last.bias.fill_(initial)

    def forward(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Return omega `[B]` for c `[B]` int64, `[B, embedding]` or None, and times s and t `[B]`, s <= t."""
        self._check(c, s, t)
        in_order("OmegaNetwork", s, t)
        return self._omega(c, s, t)

    def _omega(self, c: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Compute omega, also for s > t, where a table has corners."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        dtype = last.weight.dtype
        log_snr = torch.stack([self.schedule.log_snr(time) for time in (s, t)], -1)  # [B, 2]
        hidden = self.time(log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).to(dtype) / LOG_SNR_LIMIT)
        if self.classes is not None:
            hidden = hidden + self.condition(c)
        elif self.embedding is not None and c is not None:
            hidden = hidden + self.condition(c.to(dtype))
        return above_zero(self.head(hidden).squeeze(-1))

    @torch.no_grad()
    def bake(self, s_knots: Tensor, t_knots: Tensor, conditions: Tensor | None = None) -> tuple[OmegaTable, float]:
        """Tabulate this network for lookups in the kernels, and measure the largest error of the table.

        Args:
            s_knots, t_knots: `[S]` and `[T]`, times of the schedule, increasing.
            conditions: the conditions to tabulate, `[C]` int64 or `[C, embedding]`: condition i of the table is
                conditions[i]. By default all classes, in order; networks without a condition give a table with one.

        Returns `(table, error)`: an `OmegaTable` with values `[C, S, T]` in the network's dtype, and the largest
        |table - network| at the middles of all cells that hold steps (s < t there), over all conditions; NaN if there
        is no such cell. The largest errors are in cells that the diagonal s = t cuts (see `OmegaTable`); more knots
        reduce them.

        >>> import torch, lgd_kernels as lgd
        >>> net = OmegaNetwork(lgd.RectifiedFlow(), classes=3)
        >>> table, error = net.bake(torch.linspace(0, 0.9, 10), torch.linspace(0.1, 1, 10))
        >>> table.values.shape, error < 0.1
        (torch.Size([3, 10, 10]), True)
        """
        given = {} if conditions is None else {"conditions": conditions}
        _real("OmegaNetwork.bake", s_knots=s_knots, t_knots=t_knots, **given)
        for name, knots in (("s_knots", s_knots), ("t_knots", t_knots)):
            if knots.ndim != 1 or not len(knots):
                raise ValueError(f"OmegaNetwork.bake: `{name}` has shape {list(knots.shape)}, expected [K], K > 0")
        if conditions is None:
            if self.embedding is not None:
                raise ValueError(
                    "OmegaNetwork.bake: `conditions` is missing, expected the embeddings to tabulate, "
                    f"[C, {self.embedding}]"
                )
            if self.classes is not None:
                conditions = torch.arange(self.classes, device=s_knots.device)
        values = self._over(conditions, s_knots, t_knots)
        floating = (values if s_knots.dtype == torch.float32 or not s_knots.is_floating_point() else s_knots).dtype
        floats = (k if k.is_floating_point() else k.to(floating) for k in (s_knots, t_knots))
        table = OmegaTable(values, *floats, schedule=self.schedule, prediction=getattr(self, "prediction", None))
        s, t = ((k[1:] + k[:-1]) / 2 for k in (s_knots, t_knots))
        if not s_knots.is_floating_point():
            s, t = s.floor().to(s_knots.dtype), t.floor().to(t_knots.dtype)  # integer times
        exact = self._over(conditions, s, t)  # [C, S - 1, T - 1]
        c, i, j = torch.meshgrid(*(torch.arange(size, device=s.device) for size in exact.shape), indexing="ij")
        s_at, t_at = (time.to(table.s_knots.dtype) for time in (s[i.flatten()], t[j.flatten()]))
        lookup = OmegaLookup(table.values, table.s_knots, table.t_knots, c.flatten(), s_at, t_at)
        found = omega_at(lookup, exact).view_as(exact)
        error = (found - exact).abs()[:, s[:, None] < t[None, :]]
        return table, float(error.max()) if error.numel() else float("nan")

    def _over(self, conditions: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
        """Compute omega for each condition, s and t: `[C, S, T]`."""
        count = 1 if conditions is None else len(conditions)
        shape = (count, len(s), len(t))
        axes = (torch.arange(size, device=s.device) for size in shape)
        item, i, j = (index.flatten() for index in torch.meshgrid(*axes, indexing="ij"))
        c = None if conditions is None else conditions[item]
        self._check(c, s[i], t[j])
        with torch.autocast(s.device.type, enabled=False):  # the table and its error have the network's dtype
            return self._omega(c, s[i], t[j]).view(shape)

    def _check(self, c: Tensor | None, s: Tensor, t: Tensor) -> None:
        """Raise TypeError or ValueError unless the arguments fit this network."""
        _real("OmegaNetwork", s=s, t=t, **({} if c is None else {"c": c}))
        if s.ndim != 1 or s.shape != t.shape:
            raise ValueError(
                f"OmegaNetwork: `s` and `t` have shapes {list(s.shape)} and {list(t.shape)}, expected [B] both"
            )
        batch = len(s)
        if self.classes is not None and (c is None or c.shape != (batch,) or c.dtype not in (torch.int64, torch.int32)):
            shown = "None" if c is None else f"{c.dtype} {list(c.shape)}"
            raise ValueError(f"OmegaNetwork: `c` is {shown}, expected int64 labels [B] = [{batch}]")
        if self.embedding is not None and (c is None or c.shape != (batch, self.embedding)):
            shown = "None" if c is None else str(list(c.shape))
            raise ValueError(f"OmegaNetwork: `c` is {shown}, expected embeddings [B, E] = [{batch}, {self.embedding}]")


def _real(where: str, **tensors: Tensor) -> None:
    """Raise TypeError unless each argument is a dense tensor of real numbers."""
    for name, value in tensors.items():
        checks.tensor(where, name, value)
        checks.dense(where, name, value)
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{where}: `{name}` has dtype {value.dtype}, expected a real dtype")
