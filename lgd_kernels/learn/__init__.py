"""Learn omega for a frozen denoiser; docs/learning.md is the guide."""

from typing import TYPE_CHECKING

from lgd_kernels.learn.batches import Settings
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.losses import guided_score_matching_loss, l2_loss, self_consistency_loss
from lgd_kernels.learn.marginal import marginal_loss
from lgd_kernels.learn.objective import particle_energy, sample_s, sample_times
from lgd_kernels.learn.particles import Particles, curve, draw
from lgd_kernels.learn.reward import black_box_reward_loss, reward_loss, with_reward
from lgd_kernels.learn.trainer import NotFinite, Trainer
from lgd_kernels.runtime.first_use import lazily

if TYPE_CHECKING:
    from lgd_kernels.learn import clip as clip
    from lgd_kernels.learn import diffusers as diffusers
    from lgd_kernels.learn import distributed as distributed
    from lgd_kernels.learn import fit as fit
    from lgd_kernels.learn import logs as logs
    from lgd_kernels.learn import runs as runs
else:
    __getattr__, __dir__ = lazily(__name__, "clip", "diffusers", "distributed", "fit", "logs", "runs")

__all__ = [
    "Frozen",
    "NotFinite",
    "Particles",
    "Settings",
    "Trainer",
    "black_box_reward_loss",
    "curve",
    "draw",
    "guided_score_matching_loss",
    "l2_loss",
    "marginal_loss",
    "particle_energy",
    "reward_loss",
    "sample_s",
    "sample_times",
    "self_consistency_loss",
    "with_reward",
]
