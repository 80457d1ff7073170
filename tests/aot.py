"""Compiles every GPU kernel ahead of time, for real targets, without a GPU; `python tests/aot.py` prints the table.

Triton kernels are compiled here; CUDA kernels are read out of the built extension. What comes out is machine code, so
registers, spilled bytes (the stack) and the widths of the loads are facts, not estimates.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("fp32", "bf16")

# What a kernel's parameters are, by name; a tensor of data is one whose stride is a parameter too.
SCALAR_TENSORS = {"signal_t", "noise_t", "signal_s", "noise_s", "gap", "churn", "omega", "values", "s_knots", "t_knots",
                  "s", "t", "d_omega"}  # fmt: skip
VARIANTS = {  # the plainest call, and the one that asks for everything
    "plain": {"OMEGA": 1, "CHURN": 0, "NOISE": 0, "PREDICTION": "x0"},
    "table, drawn": {"OMEGA": 2, "CHURN": 1, "NOISE": 2, "PREDICTION": "v"},
}
ALWAYS = {"KNOTS_S": 16, "KNOTS_T": 16, "ROWS": 1, "BLOCK": 1024, "STREAM": 1, "TO_X": True, "TO_COND": True,
          "TO_UNCOND": True, "TO_NOISE": True, "TO_OMEGA": True}  # fmt: skip


class Compiled(NamedTuple):
    kernel: str
    variant: str
    target: str
    registers: int
    spilled: int  # bytes of stack
    wide_loads: int  # 128 bits


def triton_kernels() -> dict[str, object]:
    """Every kernel of every room's triton.py, by name: the functions whose names end in _kernel."""
    from lgd_kernels import impls

    found = {}
    for room in impls.rooms():
        module = importlib.import_module(f"lgd_kernels.ops.{room}.triton")
        found |= {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    return found


def compile_triton(name: str, variant: str, dtype: str, target: str) -> Compiled:
    """One specialisation: aligned pointers and rows that are a multiple of 16 elements."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_kernels()[name]
    constants = {key: value for key, value in (ALWAYS | VARIANTS[variant]).items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.arg_names):
        data = f"{parameter}_stride" in kernel.arg_names or parameter in ("x_s", "guided")
        data = (data or re.fullmatch("d_(x|cond|uncond|noise)", parameter)) and parameter not in SCALAR_TENSORS
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in ("c", "seed"):
            signature[parameter] = "*i64"
        elif data or parameter in SCALAR_TENSORS:
            signature[parameter] = f"*{dtype if data else 'fp32'}"
        else:
            signature[parameter] = "fp32" if parameter.endswith("_value") else "i32"
        if data or parameter == "row" or parameter.removesuffix("_stride") in ("x", "cond", "uncond", "upstream"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=gpu, options={"num_warps": 4, "enable_fp_fusion": True})
    if gpu.backend == "hip":
        text = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        return Compiled(name, f"{variant}, {dtype}", target, registers, spilled, len(re.findall("_load_dwordx4", text)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(name, f"{variant}, {dtype}", target, registers, spilled, len(re.findall(r"LDG\.E\.128", code)))


def cuda_kernels() -> list[Compiled]:
    """Every kernel and target in lgd_kernels._C_cuda; [] where that was not built."""
    from lgd_kernels import impls

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
        wide = {
            part.split(maxsplit=1)[0]: len(re.findall(r"LDG\.E\.128", part))
            for part in instructions.split("Function : ")[1:]
        }
        for name, registers, spilled in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", resources):
            op, way, dtype = re.search(r"(guided_\w+?)_cuda_cu_\w+?\d(forward|backward)I(.*?)E", name).groups()
            dtype = {"f": "fp32", "NS_4bf16": "bf16", "NS_3f16": "fp16"}.get(dtype, "mixed")
            found.append(Compiled(f"{op} {way} (CUDA)", dtype, target, int(registers), int(spilled), wide[name]))
    return found


def cuobjdump(*arguments: str) -> str:
    """CUDA's own, or the one that Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    rows = [
        compile_triton(name, variant, dtype, target)
        for name in triton_kernels()
        for variant in VARIANTS
        for dtype in DTYPES
        for target in TARGETS
    ]
    print(f"{'kernel':32} {'variant':20} {'target':8} {'registers':>9} {'spilled':>8} {'128-bit loads':>14}")
    for row in rows + cuda_kernels():
        print(f"{row.kernel:32} {row.variant:20} {row.target:8} {row.registers:9} {row.spilled:8} {row.wide_loads:14}")
    return int(any(row.spilled for row in rows))


if __name__ == "__main__":
    sys.exit(main())
