"""The calls that `make gpu` gives to Triton are within the error budget, and compile few specialisations."""

import pytest

from benchmarks import gpu_calls, gpu_checks
from lgd_kernels.runtime import impls

# The interpreter takes minutes for all: a dry run of `make gpu` takes a few.
each_target = pytest.mark.parametrize(
    ("impl", "device"),
    [
        pytest.param("cpu", "cpu", marks=pytest.mark.extension),
        pytest.param("triton", "cpu", marks=pytest.mark.triton),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)


@each_target
@pytest.mark.parametrize("call", gpu_calls.calls(), ids=str)
def test_agrees_with_float64(call, impl, device):
    gpu_checks.check(call, impl, device)


def test_the_list_compiles_few_specialisations():
    """Counted by Triton's cache key. The rows need no others, whatever their size."""
    pytest.importorskip("triton")
    found = gpu_checks.count(gpu_calls.calls())
    assert found.keys() == set(impls.ops())
    assert 100 < sum(map(len, found.values())) <= gpu_calls.MOST
    for op, keys in gpu_checks.count(map(gpu_calls.Call, gpu_calls.rows())).items():
        assert keys <= found[op], op


def test_calls_have_names_of_their_own():
    names = [*map(str, gpu_calls.calls())]
    assert len(set(names)) == len(names)
    assert {call.layout for call in gpu_calls.calls()} == {"contiguous", "offset", "odd stride"}
