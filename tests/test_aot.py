"""Every GPU kernel compiles for every target, spills nothing, and reads 16 bytes at a time. No GPU is needed."""

import errno
import importlib
import os
import re
import subprocess
from pathlib import Path

import aot
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.mark.parametrize("gpu", aot.TARGETS)
@pytest.mark.parametrize(
    ("kernel", "variant", "dtype"), [(kernel, *case) for kernel in aot.triton_kernels() for case in aot.cases(kernel)]
)
def test_triton(kernel, variant, dtype, gpu):
    row = aot.compile_triton(kernel, variant, dtype, gpu)
    assert row.spills == 0 and row.registers > 0
    if aot.VARIANTS[variant].shape[1] % 16:
        return  # rows that nothing aligns
    if kernel == "guided_energy_finish_kernel":
        return  # sums of chunks: a few kilobytes
    if kernel in aot.OF_SAMPLES:
        return  # a coordinate to a load in registers; in tiles the width is the layout's that the product wants
    if kernel == "guided_energy_kernel":  # 16 bytes to a thread where it does not draw and one launch does all
        tensors, per_tensor = 3, 4 if dtype == "fp32" or variant == "plain" else 0
    elif kernel == "guided_energy_backward_kernel":  # likewise: four targets and a particle, where it holds targets
        tensors, per_tensor = 7, 1 if dtype == "fp32" or variant == "plain" else 0
    else:
        tensors = 2 if kernel in ("guided_score_kernel", "moments_kernel", "centred_moments_kernel") else 3
        tensors = 1 if kernel.startswith("dynamic_threshold") else tensors
        per_tensor = 1 if dtype == "bf16" else 2  # eight elements to a thread; on gfx942 four, half of them
        if gpu.startswith("gfx"):
            per_tensor, tensors = (1, tensors) if dtype == "fp32" else (0, 0)
    assert row.wide_loads >= tensors * per_tensor, row


def test_waits_where_no_process_can_be_started():
    """Bounded, and only for what passes by itself."""
    refusals = [BlockingIOError(errno.EAGAIN, "fork"), OSError(errno.ENOMEM, "fork")]

    def work():
        if refusals:
            raise refusals.pop()
        return 7

    assert aot.again(work, (0, 0)) == 7
    refusals += [BlockingIOError(errno.EAGAIN, "fork")] * 3
    with pytest.raises(BlockingIOError):
        aot.again(work, (0, 0))
    refusals[:] = [FileNotFoundError(errno.ENOENT, "ptxas"), OSError(errno.EAGAIN, "never asked for")]
    refusals.reverse()
    with pytest.raises(FileNotFoundError):
        aot.again(work, (0, 0))
    assert len(refusals) == 1


def test_a_refused_fork_fails_no_row(monkeypatch, tmp_path):
    """Every tool is refused once."""
    start, refused = subprocess.Popen.__init__, set()

    def once(self, command, *args, **options):
        if command[0] not in refused:
            refused.add(command[0])
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(self, command, *args, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", once)
    monkeypatch.setattr(aot, "PAUSES", (0, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing is compiled already
    kernel = aot.triton_kernels()[0]
    getattr(importlib.import_module("lgd_kernels.ops.combine.triton"), kernel).device_caches.clear()
    assert aot.compile_triton(kernel, *aot.cases(kernel)[0], aot.TARGETS[0]).registers > 0
    assert {Path(tool).name for tool in refused} >= {"ptxas", "cuobjdump"}


def test_cuda():
    rows = aot.cuda_kernels()
    if not rows:
        pytest.skip("lgd_kernels._C_cuda is not built (it needs nvcc at install time)")
    energy = ("few 1x1", "few 2x2", "few 4x1", "few 4x4", "many", "finish", "backward")  # few: particles x targets
    ways = {"guided_score": ("forward", "backward"), "guided_step": ("forward", "backward"), "guided_energy": energy}
    kernels = {f"{op} {way} (CUDA)" for op in ways for way in ways[op]}
    assert {row.kernel for row in rows} == kernels
    for row in rows:
        assert row.spills == 0, row
        tensors = 2 if row.kernel.startswith("guided_score forward") else 3
        expected = tensors * (2 if row.variant == "fp32" else 1)
        if row.kernel.startswith("guided_energy"):  # 16 bytes of each row at a time
            expected = 4
            if sizes := re.search(r"(\d)x(\d)", row.kernel):
                expected = 3 * int(sizes[1]) + int(sizes[2])
        assert row.variant == "mixed" or row.wide_loads >= expected, row
