"""Compiles every GPU kernel ahead of time, for real targets, without a GPU; `python tests/aot.py` prints the table.

Triton's JIT compiles its kernels from the arguments that their launchers pass, as at a first call on that GPU, with
tensors of the CPU in the place of a GPU's. CUDA kernels are read from the built extension. Registers, spills and widths
of loads are those of the machine code. Each op declares its calls in `tests/ahead/<op>.py`.
"""

from __future__ import annotations

import errno
import functools
import importlib
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor

from lgd_kernels.runtime.arguments import Number, Omega, Seed, StepScalars

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1] / "lgd_kernels"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
BLACKWELL = ("sm_100", "sm_120")  # ptxas takes longest for them: test_aot.py compiles for them under `make slow`
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


PAUSES = (0.5, 1, 2, 4, 8)  # seconds between attempts to start a process


class Variant(NamedTuple):
    """A call, and one that wants every gradient where it is a backward."""

    shape: tuple[int, int]
    omega: str  # "number", "tensor" or "table"
    levels: torch.dtype
    prediction: str
    churn: str  # "number" or "tensor"
    noise: str  # "none", "tensor", "seed" (a number) or "seeds" (one for each sample)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    particles: int = 4  # and targets, where an op has them


VARIANTS = {  # the plainest call, the one with most arguments, and what changes types: levels, seeds, sizes of 1
    "plain": Variant((2, 4096), "number", torch.float32, "x0", "number", "none"),
    "table, drawn": Variant((2, 4096), "table", torch.float32, "v", "tensor", "seed"),
    "float64 levels": Variant((2, 4096), "tensor", torch.float64, "eps", "number", "seeds", ("bf16",)),
    "single elements": Variant((300, 1), "table", torch.float32, "flow", "tensor", "tensor", ("bf16",)),
}


class Inputs:
    """Arguments as a variant wants them: tensors of the CPU in the place of a GPU's."""

    def __init__(self, variant: Variant, dtype: torch.dtype) -> None:
        self.variant, self.dtype, self.shape = variant, dtype, variant.shape
        self.batch = self.shape[0]
        self.numbers = torch.zeros(self.batch)
        self.few = variant.omega == "number"  # as few arguments as there can be
        knots = torch.arange(16.0)
        table = [torch.zeros(8, 16, 16), knots, knots, self.numbers.long(), self.numbers, self.numbers]
        self.omega = {
            "number": Omega(None, 1.5, []),
            "tensor": Omega(self.numbers, 0.0, []),
            "table": Omega(None, 0.0, table),
        }[variant.omega]
        churn = Number(self.numbers, 0.0) if variant.churn == "tensor" else Number(None, 0.5)
        levels = [torch.zeros(self.batch, dtype=variant.levels)] * 5
        self.scalars = StepScalars(self.omega, levels, variant.prediction, churn)
        seeds = {"seed": Seed(None, 1, 0), "seeds": Seed(self.numbers.long(), None, 0)}
        self.seed = seeds.get(variant.noise, Seed(None, None, 0))

    def data(self, *shape: int) -> Tensor:
        return torch.zeros(shape or self.shape, dtype=self.dtype)

    @property
    def noise(self) -> Tensor | None:
        return self.data() if self.variant.noise == "tensor" else None


class Kernel(NamedTuple):
    """How a Triton kernel is compiled: what `CALLS` of `tests/ahead/<op>.py` gives by the kernel's name."""

    launch: Callable[[Inputs], None]  # calls the launcher
    loads: Callable[[str, str, str], int]  # (variant, dtype, target) -> 128-bit loads that there must be
    variants: dict[str, Variant] = VARIANTS


def of_rows(tensors: int) -> Callable[[str, str, str], int]:
    """Return `loads` of a kernel that reads that many tensors, eight elements to a thread; on gfx942 four."""

    def loads(variant: str, dtype: str, target: str) -> int:
        if VARIANTS[variant].shape[1] % 16:  # nothing aligns these rows
            return 0
        if target.startswith("gfx"):
            return tensors if dtype == "fp32" else 0
        return tensors * (2 if dtype == "fp32" else 1)

    return loads


def narrow(variant: str, dtype: str, target: str) -> int:
    """Require no wide loads."""
    return 0


class Compiled(NamedTuple):
    kernel: str
    variant: str
    target: str
    registers: int
    spills: int  # loads and stores of registers that did not fit
    wide_loads: int  # 128 bits


@functools.cache
def declared(op: str) -> ModuleType:
    """Return tests/ahead/<op>.py: `CALLS`, and for CUDA `LOADS`, 128-bit loads by name of a kernel and dtype."""
    return importlib.import_module(f"ahead.{op}")


def triton_kernels() -> dict[str, str]:
    """Return the op of every kernel: the functions of its triton.py whose names end in _kernel."""
    from lgd_kernels.runtime import impls

    ops = (op for op in impls.ops() if "triton" in impls._implementations(op))
    modules = {op: importlib.import_module(f"lgd_kernels.ops.{op}.triton") for op in ops}
    return {name: op for op, module in modules.items() for name in vars(module) if name.endswith("_kernel")}


def kernel_of(name: str) -> Kernel:
    return declared(triton_kernels()[name]).CALLS[name]


def cases(name: str) -> list[tuple[str, str]]:
    """Return (variant, dtype) of the calls that launch a kernel."""
    return [(variant, dtype) for variant, one in kernel_of(name).variants.items() for dtype in one.dtypes]


class AbsentGPU:
    """What Triton's JIT asks a driver for. It keeps kernels by device: this one is named after its target, so that what
    is compiled here is never launched."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        hip = target.startswith("gfx")
        gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        self.get_current_target = lambda: gpu
        self.get_current_device = lambda: target
        self.get_current_stream = lambda device: 0


def compile_triton(kernel: str, variant: str, dtype: str, target: str) -> Compiled:
    """One specialisation."""
    from triton.runtime import JITFunction, driver

    from lgd_kernels.runtime import memory, triton_launch

    built, run = [], JITFunction.run

    def compiled(*to, warmup, **by):
        built.append(again(lambda: run(*to, warmup=True, **by)))  # ptxas is a process of its own

    with (
        mock.patch.object(driver, "_active", AbsentGPU(target)),
        mock.patch.object(JITFunction, "run", compiled),
        mock.patch.object(memory, "on_current_device", lambda tensor: True),
        mock.patch.object(triton_launch, "_truncates", lambda out: False),  # as on a GPU
        mock.patch.object(torch.version, "hip", "7.0" if target.startswith("gfx") else None),
    ):
        one = kernel_of(kernel)
        one.launch(Inputs(one.variants[variant], DTYPES[dtype]))
    found = [resources(one.asm) for one in built if one.name == kernel]
    assert found, [one.name for one in built]
    registers, spills, wide = zip(*found, strict=True)  # a launcher may launch a kernel in several shapes
    return Compiled(kernel, f"{variant}, {dtype}", target, max(registers), sum(spills), min(wide))


def resources(asm: dict) -> tuple[int, int, int]:
    """(registers, spills, wide loads)"""
    if "amdgcn" in asm:
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"])[1])
        spills, wide = (len(re.findall(name, asm["amdgcn"])) for name in (r"\bscratch_(load|store)", "_load_dwordx4"))
        return registers, spills, wide
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    return int(re.search(r"REG:(\d+)", usage)[1]), *accesses(code)


def accesses(sass: str) -> tuple[int, int]:
    """(spills, wide loads). A stack frame alone is no spill: some ptxas reserve one that nothing uses."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass)), len(re.findall(r"\bLDG\.E\.128\b", sass))


def cuda_kernels() -> list[Compiled]:
    """Every kernel and target in lgd_kernels._C_cuda; [] where that was not built."""
    from lgd_kernels.runtime import impls

    module = impls.cuda_extension()
    if module is None:
        return []
    found = []
    usage, code = (
        [part for part in cuobjdump(what, module.__file__).split("\narch = ") if "Function" in part]
        for what in ("-res-usage", "-sass")
    )
    for resources, instructions in zip(usage, code, strict=True):
        target = resources.split()[0]
        found_in = {part.split(maxsplit=1)[0]: accesses(part) for part in instructions.split("Function : ")[1:]}
        for name, registers in re.findall(r"Function (\S+):\s*REG:(\d+)", resources):
            op, length, rest = re.search(r"\d_([a-z]\w+?)_cuda_cu_[0-9a-f]{8}(\d+)(\w+)", name).groups()
            way, rest = rest[: int(length)], rest[int(length) :]
            dtype, sizes = re.match(r"(?:I(f|NS_\w+?)E?((?:Li\d+E)*)E)?", rest).groups()
            dtype = {"f": "fp32", "NS_4bf16": "bf16", "NS_3f16": "fp16"}.get(dtype, "mixed")
            op = op.removesuffix("_backward")  # which has a file of its own
            kernel = " ".join(filter(None, (op, way, "x".join(re.findall(r"\d+", sizes or "")), "(CUDA)")))
            found.append(Compiled(kernel, dtype, target, int(registers), *found_in[name]))
    return found


def cuobjdump(*arguments: str) -> str:
    """CUDA's own, or the one that Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return again(lambda: subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout)


def again(work: Callable[[], T], pauses: Iterable[float] | None = None) -> T:
    """What `work` returns. A machine under load may fail to start a process (EAGAIN, ENOMEM): try again after each of
    the pauses, in seconds."""
    for pause in PAUSES if pauses is None else pauses:
        try:
            return work()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
        time.sleep(pause)
    return work()


def main() -> int:
    import triton

    print(f"Triton {triton.__version__}")
    print(f"{'kernel':30} {'variant':21} {'target':8} {'registers':>9} {'spills':>7} {'128-bit loads':>14}")
    rows = (
        compile_triton(kernel, *case, target)
        for kernel in triton_kernels() for case in cases(kernel) for target in TARGETS
    )  # fmt: skip
    spills = 0
    for row in itertools.chain(rows, cuda_kernels()):
        print(f"{row.kernel:30} {row.variant:21} {row.target:8} {row.registers:9} {row.spills:7} {row.wide_loads:14}")
        spills += row.spills
    return int(spills > 0)


if __name__ == "__main__":
    sys.exit(main())
