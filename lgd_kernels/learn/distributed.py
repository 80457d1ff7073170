"""Several processes, each with its part of every batch. Noise is drawn by position, so the parts make up the whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


@contextmanager
def process_group(backend: str | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them at the end; alone, do nothing.

        with process_group() as device:
            Trainer(omega.to(device), ...).train(10_000)

    Args:
        backend: "nccl" or "gloo"; by default nccl where there is a GPU.

    Gives the device of this process: its own GPU, or the CPU.

    >>> with process_group() as device:
    ...     rank_and_size()
    (0, 1)
    """
    cuda = torch.cuda.is_available() and backend != "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or distributed.is_initialized():
        yield device
        return
    distributed.init_process_group(backend or ("nccl" if cuda else "gloo"))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Of this process; (0, 1) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def part_of(batch: int) -> slice:
    """This process's items of a batch; sizes differ by one where it does not divide.

    >>> part_of(256)
    slice(0, 256, None)
    """
    rank, size = rank_and_size()
    return slice(batch * rank // size, batch * (rank + 1) // size)


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over processes; alone, the module itself."""
    if rank_and_size()[1] == 1:
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, of one number."""
    if rank_and_size()[1] > 1:
        distributed.all_reduce(value)
    return value
