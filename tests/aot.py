"""Compiles every GPU kernel ahead of time, for real targets, without a GPU; `python tests/aot.py` prints the table.

Triton's kernels are compiled by its JIT from what their launchers pass, as at a first call on that GPU, with tensors of
the CPU in the place of a GPU's; CUDA kernels are read out of the built extension. What comes out is machine code, so
registers, spills and the widths of the loads are facts, not estimates.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest import mock

import torch

from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward
from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward
from lgd_kernels.runtime.arguments import Number, Omega, Seed, StepScalars
from lgd_kernels.runtime.columns import triangle

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1] / "lgd_kernels"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


PAUSES = (0.5, 1, 2, 4, 8)  # seconds between attempts to start a process


class Variant(NamedTuple):
    """A call: one that wants every gradient, where it is of a backward."""

    shape: tuple[int, int]
    omega: str  # "number", "tensor" or "table"
    levels: torch.dtype
    prediction: str
    churn: str  # "number" or "tensor"
    noise: str  # "none", "tensor", "seed" (a number) or "seeds" (one for each sample)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    particles: int = 0  # m and k, where only rooms that have them take the variant; else these take 4
    samples: int = 0  # of a row each: only kernels of samples take the variant, and no other


VARIANTS = {  # the plainest call, the one that asks for most, and what changes the types: levels, seeds, sizes of 1
    "plain": Variant((2, 4096), "number", torch.float32, "x0", "number", "none"),
    "table, drawn": Variant((2, 4096), "table", torch.float32, "v", "tensor", "seed"),
    "float64 levels": Variant((2, 4096), "tensor", torch.float64, "eps", "number", "seeds", ("bf16",)),
    "single elements": Variant((300, 1), "table", torch.float32, "flow", "tensor", "tensor", ("bf16",)),
    "16 particles": Variant((2, 4096), "number", torch.float32, "x0", "number", "none", particles=16),
    "16 particles, drawn": Variant((2, 4096), "number", torch.float32, "x0", "number", "seed", ("bf16",), 16),
    "samples in 2": Variant((1, 2), "number", torch.float32, "x0", "number", "none", samples=300),
    "samples in 2048": Variant((1, 2048), "number", torch.float32, "x0", "number", "none", ("bf16",), samples=300),
}
OF_PARTICLES = ("guided_energy",)
OF_SAMPLES = {"energy_mmd_points_kernel": "samples in 2", "energy_mmd_pairs_kernel": "samples in 2048",
              "energy_mmd_turn_kernel": "samples in 2048"}  # fmt: skip


class Compiled(NamedTuple):
    kernel: str
    variant: str
    target: str
    registers: int
    spills: int  # loads and stores of registers that did not fit
    wide_loads: int  # 128 bits


def triton_kernels() -> list[str]:
    """Every kernel of every room that offers Triton: the functions of its triton.py whose names end in _kernel."""
    from lgd_kernels.runtime import impls

    rooms = (room for room in impls.rooms() if "triton" in impls._implementations(room))
    modules = (importlib.import_module(f"lgd_kernels.ops.{room}.triton") for room in rooms)
    return [name for module in modules for name in vars(module) if name.endswith("_kernel")]


def cases(kernel: str) -> list[tuple[str, str]]:
    """(variant, dtype) of the calls that launch `kernel`."""
    takes = kernel.startswith(OF_PARTICLES)
    names = [name for name, one in VARIANTS.items() if not one.samples and (takes or not one.particles)]
    names = [OF_SAMPLES[kernel]] if kernel in OF_SAMPLES else names
    return [(name, dtype) for name in names for dtype in VARIANTS[name].dtypes]


def launch(kernel: str, variant: Variant, dtype: torch.dtype) -> None:
    """The call of a launcher that launches `kernel`."""
    room, backward = re.fullmatch(
        r"(?:centred_)?(\w+?)(_backward|_finish|_points|_pairs|_turn|_select)?_kernel", kernel
    ).groups()
    batch, data = variant.shape[0], lambda: torch.zeros(variant.shape, dtype=dtype)
    numbers = torch.zeros(batch)
    knots = torch.arange(16.0)
    table = [torch.zeros(8, 16, 16), knots, knots, numbers.long(), numbers, numbers]
    omega = {"number": (None, 1.5, []), "tensor": (numbers, 0.0, []), "table": (None, 0.0, table)}[variant.omega]
    churn = (numbers, 0.0) if variant.churn == "tensor" else (None, 0.5)
    step = [torch.zeros(batch, dtype=variant.levels)] * 5, variant.prediction, *churn
    noise = data() if variant.noise == "tensor" else None
    seed = {"seed": (None, 1), "seeds": (numbers.long(), None)}.get(variant.noise, (None, None))
    launcher = importlib.import_module(f"lgd_kernels.ops.{room}.triton")
    scalars = StepScalars(Omega(*omega), step[0], step[1], Number(*churn))
    if kernel == "guided_score_kernel":
        launcher.forward(data(), GuidedScore(data(), data(), Omega(*omega)))
    elif kernel == "guided_score_backward_kernel":
        launcher.backward(
            (data(), data(), numbers),
            GuidedScoreBackward(data(), data(), data(), Omega(*omega), dtype, dtype, [True] * 3),
        )
    elif kernel == "guided_step_kernel":
        launcher.forward(data(), GuidedStep(data(), data(), data(), noise, scalars, Seed(*seed, 0)))
    elif kernel == "guided_step_backward_kernel":
        launcher.backward(
            (data(), data(), data(), data(), numbers),
            GuidedStepBackward(data(), data(), data(), scalars, dtype, dtype, dtype, [True] * 5),
        )
    elif room == "moments":  # c, u and c - u; or all that a combine's backward may ask for, with a source
        few = variant.omega == "number"
        columns = [0, -1, 1, -1, 0, 1] if few else [n for k in range(5) for n in (k, -1)]
        size = len(columns) // 2
        pairs = [n for i in range(size) for j in range(size) for n in (i, j)] + [
            n for i in range(size) for n in (i, -1)
        ]
        tensors = [data() for _ in range(2 if few else 5)]
        if kernel == "centred_moments_kernel":
            return launcher.centred(torch.zeros(batch, len(pairs) // 2, dtype=torch.float64), tensors, columns)
        found = torch.zeros(batch, len(pairs) // 2)
        launcher.forward(found, tensors, columns, pairs, None if few else numbers.long(), 2)
    elif room == "combine":
        few, columns = variant.omega == "number", [0, -1, 1, -1, 1, 2]
        count = 1 if few else 3
        scalars = torch.zeros(batch, count, 3), columns, *(None if few else torch.zeros(batch, count) for _ in range(2))
        seed = seed if seed != (None, None) or few else (None, 1)
        source = None if few else numbers.long()
        outputs = torch.zeros((count, *variant.shape), dtype=dtype)
        sums = torch.zeros(batch, len(triangle(count)) // 2)
        # without moments and with them, in float32 and in float64, of one output that is not written, or of three
        for found in (None, sums, sums.double()):
            written = outputs if found is None or not few else outputs[:0]
            launcher.forward(written, [data() for _ in range(3)], *scalars, *seed, 0, source, -1.0, 1.0, found)
    elif room == "dynamic_threshold":
        launcher.forward(data(), torch.zeros(batch, 2), data(), variant.shape[1] // 2, 0.5, math.inf)
    elif room == "energy_mmd":
        x, y = (torch.zeros((1, variant.samples, variant.shape[1]), dtype=dtype) for _ in range(2))
        slopes, loss = (torch.zeros(x.shape) for _ in range(2)), torch.zeros(1, dtype=torch.float64)
        launcher.forward(loss, *slopes, x, y, None, None, "energy", [1.0], 1.0, True, True, None)
    elif room == "guided_energy":
        m = variant.particles or 4
        data = torch.zeros((batch, m, *variant.shape[1:]), dtype=dtype)
        kind = {"none": "tensor", "tensor": "expected"}.get(variant.noise, "renoise")
        target, k = (data, m) if kind == "tensor" else (data[:, 0].contiguous(), 1 if kind == "expected" else m)
        noise = data if variant.noise == "tensor" else None
        pairs = m * (m - 1) // 2
        given = data, data, data, noise, *omega, *step, *seed, 0, target, kind, k, *seed
        if kernel == "guided_energy_backward_kernel":
            weights = torch.zeros((batch, m, k), dtype=torch.float64), torch.zeros((batch, pairs), dtype=torch.float64)
            launcher.backward(data, data, data, noise, target, *weights, *given)
        else:
            found = torch.zeros((batch, 2 * m * k + m + 3 * pairs), dtype=torch.float64)
            launcher.forward(numbers, numbers, found, *given, 1.75, 1.0, True)
    else:
        raise NotImplementedError(f"aot.launch does not know how {kernel} is called")


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

    from lgd_kernels.runtime import triton_launch, triton_old

    built, run = [], JITFunction.run

    def compiled(*to, warmup, **by):
        built.append(again(lambda: run(*to, warmup=True, **by)))  # ptxas is a process of its own

    with (
        mock.patch.object(driver, "_active", AbsentGPU(target)),
        mock.patch.object(JITFunction, "run", compiled),
        mock.patch.object(triton_launch, "_on_current_device", lambda tensor: True),
        mock.patch.object(triton_old, "_truncates", lambda out: False),  # as on a GPU
        mock.patch.object(torch.version, "hip", "7.0" if target.startswith("gfx") else None),
    ):
        launch(kernel, VARIANTS[variant], DTYPES[dtype])
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
    return int(re.search(r"REG:(\d+)", usage)[1]), *memory(code)


def memory(sass: str) -> tuple[int, int]:
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
        accesses = {part.split(maxsplit=1)[0]: memory(part) for part in instructions.split("Function : ")[1:]}
        for name, registers in re.findall(r"Function (\S+):\s*REG:(\d+)", resources):
            op, way, dtype, sizes = re.search(
                r"(guided_\w+?)_cuda_cu_\w+?\d(forward|backward|few|many|finish)(?:I(f|NS_\w+?)E?((?:Li\d+E)*)E)?", name
            ).groups()
            dtype = {"f": "fp32", "NS_4bf16": "bf16", "NS_3f16": "fp16"}.get(dtype, "mixed")
            op = op.removesuffix("_backward")  # which has a file of its own
            kernel = " ".join(filter(None, (op, way, "x".join(re.findall(r"\d+", sizes or "")), "(CUDA)")))
            found.append(Compiled(kernel, dtype, target, int(registers), *accesses[name]))
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
