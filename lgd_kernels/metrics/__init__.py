"""Measure how far samples are from data: energy distance, MMD^2 and its test, kernel inception and Frechet distance.

All take features `[n, D]` (or `[n, ...]`): pixels, or the output of a network of your choice.
"""

from lgd_kernels.metrics.bandwidth import median_bandwidth
from lgd_kernels.metrics.distance import energy_distance
from lgd_kernels.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from lgd_kernels.metrics.kid import KID, kernel_inception_distance
from lgd_kernels.metrics.permutation import MMDTest, mmd_test

__all__ = [
    "KID",
    "FeatureStatistics",
    "MMDTest",
    "energy_distance",
    "feature_statistics",
    "frechet_distance",
    "kernel_inception_distance",
    "median_bandwidth",
    "mmd_test",
]
