"""Launches csrc/guided_energy/guided_energy_cuda.cu on the current stream."""

from __future__ import annotations

import torch

from lgd_kernels.ops.guided_energy.targets import KINDS
from lgd_kernels.runtime import impls, memory
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.runtime.memory import with_contiguous_rows, with_particle_rows


def forward(
    loss, slope, statistics, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value,
    seed, seed_value, first_sample, target, kind, k, target_seed, target_seed_value, *options,
):  # fmt: skip
    extension = impls.cuda_extension()
    batch, m = x.shape[:2]
    chunks = extension.guided_energy_chunks(batch, memory.sizes(x)[1] // m)
    parts = statistics.new_empty((batch, chunks, statistics.shape[1]), dtype=torch.float32)
    x, cond, uncond, noise = (with_particle_rows(tensor) for tensor in (x, cond, uncond, noise))
    target = with_particle_rows(target) if kind == "tensor" else with_contiguous_rows(target)
    with memory.current_stream(loss) as stream:
        extension.guided_energy(
            loss, slope, statistics, parts, x, cond, uncond, noise, omega, omega_value, table, levels,
            PREDICTIONS.index(prediction), churn, churn_value, seed, seed_value, first_sample, target,
            KINDS.index(kind), m, k, target_seed, target_seed_value, *options, stream,
        )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_target, to_targets, to_particles, x, cond, uncond, noise, omega, omega_value,
    table, levels, prediction, churn, churn_value, seed, seed_value, first_sample, target, kind, k, *target_seed,
):  # fmt: skip
    m = x.shape[1]
    x, cond, uncond, noise = (with_particle_rows(tensor) for tensor in (x, cond, uncond, noise))
    target = with_particle_rows(target) if kind == "tensor" else with_contiguous_rows(target)
    with memory.current_stream(x) as stream:
        impls.cuda_extension().guided_energy_backward(
            d_x, d_cond, d_uncond, d_noise, d_target, to_targets.contiguous(), to_particles.contiguous(), x, cond,
            uncond, noise, omega, omega_value, table, levels, PREDICTIONS.index(prediction), churn, churn_value, seed,
            seed_value, first_sample, target, KINDS.index(kind), m, k, *target_seed, stream,
        )  # fmt: skip
