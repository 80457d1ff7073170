"""Every GPU kernel compiles for every target, spills nothing, and reads 16 bytes at a time. No GPU is needed."""

import os

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
    if kernel == "guided_energy_kernel":  # 16 bytes to a thread where it does not draw and one launch does all
        tensors, per_tensor = 3, 4 if dtype == "fp32" or variant == "plain" else 0
    else:
        tensors = 2 if kernel == "guided_score_kernel" else 3
        per_tensor = 1 if dtype == "bf16" else 2  # eight elements to a thread; on gfx942 four, half of them
        if gpu.startswith("gfx"):
            per_tensor, tensors = (1, tensors) if dtype == "fp32" else (0, 0)
    assert row.wide_loads >= tensors * per_tensor, row


def test_cuda():
    rows = aot.cuda_kernels()
    if not rows:
        pytest.skip("lgd_kernels._C_cuda is not built (it needs nvcc at install time)")
    assert {row.kernel.removesuffix(" (CUDA)") for row in rows} == {
        f"{op} {way}" for op in ("guided_score", "guided_step") for way in ("forward", "backward")
    }
    for row in rows:
        assert row.spills == 0, row
        tensors = 2 if row.kernel.startswith("guided_score forward") else 3
        expected = 0 if row.variant == "mixed" else tensors * (2 if row.variant == "fp32" else 1)
        assert row.wide_loads >= expected, row
