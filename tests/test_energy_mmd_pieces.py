"""energy_mmd in pieces: of samples in several processes, and of large calls that say how far they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharding
import torch
from conftest import assert_ended
from mmd import KERNELS, OPTIONS, each_kernel

import lgd_kernels as lgd
from lgd_kernels.ops.energy_mmd import pieces, sharded
from lgd_kernels.runtime import progress

ROOT = Path(__file__).parents[1]
each_case = pytest.mark.parametrize("name", sharding.CASES)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    """Return (gradients and values, reports of progress, refusals) of each process."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(ROOT / "tests" / "sharding.py"), str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert_ended(run)
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def joined(parts, batched):
    return None if parts[0] is None else torch.cat(parts, 1 if batched else 0)


def tolerance(name):
    dtype = sharding.CASES[name][3]
    return {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


def close(found, expected, name, size):
    """`size`: of what is added up."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance(name) * size


@each_case
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("wanted", sharding.WANTED)
def test_sharded_is_the_whole(processes, name, even, wanted):
    """Every process gets the value of all samples, the same bits, and its part of the gradient."""
    x, y, options = sharding.inputs(name)
    expected = sharding.measured(x, y, sharding.WANTED[wanted], **options)
    terms = sharding.measured(x, y, sharding.WANTED[wanted], **{**options, "lam": 0.0})  # a slope is their difference
    found = [one[0][name, wanted, even] for one in processes]
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    close(found[0][0], expected[0], name, terms[0].abs().max())
    for of in (1, 2):
        together = joined([one[of] for one in found], options.get("batched"))
        assert (together is None) == (expected[of] is None)
        if together is not None:
            close(together, expected[of], name, terms[of].abs().max())


def test_one_process_may_want_what_others_do_not(processes):
    x, y, options = sharding.inputs("energy")
    expected = sharding.measured(x, y, (True, True), **options)
    for rank, (found, _, _) in enumerate(processes):
        loss, d_x, d_y = found["one wants"]
        close(loss, expected[0], "energy", 1.0)
        assert d_y is None and (d_x is None) == (rank > 0)
        if d_x is not None:
            close(d_x, sharding.own(expected[1], rank, len(processes), False, False), "energy", expected[1].abs().max())


def test_each_process_reports_its_share(processes):
    shares = []
    for found, heard, _ in processes:
        done, totals = zip(*heard, strict=True)
        assert done[0] == 0 and done[-1] == totals[0] and len(set(totals)) == 1 and list(done) == sorted(done)
        close(found["progress"][0], found["energy", "x", False][0], "energy", 1.0)
        shares.append(totals[0])
    assert shares[0] == max(shares)  # it has half of the samples


@pytest.mark.parametrize(
    "case, message",
    [
        ("shape", r"the shape of `x` is \['n', 1\] in rank 0 of the group and \['n', 2\] in rank 1"),
        ("dtype", "the dtype of `x` is torch.float64 in rank 0 of the group and torch.float32 in rank 1"),
        ("lam", "`lam` is 0.5 in rank 0 of the group and 1.0 in rank 1, expected the same in all"),
        ("kernel", "`kernel` is Gaussian"),
        ("empty", "`x` holds no sample in any process"),
        ("one", "`x` holds one sample, which has no other"),
        ("weights", "the dtype of `x_weights` is torch.float32 in rank 0 of the group and None in rank 1"),
        ("no weight", "`y_weights` has the sum 0, expected weights of a positive, finite sum"),
        ("weight of one", "`x_weights` gives one sample all the weight"),
        ("transform", "`group` does not go with torch.compile, vmap"),
    ],
)
def test_refused_in_every_process(processes, case, message):
    for _, _, refused in processes:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(refused[case])


def test_a_wrong_call_is_refused_where_it_was_right_too(processes):
    said = [refused["one is wrong"] for _, _, refused in processes]
    assert said[0] == "ValueError: energy_mmd: `beta` is 3.0, expected a power in (0, 2]"
    assert all(one == f"ValueError: another process of the group, rank 0, was called wrongly: {said[0][12:]}"
               for one in said[1:])  # fmt: skip


def test_a_group_needs_a_group():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="`group` is given, but torch.distributed is not set up"):
        lgd.energy_mmd(x, x, group=3)


def test_each_two_ranks_meet_once():
    for size in range(1, 8):
        for once in (True, False):
            reached = [(rank, sharded._reach(rank, size, once)) for rank in range(size)]
            met = [(rank, (rank + step) % size) for rank, reach in reached for step in range(1, reach + 1)]
            pairs = set(map(frozenset, met)) if once else set(met)
            assert len(pairs) == len(met) == size * (size - 1) // (2 if once else 1)


def test_parts_go_around(processes):
    """Each process receives the parts of those after it in turn, and holds one of them when it asks for the next."""
    size = len(processes)
    for rank, (found, _, _) in enumerate(processes):
        assert found["around"] == [[float((rank + step) % size)] * (5 + (rank + step) % size) for step in range(size)]
        assert found["held"] == 2 * [0, *[1] * (size - 2)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 20)
    monkeypatch.setattr(pieces, "WORK", 1)


@each_kernel
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dimension", [3, 100])
def test_pieces_are_the_whole(kernel, options, dimension, small_pieces, generator):
    x = torch.randn(2, 131, dimension, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 70, dimension, generator=generator, dtype=torch.float64) + 0.5
    options = {**options, "kernel": kernel, "batched": True}
    heard = []
    for wanted in sharding.WANTED.values():
        expected = sharding.measured(x, y, wanted, **options)
        found = sharding.measured(x, y, wanted, progress=lambda *at: heard.append(at), **options)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, other.abs().max().item()))
        done, totals = zip(*heard, strict=True)
        assert done[0] == 0 and done[-1] == totals[0] and len(set(totals)) == 1 and len(done) > 7
        assert list(done) == sorted(done)
        heard.clear()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "polynomial"])
def test_pieces_keep_the_digits_of_close_samples(name, small_pieces, generator):
    """Clusters far apart against spreads: the mean, the origin of products, lies far from all of them."""
    x, y = (torch.randn(60, 80, generator=generator) * 1e-3 for _ in range(2))
    x[::2] += 10
    expected = lgd.energy_mmd(x.double(), y.double(), kernel=KERNELS[name])
    found = lgd.energy_mmd(x, y, kernel=KERNELS[name], progress=lambda *at: None)
    once = lgd.energy_mmd(x, y, kernel=KERNELS[name])
    size = lgd.energy_mmd(x.double(), y.double(), kernel=KERNELS[name], lam=0.0).abs()
    assert abs(found - expected) <= max(2 * abs(once - expected), 1e-6 * size)


def test_a_callback_may_end_the_call(small_pieces):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    x = torch.randn(50, 2)
    with pytest.raises(KeyboardInterrupt):
        lgd.energy_mmd(x, x, progress=stop)


def test_a_large_call_reports_often_and_has_few_pieces():
    """A million samples of each set, without running them."""
    sides = [pieces.Side(torch.empty(1, 1, 1).expand(1, 10**6, 2), None) for _ in range(2)]
    one = torch.ones(1)
    parts = list(pieces._cut(pieces.Piece(*sides, one, one)))
    assert 500 < len(parts) < 2000 and sum(part.pairs for part in parts) == 10**12
    within = list(pieces._cut(pieces.Piece(sides[0], None, one, one)))
    assert sum(part.pairs for part in within) == pytest.approx(10**12 / 2, rel=1e-2)
    wide = pieces.Side(torch.empty(1, 1, 1).expand(1, 10_000, 2048), None)
    assert len(list(pieces._cut(pieces.Piece(wide, wide, one, one)))) == 11  # rows of a second or so each


def test_bars(capsys, monkeypatch):
    x = torch.randn(50, 2)
    lgd.energy_mmd(x, x, progress=True)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    lgd.energy_mmd(x, x, progress=True)
    said = capsys.readouterr().err
    assert "energy_mmd" in said and "0 %" in said and said.endswith("\r\033[K")
    assert list(progress.bars("run")([1, 2], "label")) == [1, 2]
    assert "run label" in capsys.readouterr().err


def test_transforms_do_not_report(generator):
    x, y = torch.randn(2, 30, 2, generator=generator)

    def loss(x, progress=None):
        return lgd.energy_mmd(x, y, progress=progress)

    expected = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, progress=print))(x), expected)


def test_refusals():
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"`progress` is a int, expected True for a bar, or a function of \(done"):
        lgd.energy_mmd(x, x, progress=3)
    a = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="a gradient has no gradient"):
        torch.autograd.grad(lgd.energy_mmd(a, x, progress=lambda *at: None), a, create_graph=True)
