"""Call a frozen denoiser with the condition and without it in one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import Prediction
from lgd_kernels.sampling.schedules import Schedule

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [N, ...], t [N], condition [N, ...]) -> prediction [N, ...]
Null = int | Tensor | Callable[[Tensor], Tensor]  # an index, an embedding, or c [N, ...] -> null conditions [N, ...]


class Frozen:
    """Hold your denoiser and what is needed to guide it. The denoiser is called under no_grad and never changed.

    Args:
        denoiser: any callable `(x [N, ...], t [N], condition [N, ...]) -> [N, ...]`; t are times of the schedule. A
            module has to be in evaluation mode: with dropout, two predictions of the same x would differ.
        schedule: of its times.
        prediction: of the denoiser: "x0", "eps", "v" or "flow" (docs/math.md).
        null: the condition that means "none": the index of the null class, an embedding shaped like one row of c, or a
            function from a batch c to null conditions.

    Raises TypeError or ValueError, naming the argument.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: x * c[:, None], lgd.RectifiedFlow(), null=0)
    >>> frozen.predict(torch.ones(2, 1), torch.full((2,), 0.5), torch.tensor([1, 2]))
    (tensor([[1.],
            [2.]]), tensor([[0.],
            [0.]]))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        prediction: Prediction = "x0",
        null: Null | None = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"Frozen: `denoiser` is a {type(denoiser).__name__}, expected a callable (x, t, condition)")
        if isinstance(denoiser, nn.Module) and any(module.training for module in denoiser.modules()):
            raise ValueError("Frozen: `denoiser` is in training mode, expected evaluation mode; denoiser.eval()")
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"Frozen: `schedule` is a {type(schedule).__name__}, expected one of lgd_kernels.sampling.schedules"
            )
        checks.prediction_name("Frozen", prediction)
        if null is None or isinstance(null, bool) or not (isinstance(null, (int, Tensor)) or callable(null)):
            raise TypeError(
                f"Frozen: `null` is {null!r}, expected the condition that means none: a class index, an embedding, or "
                "a function of c"
            )
        self.denoiser, self.schedule, self.prediction, self.null = denoiser, schedule, prediction, null

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cond, uncond), each shaped like x, from one batched forward pass.

        Args:
            x: `[N, ...]`.
            t: `[N]`, times of the schedule.
            c: conditions `[N, ...]`: int64 labels, embeddings, or whatever tensor the denoiser takes.
        """
        if len(t) != len(x) or len(c) != len(x):
            raise ValueError(
                f"Frozen.predict: x holds {len(x)} samples, t {len(t)} and c {len(c)}, expected the same number"
            )
        both = self.denoiser(torch.cat((x, x)), torch.cat((t, t)), torch.cat((c, self.null_like(c))))
        if not isinstance(both, Tensor) or both.shape != (2 * len(x), *x.shape[1:]):
            came = list(both.shape) if isinstance(both, Tensor) else type(both).__name__
            raise ValueError(
                f"Frozen.predict: the denoiser returned {came} for x of shape {[2 * len(x), *x.shape[1:]]}, expected a "
                "tensor of that shape"
            )
        cond, uncond = both.detach().chunk(2)
        return cond, uncond

    def null_like(self, c: Tensor) -> Tensor:
        """Return null conditions for the batch c, in its shape and dtype and on its device."""
        if isinstance(self.null, int):
            if c.is_floating_point():
                raise TypeError(
                    f"Frozen: `null` is {self.null}, the index of a class, but c is {list(c.shape)} {c.dtype}; pass "
                    "the null embedding"
                )
            return torch.full_like(c, self.null)
        if isinstance(self.null, Tensor):
            null = self.null.to(c)
            if null.shape not in (c.shape[1:], (1, *c.shape[1:])):
                raise ValueError(
                    f"Frozen: `null` has shape {list(null.shape)}, expected {list(c.shape[1:])}, one row of c "
                    f"{list(c.shape)}"
                )
            return null.expand_as(c)
        null = self.null(c)
        if not isinstance(null, Tensor) or null.shape != c.shape:
            came = list(null.shape) if isinstance(null, Tensor) else type(null).__name__
            raise ValueError(f"Frozen: `null` returned {came} for c of shape {list(c.shape)}, expected that shape")
        return null
