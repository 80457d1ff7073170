"""Set the attributes that tables, networks and formulas of omega share, and check the order of times."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.runtime.shown import readable
from lgd_kernels.sampling.schedules import Schedule


def know(omega: object, schedule: Schedule | None, prediction: Prediction | None) -> None:
    """Set `omega.schedule`, whose times s and t are, and `omega.prediction`, which the model returned, if given."""
    for name, value in (("schedule", schedule), ("prediction", prediction)):
        if value is not None:
            setattr(omega, name, value)


def in_order(where: str, s: Tensor, t: Tensor) -> None:
    """Raise ValueError for a sample whose step would end before it starts: s > t, where the values are readable."""
    if readable(s) and readable(t) and s.shape == t.shape and bool((s > t).any()):
        first = int((s > t).flatten().int().argmax())
        raise ValueError(
            f"{where}: `s` is {s.flatten()[first]:g} and `t` is {t.flatten()[first]:g} in sample {first}, expected "
            "s <= t: a step goes from t to s, nearer the data, and omega(c, s, t) takes s first; pass them in that "
            "order, or as s=..., t=..."
        )
