"""Fused kernels for learned guidance of diffusion models. `python -m lgd_kernels info` says what runs here."""

from typing import TYPE_CHECKING

from lgd_kernels.guidance.api import guided_score, guided_step
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.ops.dynamic_threshold.api import dynamic_threshold
from lgd_kernels.ops.energy_mmd.api import energy_mmd
from lgd_kernels.ops.energy_mmd.kernels import Energy, Gaussian, Laplace, Polynomial, RationalQuadratic
from lgd_kernels.ops.guided_energy.api import guided_energy, guided_energy_curve
from lgd_kernels.ops.guided_energy.targets import Expected, Renoise
from lgd_kernels.ops.moments.api import moments
from lgd_kernels.runtime.first_use import lazily
from lgd_kernels.runtime.impls import available_impls, why_not
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.runtime.philox import philox_normal
from lgd_kernels.sampling.churn import churn_from_eta
from lgd_kernels.sampling.schedules import EDM, Discrete, RectifiedFlow, Schedule, VPCosine, VPLinear

if TYPE_CHECKING:
    from lgd_kernels import integrations as integrations
    from lgd_kernels import learn as learn
    from lgd_kernels import metrics as metrics
    from lgd_kernels import omega as omega
    from lgd_kernels.guidance import rules as rules
    from lgd_kernels.guidance import weights as weights
    from lgd_kernels.metrics.bandwidth import median_bandwidth as median_bandwidth
    from lgd_kernels.sampling import log_prob as log_prob
    from lgd_kernels.sampling import sampler as sampler
    from lgd_kernels.sampling import solvers as solvers
    from lgd_kernels.sampling.sampler import sample as sample
else:  # if a type checker saw a __getattr__, it would accept every name
    __getattr__, __dir__ = lazily(
        __name__,
        *("integrations", "learn", "metrics", "omega"),
        log_prob="sampling.log_prob",
        median_bandwidth="metrics.bandwidth",
        rules="guidance.rules",
        sample="sampling.sampler",
        sampler="sampling.sampler",
        solvers="sampling.solvers",
        weights="guidance.weights",
    )

__all__ = [
    "EDM",
    "Discrete",
    "Energy",
    "Expected",
    "Gaussian",
    "Laplace",
    "Levels",
    "OmegaTable",
    "Polynomial",
    "RationalQuadratic",
    "RectifiedFlow",
    "Renoise",
    "Schedule",
    "VPCosine",
    "VPLinear",
    "available_impls",
    "churn_from_eta",
    "combine",
    "dynamic_threshold",
    "energy_mmd",
    "guided_energy",
    "guided_energy_curve",
    "guided_score",
    "guided_step",
    "median_bandwidth",
    "moments",
    "philox_normal",
    "why_not",
]
__version__ = "0.1.0"
