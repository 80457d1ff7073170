"""Launch csrc/guided_energy/guided_energy_cuda.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_energy.structs import EnergyCall, GuidedEnergyBackward
from lgd_kernels.runtime import impls, memory


def forward(outputs: tuple[Tensor, Tensor, Tensor], a: EnergyCall) -> None:
    extension, statistics = impls.cuda_extension(), outputs[2]
    batch, elements = memory.sizes(a.forward.x)
    chunks = extension.guided_energy_chunks(batch, elements // a.forward.x.shape[1])
    parts = statistics.new_empty((batch, chunks, statistics.shape[1]), dtype=torch.float32)
    memory.launch_cuda(extension.guided_energy, (*outputs, parts), a, like=statistics)


def backward(grads: tuple[Tensor | None, ...], b: GuidedEnergyBackward) -> None:
    memory.launch_cuda(impls.cuda_extension().guided_energy_backward, grads, b, like=b.forward.x)
