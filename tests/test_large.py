"""More than 2^31 elements, and samples more than 2^31 elements apart: every index on the way has 64 bits.

On the CPU the inputs cost nothing: they are one row that stands for all samples (stride 0), or zeros in pages that were
never written, which the system does not store. The output of 4.3 GB is what there is to pay for, so each op runs once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import Levels

LIMIT = 2**31
ROW = 65_537  # prime: nothing is a multiple of a block
BATCH = LIMIT // ROW + 3
AROUND = torch.tensor([0, 1, LIMIT // ROW - 1, LIMIT // ROW, LIMIT // ROW + 1, BATCH - 1])  # 2^31 is in the fourth

# Not in the interpreter, which would take a day.
each_fast_target = pytest.mark.parametrize(
    ("impl", "device"), [("cpu", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)


def need(gigabytes, impl, device):
    """Skip where that much memory, or the implementation, is not available."""
    if impl == "cpu" and impls.extension_error():
        pytest.skip(impls.extension_error())
    if device == "cuda":
        available = torch.cuda.mem_get_info()[0] / 1e9
    else:
        if not Path("/proc/meminfo").exists():
            pytest.skip("cannot tell how much memory is available")
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9
    if available < gigabytes:
        pytest.skip(f"{available:.1f} GB of memory are available on the {device}, {gigabytes} are needed")


def zeros(count, device):
    """Return bfloat16 zeros; on the CPU only pages that are written take memory."""
    if device == "cuda":
        return torch.zeros(count, dtype=torch.bfloat16, device=device)
    try:
        return torch.from_numpy(np.zeros(count, np.int16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip(f"the system does not promise {count * 2 / 1e9:.1f} GB that would not be used")


@each_fast_target
def test_many_samples(impl, device):
    """`guided_step` and its gradient to omega are the same as for those samples alone."""
    need(10, impl, device)
    levels = lgd.RectifiedFlow().levels(torch.linspace(1.0, 0.5, BATCH), torch.linspace(0.0, 0.4, BATCH))
    rows = torch.randn(4, ROW, generator=torch.Generator().manual_seed(0)).bfloat16()

    def step(samples):
        omega = torch.linspace(0.0, 3.0, BATCH)[samples].to(device).requires_grad_()
        x, cond, uncond, upstream = (row.to(device).expand(len(samples), ROW) for row in rows)
        own = Levels(*(level[samples].to(device) for level in levels))
        x_s = lgd.guided_step(x, cond, uncond, omega, own, prediction="flow", impl=impl)
        return x_s.detach(), *torch.autograd.grad(x_s, omega, upstream)

    (large, d_large), (small, d_small) = step(torch.arange(BATCH)), step(AROUND)
    assert large.numel() > LIMIT
    assert torch.equal(large[AROUND.to(device)], small)
    assert torch.equal(d_large[AROUND.to(device)], d_small)


@each_fast_target
def test_one_large_sample(impl, device):
    """`guided_score` of one sample: values around element 2^31 and at the end arrive, and only there."""
    need(10 if device == "cpu" else 16, impl, device)
    count = LIMIT + 12_345
    cond, uncond = zeros(count, device), zeros(count, device)
    for at in (0, LIMIT - 2, count - 2):
        cond[at : at + 2] = torch.tensor([3.0, 5.0])
        uncond[at : at + 2] = torch.tensor([1.0, 6.0])
    guided = lgd.guided_score(cond[None], uncond[None], 0.5, impl=impl)[0]
    for at in (0, LIMIT - 2, count - 2):
        around = slice(max(at - 5000, 0), at + 5000)
        expected = torch.zeros_like(guided[around])
        expected[at - around.start : at - around.start + 2] = torch.tensor([4.0, 4.5])  # 3 + 2 / 2, 5 - 1 / 2
        assert torch.equal(guided[around], expected)


def far_apart(values, device):
    """Return the same values with rows (of one element, for `[B]`) 2^32 + 8 elements apart."""
    stride = 2**32 + 8  # above 2^32: Triton's interpreter misreads an argument between 2^31 and that
    row = values[0].numel()
    storage = zeros((len(values) - 1) * stride + row, device)
    far = storage.as_strided(values.shape, (stride, *values.stride()[1:]))
    return far.copy_(values)


def test_rows_far_apart(target):
    """Two samples whose data lie far apart in memory give the same results as side by side."""
    need(2 if target.device == "cpu" else 70, *target)
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(2, 3000, generator=generator) for _ in range(5)]
    near += [torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])]
    near = [tensor.bfloat16().to(target.device) for tensor in near]
    levels = lgd.RectifiedFlow().levels(torch.tensor([1.0, 0.75]), torch.tensor([0.5, 0.25]))
    levels = Levels(*(level.to(target.device) for level in levels))

    def run(upstream, noise, *inputs):
        *data, omega, churn = inputs
        leaves = [tensor.detach().requires_grad_() for tensor in (*data, omega)]
        guided = lgd.guided_score(*leaves[1:], impl=target.impl)
        stepped = lgd.guided_step(*leaves, levels, churn=churn, noise=noise, impl=target.impl)
        return guided, stepped, *torch.autograd.grad((guided, stepped), leaves, (upstream, upstream))

    far = [far_apart(tensor, target.device) for tensor in near]
    assert all(tensor.stride(0) > 2**32 for tensor in far)
    for found, expected in zip(run(*far), run(*near), strict=True):
        assert torch.equal(found, expected)
