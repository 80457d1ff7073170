"""Split batches over processes. Noise is drawn by position, so the parts add up to the whole batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

WAIT = timedelta(days=7)


@contextmanager
def process_group(backend: str | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them together at the end; alone, do nothing.

        with process_group() as device:
            Trainer(omega.to(device), ...).train(10_000)

    Args:
        backend: "nccl" or "gloo"; by default nccl if there is a GPU.

    Yields the device of this process: its own GPU, or the CPU. At the end each process waits until all are there, for
    days if one has more to do: torchrun may stop the others once one has left. After an error it does not wait.

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
        all_here = distributed.new_group(backend="gloo", timeout=WAIT)
        yield device
        sys.stdout.flush()
        distributed.barrier(all_here)
    finally:
        distributed.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) for a single process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def part_of(batch: int) -> slice:
    """Return this process's items of a batch; the sizes of the parts differ by at most one.

    >>> part_of(256)
    slice(0, 256, None)
    """
    rank, size = rank_and_size()
    return slice(batch * rank // size, batch * (rank + 1) // size)


def parallel(module: nn.Module) -> nn.Module:
    """Return the module with gradients averaged over processes; in a single process, the module itself."""
    if rank_and_size()[1] == 1:
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def total(value: Tensor) -> Tensor:
    """Return the sum of one number over all processes."""
    if rank_and_size()[1] > 1:
        distributed.all_reduce(value)
    return value
