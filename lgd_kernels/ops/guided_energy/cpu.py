"""Launches csrc/guided_energy/*_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.ops.guided_energy.targets import KINDS
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.runtime.memory import with_contiguous_rows, with_particle_rows


def forward(
    loss, slope, statistics, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value,
    seed, seed_value, first_sample, target, kind, k, target_seed, target_seed_value, *options,
):  # fmt: skip
    m = x.shape[1]
    x, cond, uncond, noise = (with_particle_rows(tensor) for tensor in (x, cond, uncond, noise))
    target = with_particle_rows(target) if kind == "tensor" else with_contiguous_rows(target)
    impls.extension().guided_energy(
        loss, slope, statistics, x, cond, uncond, noise, omega, omega_value, table, levels,
        PREDICTIONS.index(prediction), churn, churn_value, seed, seed_value, first_sample, target, KINDS.index(kind),
        m, k, target_seed, target_seed_value, *options, torch.get_num_threads(),
    )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_target, to_targets, to_particles, x, cond, uncond, noise, omega, omega_value,
    table, levels, prediction, churn, churn_value, seed, seed_value, first_sample, target, kind, k, *target_seed,
):  # fmt: skip
    m = x.shape[1]
    x, cond, uncond, noise, d_x, d_cond, d_uncond, d_noise = (
        with_particle_rows(tensor) for tensor in (x, cond, uncond, noise, d_x, d_cond, d_uncond, d_noise)
    )
    target = with_particle_rows(target) if kind == "tensor" else with_contiguous_rows(target)
    impls.extension().guided_energy_backward(
        d_x, d_cond, d_uncond, d_noise, d_target, to_targets.contiguous(), to_particles.contiguous(), x, cond, uncond,
        noise, omega, omega_value, table, levels, PREDICTIONS.index(prediction), churn, churn_value, seed, seed_value,
        first_sample, target, KINDS.index(kind), m, k, *target_seed, torch.get_num_threads(),
    )  # fmt: skip


def curve(found, statistics, shifts, m, k, *options):
    """The loss, or a derivative of it, at shifts [B, K] from where the statistics were taken."""
    impls.extension().energy_curve(found, statistics, shifts, m, k, *options, torch.get_num_threads())
