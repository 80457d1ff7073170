"""Translate PTX, as nvcc writes it for the CUDA kernels, to C++, which the simulator runs (simulated.py, cuda/ptx.h).

So a CPU runs the instructions that nvcc chose: what it rounds once, its conversions and its wide loads. A kernel or a
function becomes a function of C++ whose variables are the registers. `Unknown` names what is not translated.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import simulated
from filelock import FileLock

NVCC = os.environ.get("NVCC") or "nvcc"
NVCC_FLAGS = ("-ptx", "-std=c++17", "-O3")  # as in setup.py
ARCHITECTURE = 90

# The type in C++ of a PTX type.
TYPES = {f"{kind}{bits}": f"{name}{bits}_t" for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
         for bits in (8, 16, 32, 64)} | {"f32": "float", "f64": "double", "pred": "bool"}  # fmt: skip
SPECIAL = {f"%{name}.x": f"simulator::running->{member}.x" for name, member in
           (("tid", "thread"), ("ctaid", "block"), ("nctaid", "blocks"), ("ntid", "threads"))}  # fmt: skip

FLOAT, INTEGER, ANY = r"(?:f32|f64)", r"(?:[us](?:8|16|32|64))", r"(?:[busf](?:16|32|64))"
REAL, WHOLE, BITS = rf"\.(?P<t>{FLOAT})", rf"\.(?P<t>{INTEGER})", r"\.(?P<t>b16|b32|b64|pred)"

# Instructions that compute a value: the opcode, the value, and its type if that is not `t`, the type of the operands.
# {a} is the first operand, {a:u32} the first as u32; for u it is unsigned, for w it becomes twice as wide.
RULES = [
    (rf"mov\.(?P<t>{ANY}|pred)", "{a}"),
    (r"cvta(?:\.to)?\.(?:global|local)\.(?P<t>u64)", "{a}"),  # an address is one of the CPU
    (rf"add(?:\.rn)?{REAL}", "{a} + {b}"),
    (rf"sub(?:\.rn)?{REAL}", "{a} - {b}"),
    (rf"mul(?:\.rn)?{REAL}", "{a} * {b}"),
    (rf"div\.rn{REAL}", "{a} / {b}"),
    (rf"rcp\.rn{REAL}", "1 / {a}"),
    (rf"sqrt\.rn{REAL}", "std::sqrt({a})"),
    (rf"fma\.rn{REAL}", "std::fma({a}, {b}, {c})"),
    (rf"neg{REAL}", "-{a}"),
    (rf"abs{REAL}", "std::fabs({a})"),
    (rf"(?P<name>min|max){REAL}", "ptx::{name}({a}, {b})"),
    (r"rcp\.approx\.ftz\.(?P<t>f64)", "ptx::rough_reciprocal({a})"),
    (rf"add{WHOLE}", "{a:u} + {b:u}"),
    (rf"sub{WHOLE}", "{a:u} - {b:u}"),
    (rf"neg{WHOLE}", "0u - {a:u}"),
    (rf"mul\.lo{WHOLE}", "1u * {a:u} * {b:u}"),  # without 1u, an int would overflow
    (rf"mad\.lo{WHOLE}", "1u * {a:u} * {b:u} + {c:u}"),
    (r"mul\.wide\.(?P<t>[us](?:16|32))", "{a:w} * {b:w}", "w"),
    (r"mul\.hi\.(?P<t>[us]32)", "({a:w} * {b:w}) >> 32"),
    (rf"div{WHOLE}", "{a} / {b}"),
    (rf"rem{WHOLE}", "{a} % {b}"),
    (rf"min{WHOLE}", "{a} < {b} ? {a} : {b}"),
    (rf"max{WHOLE}", "{a} > {b} ? {a} : {b}"),
    (rf"and{BITS}", "{a} & {b}"),
    (rf"or{BITS}", "{a} | {b}"),
    (rf"xor{BITS}", "{a} ^ {b}"),
    (r"not\.(?P<t>b16|b32|b64)", "~{a}"),
    (r"not\.(?P<t>pred)", "!{a}"),
    (rf"(?P<name>shl|shr)\.(?P<t>{ANY})", "ptx::{name}({a}, {b:u32})"),
    (rf"selp\.(?P<t>{ANY})", "{c:pred} ? {a} : {b}"),
    (rf"cvt\.(?P<to>{INTEGER})\.(?P<t>{INTEGER})", "{a}", "to"),
    (rf"cvt\.sat\.(?P<to>{INTEGER})\.(?P<t>{INTEGER})", "ptx::saturated<{type}>({a})", "to"),
    (rf"cvt\.rn\.(?P<to>{FLOAT})\.(?P<t>{INTEGER})", "({type}){a}", "to"),
    (r"cvt\.rn\.(?P<to>f32)\.(?P<t>f64)", "(float){a}", "to"),
    (r"cvt\.(?P<to>f64)\.(?P<t>f32)", "(double){a}", "to"),
    (r"cvt\.(?P<to>f32)\.f16(?P<t>)", "ptx::from_half({a:b16})", "to"),
    (r"cvt\.(?P<to>f32)\.bf16(?P<t>)", "ptx::from_bfloat({a:b16})", "to"),
    (r"cvt\.rn\.f16\.(?P<t>f32)", "ptx::to_half({a})", "b16"),
    (r"cvt\.rn\.bf16\.(?P<t>f32)", "ptx::to_bfloat({a})", "b16"),
]  # fmt: skip
# Conversions to whole numbers: to the nearest, ties to even; towards 0; down; up.
for _how, _function in (("rni", "nearbyint"), ("rzi", "trunc"), ("rmi", "floor"), ("rpi", "ceil")):
    RULES += [
        (rf"cvt\.{_how}\.(?P<t>{FLOAT})\.(?P=t)", f"std::{_function}({{a}})"),
        (rf"cvt\.{_how}\.(?P<to>{INTEGER}){REAL}", f"ptx::to_integer<{{type}}>(std::{_function}({{a}}))", "to"),
    ]
# With NaN, a comparison is false, or true if its name ends in u.
ORDERED = {"eq": "{a} == {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}"}
OF_FLOATS = {**ORDERED, "ne": "({a} < {b} || {a} > {b})", "equ": "!({a} < {b} || {a} > {b})", "neu": "{a} != {b}",
             "ltu": "!({a} >= {b})", "leu": "!({a} > {b})", "gtu": "!({a} <= {b})", "geu": "!({a} < {b})",
             "num": "({a} == {a} && {b} == {b})", "nan": "({a} != {a} || {b} != {b})"}  # fmt: skip
OF_INTEGERS = {**ORDERED, "ne": "{a} != {b}", "lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}",
               "hs": "{a} >= {b}"}  # fmt: skip
RULES += [
    (rf"setp\.{name}(?:\.(?P<with>and|or|xor))?\.(?P<t>{types})", value, "pred")
    for types, comparisons in ((FLOAT, OF_FLOATS), (r"[bus](?:16|32|64)", OF_INTEGERS))
    for name, value in comparisons.items()
]
WITH = {"and": "&&", "or": "||", "xor": "!="}

FUNCTION = re.compile(
    r"(?s)\.(?:entry|func)\s*(?:\((?P<results>[^()]*)\)\s*)?(?P<name>[$\w]+)\s*\((?P<parameters>[^()]*)\)"
    r"(?:\s*\.\w+(?:\s+\d+(?:,\s*\d+)*)?)*\s*\{(?P<body>.*?)\n\}"
)
TOKEN = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?=\s)|(?P<statement>[^;{}\s][^;]*)(?:;|$))")
VARIABLE = re.compile(r"\.(?:shared|local|param)\s+(?:\.align\s+(\d+)\s+)?\.([busf]\d+)\s+([$\w]+)(?:\[(\d+)\])?")
ACCESS = re.compile(r"(ld|st)\.(param|local|global|shared)(?:\.nc)?(?:\.v[24])?\.(?P<t>[busf]\d+)")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
SHUFFLE = re.compile(r"shfl\.sync\.(?P<kind>up|down|bfly|idx)\.(?P<t>b32)")


class Unknown(Exception):
    """PTX that is not translated."""


class Variable(NamedTuple):
    """Memory with a name."""

    name: str
    bytes: int
    alignment: int


def bits(type: str) -> int:
    return int(type.lstrip("busf"))


def split(operands: str) -> list[str]:
    """Return what commas separate outside of braces, brackets and parentheses."""
    return [one.strip() for one in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|\([^)]*\)|[^,{[(])+", operands)]


def variables(text: str) -> list[Variable]:
    """Return the variables that a text declares."""
    return [
        Variable(name, bits(type) // 8 * int(count or 1), int(alignment or bits(type) // 8))
        for alignment, type, name, count in VARIABLE.findall(text)
    ]


def shared_variables(text: str) -> list[Variable]:
    return variables("".join(re.findall(r"\.shared[^;]*;", text)))


def lay_out(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Return the offset of each shared variable, and the bytes of all."""
    offsets, top = {}, 0
    for one in variables:
        offsets[one.name] = -(-top // one.alignment) * one.alignment
        top = offsets[one.name] + one.bytes
    return offsets, top


@functools.cache
def rule(opcode: str) -> tuple[str, dict[str, str], str] | None:
    """Return the value that an opcode computes, the parts of its name, and the type of the value."""
    for pattern, value, *result in RULES:
        if found := re.fullmatch(pattern, opcode):
            parts = found.groupdict()
            type = result[0] if result else "t"
            wide = parts["t"][:1] + str(2 * bits(parts["t"])) if type == "w" else ""
            return value, parts, wide or parts.get(type, type)
    return None


class Operand:
    """An operand, to be formatted as a type: that of the instruction if no other is named."""

    def __init__(self, function: Function, text: str, type: str):
        self.function, self.text, self.type = function, text, type

    def __format__(self, wanted: str) -> str:
        if wanted == "w":
            wide = TYPES[self.type[0] + str(2 * bits(self.type))]
            return f"({wide}){self.function.read(self.text, self.type)}"
        return self.function.read(self.text, "u" + self.type[1:] if wanted == "u" else wanted or self.type)


class Function:
    """A kernel or a function of PTX, of which `cpp` is the translation."""

    def __init__(self, found: re.Match, file: str, shared: list[Variable]):
        self.name, self.file, body = found["name"], file, found["body"]
        self.line = found.string.count("\n", 0, found.start("body")) + 1
        parameters = variables(f"{found['results'] or ''}, {found['parameters']}")
        self.memory = {one.name for one in parameters}  # variables whose address is one of the CPU
        self.shared, size = lay_out([*(one for one in shared if one.name in body), *shared_variables(body)])
        self.registers: dict[str, str] = {}
        self.head = f"void {self.name}(char* const* parameters)"
        lines = [f"{self.head} {{", f'  constexpr auto file = "{file}";']
        lines += [f"  char* const {one.name} = parameters[{i}];" for i, one in enumerate(parameters)]
        if self.shared:
            lines += ["  static const char site = 0;", f"  const ptx::Shared shared(&site, {size});"]
        self.cpp = "\n".join([*lines, *self.translated(body), "}"])

    def translated(self, body: str) -> Iterator[str]:
        """Yield lines of C++."""
        end = 0
        for token in TOKEN.finditer(body):
            self.line += body.count("\n", end, token.start(token.lastgroup or 0))
            end = token.start(token.lastgroup or 0)
            if token["statement"]:
                yield "  " + self.statement(token["statement"])
            else:
                yield token["brace"] or f"{token['label']}:;"

    def unknown(self, what: str) -> Unknown:
        return Unknown(f"{self.file}:{self.line}: {what}")

    def statement(self, text: str) -> str:
        if text.startswith("."):
            return self.directive(text)
        guard, opcode, operands = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
        made = self.instruction(opcode, split(operands))
        if made is None:
            raise self.unknown(text)
        return f"if ({guard.replace('%', '')}) {{ {made} }}" if guard else made

    def directive(self, text: str) -> str:
        """Declare registers or memory."""
        if registers := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?", text):
            type, name, count = registers.groups()
            names = [name + str(i) for i in range(int(count))] if count else [name]
            if type not in TYPES:
                raise self.unknown(text)
            self.registers.update(dict.fromkeys(names, type))
            return f"{TYPES[type]} {', '.join(one.lstrip('%') + '{}' for one in names)};"
        if text.startswith((".local", ".param")) and (found := variables(text)):
            self.memory.add(found[0].name)
            return f"alignas({found[0].alignment}) char {found[0].name}[{found[0].bytes}];"
        if text.startswith((".shared", ".pragma")):
            return ""
        raise self.unknown(text)

    def instruction(self, opcode: str, operands: list[str]) -> str | None:
        """Return an instruction in C++, or None if there is none."""
        if opcode in ("bra", "bra.uni"):
            return f"goto {operands[0]};"
        if opcode == "ret":
            return "return;"
        if opcode == "bar.sync" and operands == ["0"]:
            return f"simulator::barrier({{file, {self.line}}});"
        if opcode == "call.uni":
            results, called, given = operands
            return f"{{ char* const given[] = {{{results.strip('()')}, {given.strip('()')}}}; {called}(given); }}"
        if found := SHUFFLE.fullmatch(opcode):
            return self.shuffle(found["kind"], operands)
        if found := ACCESS.fullmatch(opcode):
            return self.access(found[1], found[2], found["t"], operands)
        if opcode.startswith("mov.") and operands[0].startswith("{"):
            return self.unpack(opcode[4:], *operands)
        if opcode.startswith("mov.") and operands[1].startswith("{"):
            return self.pack(opcode[4:], *operands)
        return self.compute(*found, operands) if (found := rule(opcode)) else None

    def compute(self, value: str, parts: dict[str, str], type: str, operands: list[str]) -> str:
        to, *given = operands
        read = {name: Operand(self, text, parts["t"]) for name, text in zip("abc", given, strict=False)}
        result = value.format(**read, type=TYPES[type], name=parts.get("name"))
        other = f"{WITH[parts['with']]} {read['c']:pred}" if parts.get("with") else ""
        to, _, opposite = to.partition("|")
        if not opposite:
            return self.write(to, f"({result}) {other}" if other else result, type)
        return f"{self.write(to, f'({result}) {other}', type)} {self.write(opposite, f'!({result}) {other}', type)}"

    def pack(self, type: str, to: str, parts: str) -> str:
        """Return a move of parts into one register, the first to the low end."""
        whole, given = f"u{bits(type)}", split(parts.strip("{}"))
        part = bits(type) // len(given)
        values = [f"({TYPES[whole]}){self.read(one, f'b{part}')} << {i * part}" for i, one in enumerate(given)]
        return self.write(to, " | ".join(values), whole)

    def unpack(self, type: str, parts: str, value: str) -> str:
        whole, to = self.read(value, f"u{bits(type)}"), split(parts.strip("{}"))
        part = bits(type) // len(to)
        return " ".join(self.write(one, f"{whole} >> {i * part}", f"u{part}") for i, one in enumerate(to))

    def access(self, way: str, space: str, type: str, operands: list[str]) -> str:
        """Return a load or a store of one value or of a vector."""
        names, address = operands if way == "ld" else reversed(operands)
        parts, size, where = split(names.strip("{}")), bits(type) // 8, "shared." if space == "shared" else "ptx::"
        found = ADDRESS.fullmatch(address)
        if not found or (space == "shared" and not self.shared):
            raise self.unknown(address)
        place = f"{self.read(found[1], 'u32' if space == 'shared' else 'u64')} + {found[2] or 0}"
        if way == "ld":
            moved = [self.write(one, f"ptx::load<{TYPES[type]}>(at + {i * size})", type) for i, one in enumerate(parts)]
        else:
            values = [f"{i * size}, {self.read(one, type)}" for i, one in enumerate(parts)]
            moved = [f"ptx::store<{TYPES[type]}>(at + {value});" for value in values]
        at = f"{where}at<{size * len(parts)}>({place}, {{file, {self.line}}})"
        return f"{{ char* const at = {at}; {' '.join(moved)} }}"

    def shuffle(self, kind: str, operands: list[str]) -> str:
        to, *given = operands
        word, by, within, mask = (self.read(one, "u32") for one in given)
        value = f"ptx::shuffle(ptx::Shuffle::{kind}, {word}, {by}, {within}, {mask}, &inside, {{file, {self.line}}})"
        to, _, inside = to.partition("|")
        return f"{{ bool inside; {self.write(to, value, 'u32')} {self.write(inside or '_', 'inside', 'pred')} }}"

    def read(self, text: str, type: str) -> str:
        """Return an operand as a value of a type."""
        if text in self.registers:
            return self.convert(text.lstrip("%"), self.registers[text], type, text)
        if text in SPECIAL:
            return self.convert(SPECIAL[text], "u32", type, text)
        if text in self.shared:
            return self.convert(str(self.shared[text]), "u64", type, text)
        if text in self.memory:
            return self.convert(f"(uint64_t){text}", "u64", type, text)
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]{8,16})", text):
            have, literal = ("u32", "u") if found[1] == "f" else ("u64", "ull")
            return self.convert(f"0x{found[2]}{literal}", have, type, text)
        if re.fullmatch(r"-?\d+|0[xX][0-9A-Fa-f]+", text) and type[0] in "bus":
            return f"({TYPES[type]}){int(text, 0) % 2 ** bits(type):#x}ull"
        raise self.unknown(text)

    def write(self, to: str, value: str, type: str) -> str:
        """Assign a value of a type to a register, which may be wider."""
        if to == "_":
            return ""
        have = self.registers.get(to)
        if have is None:
            raise self.unknown(to)
        if TYPES[have] == TYPES[type] or (have[0] in "bus" and type[0] in "bus" and bits(have) == bits(type)):
            return f"{to.lstrip('%')} = {value};"
        return f"{to.lstrip('%')} = {self.convert(f'({TYPES[type]})({value})', type, have, to, widens=True)};"

    def convert(self, value: str, have: str, wanted: str, text: str, widens: bool = False) -> str:
        """Return a value of the type `have` as one of the type `wanted`: its bits, or fewer, or, if it widens, more."""
        if TYPES[have] == TYPES[wanted]:
            return value
        if "pred" not in (have, wanted):
            if have[0] in "bus" and wanted[0] in "bus" and (widens or bits(wanted) <= bits(have)):
                return f"({TYPES[wanted]}){value}"
            if bits(have) == bits(wanted):
                return f"__builtin_bit_cast({TYPES[wanted]}, {value})"
        raise self.unknown(f"{text}, a {have}, as {wanted}")


def translate(text: str, file: str) -> tuple[str, list[str]]:
    """Return the functions of a PTX file in C++, and the names of its kernels."""
    text = re.sub(r"//.*", "", text)
    shared = shared_variables(FUNCTION.sub("", text))
    functions = [Function(found, file, shared) for found in FUNCTION.finditer(text)]
    code = "\n".join([*(f"{one.head};" for one in functions), *(one.cpp for one in functions)])
    return code, re.findall(r"\.entry\s+([$\w]+)", text)


def missing() -> str:
    """Return why nothing can be translated here, or ""."""
    return simulated.missing() or ("" if shutil.which(NVCC) else f"{NVCC} was not found")


def compiled(source: Path, architecture: int = ARCHITECTURE) -> str:
    """Return the PTX of a CUDA source, cached by a digest of what it is made of."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    headers = (path.read_bytes() for path in sorted(source.parents[1].glob("*/*h")))
    made = simulated.digest(version, *NVCC_FLAGS, str(architecture), source.read_bytes(), *headers)
    path = simulated.CACHE / f"{source.stem}-{made}.ptx"
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        simulated.run([NVCC, *NVCC_FLAGS, f"-arch=compute_{architecture}", str(source), "-o", str(unfinished)])
        unfinished.rename(path)
    return path.read_text()


def unit(source: Path, text: str) -> Path:
    """Write a CUDA source as C++ whose kernels are those of its PTX."""
    made = simulated.digest(text, *(path.read_bytes() for path in (source, simulated.CUDA / "ptx.h", Path(__file__))))
    path = simulated.CACHE / f"{source.stem}-{made}.cpp"
    if path.is_file():
        return path
    code, kernels = translate(text, f"{source.stem}.ptx")
    readable = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    entries = []
    for mangled, kernel in zip(kernels, readable.replace("(anonymous namespace)::", "").splitlines(), strict=True):
        name, parameters = kernel.removeprefix("void ").rstrip(")").split("(")
        address = f"static_cast<void (*)({parameters})>(&{name})"
        entries.append(f"    {{reinterpret_cast<const void*>({address}), &{mangled}}},")
    lines = [f'#include "{simulated.CUDA / "ptx.h"}"', f'#include "{source}"  // {made}', "namespace {", code]
    lines += ["const ptx::Entry entries[] = {", *entries, "};", "}", "ptx::Body ptx::translation(const void* kernel) {"]
    lines += ["  for (const Entry& entry : entries)", "    if (entry.kernel == kernel) return entry.body;"]
    path.write_text("\n".join([*lines, "  return nullptr;", "}", ""]))
    return path


def flags() -> list[str]:
    """Return how translated code is compiled. The C++ compiler fuses nothing: what nvcc fused is a call of std::fma."""
    known = Path("/proc/cpuinfo").read_text().split()
    return ["-w", "-Og", "-ffp-contract=off", *(f"-m{name}" for name in ("fma", "f16c") if name in known)]


def extension(root: Path = simulated.ROOT, architecture: int = ARCHITECTURE) -> Path:
    """Return the path of `_C_cuda`, which launches the kernels of a tree as nvcc compiles them."""
    sources = sorted(root.glob("csrc/*/*_cuda.cu"))
    simulated.CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(simulated.CACHE / "lock"), ThreadPoolExecutor(os.cpu_count()) as threads:
        texts = list(threads.map(lambda source: compiled(source, architecture), sources))
        units = dict.fromkeys(map(unit, sources, texts), flags())
    return simulated.extension(root, kernels=units)
