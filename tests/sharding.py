"""Run energy_mmd of samples in several processes: `torchrun tests/sharding.py FOLDER` saves the results of each."""

import sys
import weakref
from pathlib import Path

import torch
from mmd import KERNELS
from torch import distributed

import lgd_kernels as lgd
from lgd_kernels.learn.distributed import process_group
from lgd_kernels.ops.energy_mmd import sharded as sharded_op
from lgd_kernels.ops.energy_mmd.pieces import Side
from lgd_kernels.ops.energy_mmd.sharded import Parts

CASES = {  # name: (samples of x and y, dimensions, dtype, options)
    "energy": (301, 200, 3, torch.float32, {}),
    "energy, many dimensions": (301, 200, 130, torch.float32, {}),
    "biased": (301, 200, 3, torch.float32, {"unbiased": False}),
    "products": (301, 200, 130, torch.float32, {"precision": "product"}),
    "half": (301, 200, 3, torch.bfloat16, {}),
    "without the target's": (301, 200, 3, torch.float32, {"target_term": False, "beta": 1.75}),
    "few": (5, 3, 2, torch.float64, {}),
    "as many as processes": (4, 4, 2, torch.float64, {"unbiased": False}),
    "lam 0": (70, 90, 5, torch.float64, {"lam": 0.0}),
    "lam 0.5, weights": (70, 90, 5, torch.float64, {"lam": 0.5, "weights": True}),
    "batch, weights": (70, 90, 5, torch.float64, {"weights": True, "batched": True}),
    "large weights": (70, 90, 5, torch.float32, {"weights": 1e36}),  # sums are infinite in float32
    "small weights": (70, 90, 5, torch.float32, {"weights": 1e-30, "batched": True}),  # and squares 0
    "batch": (70, 90, 5, torch.float64, {"batched": True, "kernel": lgd.Gaussian((0.5, 2.0))}),
    "reference": (70, 90, 5, torch.float64, {"impl": "reference"}),
    "narrow": (301, 200, 3, torch.float32, {"kernel": lgd.Gaussian(1e-3)}),  # all is in the pairs with itself
    **{name: (301, 200, 3, torch.float64, {"kernel": kernel}) for name, kernel in KERNELS.items()},
}
WANTED = {"both": (True, True), "x": (True, False), "neither": (False, False)}
BATCH = 3


def inputs(name):
    """Return (x, y, options) of all processes together."""
    n, k, dimension, dtype, options = CASES[name]
    options, generator = dict(options), torch.Generator().manual_seed(n)
    weighted, batch = options.pop("weights", False), (BATCH,) if options.get("batched") else ()
    x, y = (torch.randn(*batch, count, dimension, generator=generator, dtype=torch.float64) for count in (n, k))
    x, y = x.to(dtype), (y + 0.5).to(dtype)
    if weighted:
        options["x_weights"], options["y_weights"] = (
            (weighted * torch.rand(*batch, count, generator=generator, dtype=torch.float64)).to(dtype)
            for count in (n, k)
        )
        options["x_weights"][..., : n // 4] = 0  # of the first of four processes, all
        options["y_weights"][..., 1 - k // 4 :] = 0  # of the last, all but one
    return x, y, options


def part(count, rank, size, even):
    """Return the samples of a process; uneven: the first has half of them, and with four the second none."""
    ends = [count * one // size for one in range(size + 1)]
    if not even:
        ends = [0, count // 2, count] if size == 2 else [0, count // 2, count // 2, count - count // 8, count]
    return slice(ends[rank], ends[rank + 1])


def own(tensor, rank, size, even, batched):
    dimension = 1 if batched else 0
    rows = part(tensor.shape[dimension], rank, size, even)
    return tensor[:, rows] if batched else tensor[rows]


def measured(x, y, wanted, **options):
    """Return [loss, d_x, d_y], for an upstream gradient of 2."""
    x, y = (one.clone().requires_grad_(want) for one, want in zip((x, y), wanted, strict=True))
    loss = lgd.energy_mmd(x, y, **options)
    if any(wanted):
        (2 * loss).sum().backward()
    return [loss.detach(), x.grad, y.grad]


def sharded(name, wanted, even, rank, size, **more):
    x, y, options = inputs(name)
    batched = options.get("batched", False)
    for weights in ("x_weights", "y_weights"):
        if weights in options:
            options[weights] = own(options[weights], rank, size, even, batched)
    x, y = (own(one, rank, size, even, batched) for one in (x, y))
    return measured(x, y, WANTED[wanted], group=distributed.group.WORLD, **options, **more)


def around(rank, size):
    """Return the parts that a process meets, by rank."""
    counts = [5 + one for one in range(size)]
    parts = Parts(distributed.group.WORLD, rank, (counts, counts), (False, False))
    own = Side(torch.full((1, counts[rank], 1), float(rank)), None)
    return [y.points.flatten().tolist() for _, (_, y) in sharded_op._around([own, own], [False, True], parts)]


def held(rank, size, **more):
    """Return how many parts of others a process holds whenever it asks for the next one."""
    found, came, handed_on = [], [], sharded_op._handed_on

    def counted(here, parts):
        found.append(sum(one() is not None for one in came))
        coming, works = handed_on(here, parts)
        came.append(weakref.ref(coming[1][0].untyped_storage()))
        return coming, works

    sharded_op._handed_on = counted
    try:
        sharded("energy", "both", True, rank, size, **more)
    finally:
        sharded_op._handed_on = handed_on
    return found


def refused(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank, size):
    x, group = torch.zeros(3, 2), distributed.group.WORLD
    first, one = rank == 0, torch.tensor([0.0, 3.0, 0.0])
    return {
        "shape": refused(lambda: lgd.energy_mmd(x[:, : 2 - first], x[:, : 2 - first], group=group)),
        "dtype": refused(lambda: lgd.energy_mmd(x.double() if first else x, x, group=group)),
        "lam": refused(lambda: lgd.energy_mmd(x, x, lam=0.5 if first else 1.0, group=group)),
        "kernel": refused(lambda: lgd.energy_mmd(x, x, kernel=lgd.Gaussian(2.0 - first), group=group)),
        "one is wrong": refused(lambda: lgd.energy_mmd(x, x, beta=3.0 if first else 1.0, group=group)),
        "empty": refused(lambda: lgd.energy_mmd(x[:0], x, group=group)),
        "one": refused(lambda: lgd.energy_mmd(x[: int(first)], x, group=group)),
        "weights": refused(lambda: lgd.energy_mmd(x, x, x_weights=x[:, 0] + 1 if first else None, group=group)),
        "no weight": refused(lambda: lgd.energy_mmd(x, x, y_weights=x[:, 0], group=group)),
        "weight of one": refused(lambda: lgd.energy_mmd(x, x, x_weights=one if first else x[:, 0], group=group)),
        "transform": refused(lambda: torch.func.grad(lambda x: lgd.energy_mmd(x, x, group=group))(x)),
    }


def main(folder):
    torch.set_num_threads(1)
    with process_group("gloo"):
        rank, size = distributed.get_rank(), distributed.get_world_size()
        found = {
            (name, wanted, even): sharded(name, wanted, even, rank, size)
            for name in CASES for wanted in WANTED for even in (True, False)
        }  # fmt: skip
        heard = []
        found["progress"] = sharded("energy", "x", False, rank, size, progress=lambda *at: heard.append(at))
        only = "x" if rank == 0 else "neither"
        found["one wants"] = sharded("energy", only, False, rank, size)
        found["around"] = around(rank, size)
        found["held"] = held(rank, size) + held(rank, size, progress=lambda *at: None)
        torch.save((found, heard, refusals(rank, size)), folder / f"{size}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
