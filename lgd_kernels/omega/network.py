"""omega(c, s, t) >= 0 as a small network: what the paper learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOG_SNR_LIMIT = 10.0


class OmegaNetwork(nn.Module):
    """A guidance weight per condition and step: `omega(c, log-SNR at s, log-SNR at t) >= 0`.

    The two log-SNRs go through a 2-layer MLP, a class embedding is added, and a 6-layer MLP with a ReLU at its end
    gives the weight. It sees no x_t, so a sampling run can compute its whole table of weights before the loop.

    log-SNR is infinite at the ends of some schedules (rectified flow at t = 0 and 1): it is clamped to
    [-10, 10], that is a signal-to-noise ratio between 4.5e-5 and 2.2e4, and divided by 10.

    A ReLU head that starts negative never learns: the last bias starts at `initial`, so that omega starts near it.

    Args:
        classes: number of classes.
        hidden: width of both MLPs; the paper has 64 (class-conditional) and 512 (text).
        initial: omega at the start, above 0. The paper states no initialisation and no activation: 1, and SiLU
            between the layers, are ours.

    Source: Galashov et al., arXiv 2510.00815. Differentiable in its parameters.

    >>> import torch
    >>> c, log_snr = torch.tensor([0, 3]), torch.tensor([0.0, float("inf")])
    >>> OmegaNetwork(classes=10)(c, log_snr, log_snr - 1).shape
    torch.Size([2])
    """

    def __init__(self, classes: int, hidden: int = 64, initial: float = 1.0) -> None:
        super().__init__()
        if not initial > 0:
            raise ValueError(
                f"OmegaNetwork: initial is {initial}, expected above 0: a ReLU that starts dead stays dead"
            )
        self.time = nn.Sequential(nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.condition = nn.Embedding(classes, hidden)
        layers = [layer for _ in range(5) for layer in (nn.Linear(hidden, hidden), nn.SiLU())]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, 1))
        nn.init.constant_(self.head[-1].bias, initial)

    def forward(self, c: Tensor, log_snr_s: Tensor, log_snr_t: Tensor) -> Tensor:
        """c [B] int64, log_snr_s and log_snr_t [B] -> omega [B]."""
        log_snr = torch.stack([log_snr_s, log_snr_t], -1).clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)  # [B, 2]
        hidden = self.time(log_snr / LOG_SNR_LIMIT) + self.condition(c)  # [B, hidden]
        return self.head(hidden).squeeze(-1).relu()
