"""How omega is learned for a frozen denoiser. The names that users need; docs/learning.md is the guide."""

from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.losses import guided_score_matching_loss, l2_loss, self_consistency_loss
from lgd_kernels.learn.objective import particle_energy, sample_times
from lgd_kernels.learn.particles import Particles, curve, draw
from lgd_kernels.learn.reward import black_box_reward_loss, reward_loss, with_reward

__all__ = [
    "Frozen",
    "Particles",
    "black_box_reward_loss",
    "curve",
    "draw",
    "guided_score_matching_loss",
    "l2_loss",
    "particle_energy",
    "reward_loss",
    "sample_times",
    "self_consistency_loss",
    "with_reward",
]
