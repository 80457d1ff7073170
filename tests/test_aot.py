"""Every GPU kernel compiles for every target, spills nothing, and reads 16 bytes at a time. No GPU is needed."""

import errno
import importlib
import os
import subprocess
from pathlib import Path

import aot
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.mark.parametrize(
    "gpu", [pytest.param(gpu, marks=[pytest.mark.slow] if gpu in aot.BLACKWELL else []) for gpu in aot.TARGETS]
)
@pytest.mark.parametrize(
    ("kernel", "variant", "dtype"), [(kernel, *case) for kernel in aot.triton_kernels() for case in aot.cases(kernel)]
)
def test_triton(kernel, variant, dtype, gpu):
    row = aot.compile_triton(kernel, variant, dtype, gpu)
    assert row.spills == 0 and row.registers > 0
    assert row.wide_loads >= aot.kernel_of(kernel).loads(variant, dtype, gpu), row


def test_every_kernel_has_a_call():
    """Each op declares in tests/ahead how its kernels are called."""
    for name, op in aot.triton_kernels().items():
        assert name in aot.declared(op).CALLS


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
    kernel, op = next(iter(aot.triton_kernels().items()))
    getattr(importlib.import_module(f"lgd_kernels.ops.{op}.triton"), kernel).device_caches.clear()
    assert aot.compile_triton(kernel, *aot.cases(kernel)[0], aot.TARGETS[0]).registers > 0
    assert {Path(tool).name for tool in refused} >= {"ptxas", "cuobjdump"}


def test_cuda():
    rows = aot.cuda_kernels()
    if not rows:
        pytest.skip("lgd_kernels._C_cuda is not built (it needs nvcc at install time)")
    declared = {op: getattr(aot.declared(op), "LOADS", {}) for op in aot.triton_kernels().values()}
    loads = {f"{op} {way} (CUDA)": wide for op, ways in declared.items() for way, wide in ways.items()}
    assert {row.kernel for row in rows} == loads.keys()
    for row in rows:
        assert row.spills == 0, row
        expected = 0 if row.variant == "mixed" else loads[row.kernel][row.variant != "fp32"]
        assert row.wide_loads >= expected, row
