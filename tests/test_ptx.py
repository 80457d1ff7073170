"""Run the CUDA kernels on the CPU as nvcc compiles them (ptx.py), and check the translator on PTX by hand."""

import ctypes
import re

import ptx
import pytest
import simulated
import torch
from conftest import SIMULATED
from test_cuda import pass_their_tests

pytestmark = [
    pytest.mark.skipif(bool(simulated.missing()), reason=simulated.missing()),
    pytest.mark.skipif(bool(SIMULATED), reason="this is the simulator's process"),
]


@pytest.mark.slow
@pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
def test_translated_kernels_pass_their_tests():
    pass_their_tests("reverse", SIMULATED_PTX="1")


# A kernel of two addresses: %rd1, of 16 bytes to write for each thread, and %rd2, of 16 bytes to read.
KERNEL = """
.visible .entry {name}(
  .param .u64 {name}_param_0,
  .param .u64 {name}_param_1
)
.maxntid 32, 1, 1
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<19>;
  .reg .b64 %rd<9>;
  .reg .f32 %f<9>;
  .reg .f64 %fd<9>;
  ld.param.u64 %rd1, [{name}_param_0];
  ld.param.u64 %rd2, [{name}_param_1+0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 16;
  add.s64 %rd1, %rd1, %rd3;
  add.s64 %rd2, %rd2, %rd3;
  {body}
  ret;
}}
"""
FILE = """
.version 9.0
.target sm_90
.address_size 64
.shared .align 8 .b8 others[16];
.func (.param .b64 result) difference(.param .b64 from, .param .b64 less)
{
  .reg .f64 %fd<3>;
  ld.param.f64 %fd1, [from];
  ld.param.f64 %fd2, [less];
  sub.f64 %fd1, %fd1, %fd2;
  st.param.f64 [result+0], %fd1;
  ret;
}
"""
LOAD = "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd2];"
STORE = "st.global.v4.u32 [%rd1], {%r3, %r4, %r5, %r6};"
BODIES = {
    "rounds": LOAD + """
        fma.rn.f32 %f5, %f1, %f2, %f3;
        mul.f32 %f6, %f1, %f2;
        add.f32 %f6, %f6, %f3;
        st.global.v2.f32 [%rd1], {%f5, %f6};""",
    "shuffles": """
        ld.global.u32 %r2, [%rd2];
        mov.u32 %r7, -1;
        shfl.sync.bfly.b32 %r3|%p1, %r2, 5, 31, %r7;
        shfl.sync.down.b32 %r4|%p2, %r2, 3, 31, %r7;
        shfl.sync.up.b32 %r5, %r2, 3, 0, %r7;
        shfl.sync.idx.b32 %r6, %r2, 2, 6175, %r7;  // in segments of eight lanes
        @%p2 bra $INSIDE;
        add.s32 %r4, %r4, 1000;
    $INSIDE:
        @!%p1 mov.u32 %r3, 0;""" + STORE,
    "compares": LOAD + """
        setp.lt.f32 %p1|%p2, %f1, %f2;
        setp.geu.f32 %p3, %f1, %f2;
        setp.neu.and.f32 %p4|%p5, %f1, %f2, %p1;
        selp.u32 %r3, 1, 0, %p1;
        selp.b32 %r4, 1, 0, %p2;
        selp.b32 %r5, 1, 0, %p3;
        selp.b32 %r6, 2, 0, %p4;
        @%p5 add.s32 %r6, %r6, 1;""" + STORE,
    "to_integers": LOAD + """
        cvt.rni.s32.f32 %r3, %f1;
        cvt.rzi.s32.f32 %r4, %f1;
        cvt.rmi.s32.f32 %r5, %f1;
        cvt.rpi.u32.f32 %r6, %f1;""" + STORE,
    "narrows": """
        ld.global.f64 %fd1, [%rd2];
        cvt.rn.f32.f64 %f1, %fd1;
        cvt.rn.f16.f32 %rs1, %f1;
        cvt.rn.bf16.f32 %rs2, %f1;
        cvt.f32.f16 %f2, %rs1;
        cvt.f32.bf16 %f3, %rs2;
        st.global.v2.f32 [%rd1], {%f1, %f2};
        st.global.f32 [%rd1+8], %f3;""",
    "integers": """
        ld.global.v2.u32 {%r3, %r4}, [%rd2];
        mul.wide.s32 %rd4, %r3, %r4;
        mov.b64 {_, %r5}, %rd4;
        mul.hi.u32 %r6, %r3, %r4;
        shr.s32 %r3, %r3, 40;
        cvt.sat.u8.s32 %r4, %r4;""" + STORE,
    "moves": """
        ld.global.s16 %r3, [%rd2];
        ld.global.u16 %rs1, [%rd2+2];
        mov.b32 %r4, {%rs1, %rs1};
        mov.b64 %rd4, {%r3, %r4};
        mov.b64 %fd1, %rd4;
        mov.b64 {%r5, %r6}, %fd1;""" + STORE,
    "extremes": LOAD + """
        min.f32 %f1, %f1, %f2;
        max.f32 %f2, %f3, %f4;
        mov.f32 %f3, 0fBF800000;
        mov.b32 %f4, 1073741824;
        st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};""",
    "calls": """
        .local .align 8 .b8 kept[16];
        ld.global.v2.f64 {%fd1, %fd2}, [%rd2];
        mov.u64 %rd4, kept;
        cvta.local.u64 %rd4, %rd4;
        st.local.f64 [%rd4+8], %fd2;
        { // callseq 0, 0
        .reg .b32 temp_param_reg;
        .param .b64 param0;
        st.param.f64 [param0+0], %fd1;
        .param .b64 param1;
        ld.local.f64 %fd3, [kept+8];
        st.param.f64 [param1+0], %fd3;
        .param .b64 retval0;
        call.uni (retval0),
        difference,
        (
        param0,
        param1
        );
        ld.param.f64 %fd4, [retval0+0];
        } // callseq 0
        rcp.approx.ftz.f64 %fd3, %fd4;
        st.global.v2.f64 [%rd1], {%fd4, %fd3};""",
    "shares": """
        .shared .b8 first;
        .shared .align 8 .f64 second;
        mov.u32 %r3, others;
        mov.u32 %r4, first;
        mov.u32 %r5, second;
        st.shared.u32 [%r5+4], %r1;
        bar.sync 0;
        ld.shared.u32 %r6, [second+4];""" + STORE,
    "misaligned": "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd2+4];",
    "misaligned_pair": "st.global.v2.u16 [%rd1+2], {%rs1, %rs2};",
    "misaligned_shared": "ld.shared.u32 %r2, [others+2];",
    "outside": "mov.u32 %r2, others; ld.shared.f64 %fd1, [%r2+16];",
    "part": "shfl.sync.bfly.b32 %r2, %r1, 1, 31, 65535;",
}  # fmt: skip
LAUNCH = """
const std::pair<std::string, ptx::Body> bodies[] = {%s};
}
extern "C" __attribute__((visibility("default")))
const char* launch(const char* name, int threads, void* to, void* from) {
  char* const parameters[] = {reinterpret_cast<char*>(&to), reinterpret_cast<char*>(&from)};
  for (const auto& [known, body] : bodies)
    if (known == name) simulator::launch(name, 1, threads, [body = body, &parameters] { body(parameters); });
  return cudaGetLastError() == cudaSuccess ? nullptr : cudaGetErrorString(cudaErrorLaunchFailure);
}
"""


def translate(body):
    return ptx.translate(FILE + KERNEL.format(name="kernel", body=body), "hand.ptx")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return a function that runs a kernel of BODIES with a row of 16 bytes for each thread: (output, error)."""
    text = FILE + "".join(KERNEL.format(name=name, body=body) for name, body in BODIES.items())
    code, kernels = ptx.translate(text, "hand.ptx")
    assert kernels == list(BODIES)
    bodies = ", ".join(f'{{"{name}", &{name}}}' for name in kernels)
    header = simulated.CUDA / "ptx.h"
    path = tmp_path_factory.mktemp("ptx") / "hand.cpp"
    path.write_text(f'#include "{header}"\nnamespace {{\n{code}{LAUNCH % bodies}')
    units = {path: ptx.flags(), simulated.CUDA / "simulator.cpp": ()}
    library = ctypes.CDLL(str(simulated.library("hand.so", units, [header])))
    library.launch.restype = ctypes.c_char_p

    def run(name, rows, dtype=None):
        out = torch.zeros(rows.shape[0], 16, dtype=torch.uint8)
        addresses = (ctypes.c_void_p(one.data_ptr()) for one in (out, rows))
        error = library.launch(name.encode(), rows.shape[0], *addresses)
        return out.view(dtype or rows.dtype), error and error.decode()

    return run


def rows_of(values, dtype=torch.float32):
    """Return a row of 16 bytes for each value, which comes first."""
    values = torch.as_tensor(values, dtype=dtype)
    rows = torch.zeros(len(values), 16 // values.itemsize, dtype=dtype)
    rows[:, : values[0].numel()] = values.reshape(len(values), -1)
    return rows


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("prmt.b32 %r1, %r2, %r3, 0;", "prmt.b32 %r1, %r2, %r3, 0"),
        ("add.ftz.f32 %f1, %f2, %f3;", "add.ftz.f32 %f1, %f2, %f3"),
        ("cvt.rp.f32.f64 %f1, %fd1;", "cvt.rp.f32.f64 %f1, %fd1"),
        ("ld.volatile.global.f32 %f1, [%rd1];", r"ld.volatile.global.f32 %f1, \[%rd1\]"),
        ("ld.global.f32 %f1, [%rd1+%r1];", r"\[%rd1\+%r1\]"),
        ("bar.sync 1;", "bar.sync 1"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("mov.u32 %r1, %r77;", "%r77"),
        ("mov.u32 %r77, %r1;", "%r77"),
        ("mov.u32 %r1, somewhere;", "somewhere"),
        ("add.f32 %f1, %f2, %fd1;", "%fd1, a f64, as f32"),
        ("cvt.u32.u16 %r1, %p1;", "%p1, a pred, as u16"),
        ("mov.u64 %rd1, %r1;", "%r1, a b32, as u64"),
        (".reg .f16 %h<3>;", r".reg .f16 %h<3>"),
        (".loc 1 2 3;", ".loc 1 2 3"),
    ],
)
def test_what_is_unknown_is_named(statement, what):
    with pytest.raises(ptx.Unknown, match=rf"^hand.ptx:\d+: {what}$"):
        translate(statement)


def test_an_error_has_the_line():
    text = FILE + KERNEL.format(name="kernel", body="// a comment\n  mov.u32\n    %r2,\n    1;\n  trap;")
    line = 1 + text[: text.index("trap")].count("\n")
    with pytest.raises(ptx.Unknown, match=f"^hand.ptx:{line}: trap$"):
        ptx.translate(text, "hand.ptx")


def test_fma_rounds_once_and_nothing_else_is_fused(launch):
    a = 1 + 2.0**-12
    out, error = launch("rounds", rows_of([[a, a, -(a * a - 2.0**-24)]]))
    assert error is None and out[0, :2].tolist() == [2.0**-24, 0]


def test_shuffles(launch):
    lanes = torch.arange(32)
    out, error = launch("shuffles", rows_of(lanes, torch.int32))
    down = torch.where(lanes < 29, lanes + 3, lanes + 1000)
    expected = [lanes ^ 5, down, torch.where(lanes < 3, lanes, lanes - 3), lanes // 8 * 8 + 2]
    assert error is None and torch.equal(out, torch.stack(expected, 1).int())


def test_comparisons(launch):
    pairs = [(1, 2), (2, 1), (1, 1), (torch.nan, 1)]
    out, _ = launch("compares", rows_of(pairs))
    assert out.view(torch.int32).tolist() == [[1, 0, 0, 2], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_conversions_to_integers(launch):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 2.75, 3e9, -3e9, torch.inf, torch.nan]
    out, _ = launch("to_integers", rows_of(values), torch.int32)
    most, least = 2**31 - 1, -(2**31)
    assert out[:, 0].tolist() == [0, 2, 2, 0, -2, 3, most, least, most, 0]  # ties to even
    assert out[:, 1].tolist() == [0, 1, 2, 0, -1, 2, most, least, most, 0]
    assert out[:, 2].tolist() == [0, 1, 2, -1, -2, 2, most, least, most, 0]
    assert (out[:, 3].long() & 2**32 - 1).tolist() == [1, 2, 3, 0, 0, 3, 3 * 10**9, 0, 2**32 - 1, 0]


def test_conversions_of_floats(launch):
    tie = 1 + 2.0**-24
    values = torch.tensor([tie, tie + 2**-40, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 65520, 2**-25, torch.nan])
    values = torch.cat([values.double(), torch.tensor([tie, tie + 2**-40, -1e300], dtype=torch.float64)])
    out, _ = launch("narrows", rows_of(values, torch.float64), torch.float32)
    float32 = values.float()
    expected = [float32, float32.half().float(), float32.bfloat16().float()]
    assert torch.equal(out[:, :3].nan_to_num(7.5), torch.stack(expected, 1).nan_to_num(7.5))


def test_integers(launch):
    pairs = [(-7, 300), (2**31 - 1, 2**31 - 1), (-(2**31), -1)]
    out, _ = launch("integers", rows_of(pairs, torch.int32))
    for (a, b), row in zip(pairs, out.tolist(), strict=True):
        unsigned = (a % 2**32) * (b % 2**32) >> 32
        assert row[0] == (-1 if a < 0 else 0) and row[1] == min(max(b, 0), 255)
        assert row[2] == a * b >> 32 and row[3] % 2**32 == unsigned


def test_moves_of_parts(launch):
    out, _ = launch("moves", rows_of([[-2, 0x1234]], torch.int16), torch.int32)
    assert out.tolist() == [[-2, 0x12341234, -2, 0x12341234]]


def test_extremes_and_literals(launch):
    out, _ = launch("extremes", rows_of([[0.0, -0.0, torch.nan, 3.0], [torch.nan, -5.0, -0.0, 0.0]]))
    assert out.tolist() == [[0.0, 3.0, -1.0, 2.0], [-5.0, 0.0, -1.0, 2.0]]
    assert out[:, :2].signbit().tolist() == [[True, False], [True, False]]


def test_calls_and_local_memory(launch):
    out, error = launch("calls", rows_of([[7.0, 4.0], [4.0, 4.0]], torch.float64))
    assert error is None and out[:, 0].tolist() == [3, 0] and out[1, 1] == torch.inf
    assert out[0, 1] == pytest.approx(1 / 3, rel=2**-20) and not out.view(torch.int64)[0, 1] & 2**32 - 1


def test_shared_variables_have_places_of_their_own(launch):
    """Those of the file come first, then those of the kernel."""
    out, error = launch("shares", rows_of(range(32), torch.int32))
    assert error is None and out[:, :3].tolist() == 32 * [[0, 16, 24]]
    assert set(out[:, 3].tolist()) == {31}  # which wrote last


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("misaligned", "a misaligned access of 16 bytes"),
        ("misaligned_pair", "a misaligned access of 4 bytes"),
        ("misaligned_shared", "a misaligned access of 4 bytes"),
        ("outside", "an access outside shared memory"),
        ("part", "a shuffle of part of a warp"),
    ],
)
def test_errors_are_those_of_the_launch(launch, kernel, message):
    error = launch(kernel, rows_of(range(32), torch.int32))[1]
    assert re.fullmatch(rf"{kernel}: {message}: hand.ptx:\d+", error)
    assert launch("rounds", rows_of([[0.0]]))[1] is None
