"""The marginal objective: particles of a group of items pooled, against the plain formula in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_ended
from torch import distributed

import lgd_kernels as lgd
from lgd_kernels import learn
from lgd_kernels.learn import Frozen, draw, marginal_loss
from lgd_kernels.learn.distributed import process_group
from lgd_kernels.runtime.levels import PREDICTIONS, per_sample

ROOT = Path(__file__).parents[1]
SCHEDULE = lgd.VPCosine()
GROUP = torch.tensor([2, 0, 1, 0, 2, 2, 0])  # 3, 1 and 3 items
OMEGA = torch.linspace(-0.5, 3, 7, dtype=torch.float64)


def denoiser(x, t, c):
    return torch.tanh(x + 0.3 * c.view(-1, *(1,) * (x.ndim - 1))) * (1 - 0.5 * per_sample(t, x))


def drawn(group=GROUP, m=3, shape=(5, 2), prediction="v", dtype=torch.float64, part=slice(None), seed=11):
    """Items of a group share c, s and t."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(len(group), *shape, generator=generator, dtype=torch.float64).to(dtype)
    s, t = (times.to(dtype)[group] for times in learn.sample_times(int(group.max()) + 1, generator=generator))
    frozen = Frozen(denoiser, SCHEDULE, prediction, null=0)
    first = part.start or 0
    return draw(frozen, x0[part], group[part] + 1, s[part], t[part], m, seed=seed, first_sample=first)


def reference(p, omega, group, k=3, beta=1.75, lam=1.0, churn=1.0, unbiased=True):
    """Item by item, particle by particle, all distances."""
    m, found = p.x_t.shape[1], []
    shape = (len(p.x0), m, *p.x0.shape[1:])
    z, z_targets = (
        lgd.philox_normal((len(p.x0) * count, *shape[2:]), p.seed, stream=stream).double().view(-1, count, *shape[2:])
        for stream, count in ((1, m), (2, k))
    )
    y = per_sample(p.levels.signal_s, z) * p.x0[:, None] + per_sample(p.levels.noise_s, z) * z_targets
    x_s = torch.stack(
        [
            lgd.guided_step(p.x_t[:, j], p.cond[:, j], p.uncond[:, j], omega, p.levels, prediction=p.prediction,
                            churn=churn, noise=z[:, j], impl="reference") for j in range(m)
        ], 1,
    )  # fmt: skip
    for index in range(int(group.max()) + 1):
        a, b = (one[group == index].flatten(0, 1).flatten(1) for one in (x_s, y))
        between = (a[:, None] - b).square().sum(-1) ** (beta / 2)
        within = [(a[i] - a[j]).square().sum() ** (beta / 2) for i in range(len(a)) for j in range(len(a)) if i != j]
        pairs = len(a) * (len(a) - 1) if unbiased else len(a) ** 2
        found.append(between.mean() - lam / 2 * sum(within) / pairs)
    return torch.stack(found)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"beta": 1.0, "lam": 0.5, "churn": 0.3}, {"unbiased": False}, {"lam": 0.0}], ids=str
)
@pytest.mark.parametrize("group", [GROUP, GROUP[:6] % 2, GROUP * 0], ids=["unequal", "two and four", "one"])
def test_it_is_the_formula(prediction, options, group):
    p, upstream = drawn(group, prediction=prediction), torch.linspace(1, 2, int(group.max()) + 1, dtype=torch.float64)
    found = []
    for loss in (marginal_loss, reference):
        omega = OMEGA[: len(group)].clone().requires_grad_()
        value = loss(p, omega, group=group, **options)
        found.append((value, *torch.autograd.grad(value, omega, upstream)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_groups_of_equal_sizes_need_no_filling(monkeypatch):
    group = torch.tensor([1, 0, 1, 0])
    p, omega = drawn(group), OMEGA[:4]
    monkeypatch.setattr("lgd_kernels.learn.marginal._padded", None)
    torch.testing.assert_close(marginal_loss(p, omega, group=group), reference(p, omega, group))
    torch.testing.assert_close(marginal_loss(p, omega), reference(p, omega, group * 0))


@pytest.mark.parametrize("options", [{}, {"beta": 1.0, "churn": 0.5, "targets": 2}, {"unbiased": False}], ids=str)
def test_each_item_alone_is_self_consistency(options):
    p = drawn()
    expected = learn.self_consistency_loss(p, OMEGA, **options)
    torch.testing.assert_close(marginal_loss(p, OMEGA, group=torch.arange(7), **options), expected)


def test_the_gradients_gradient():
    p, omega = drawn(GROUP[:4], m=2), OMEGA[:4].clone().requires_grad_()

    def loss(omega):
        return marginal_loss(p, omega, group=GROUP[:4], churn=0.5)

    assert torch.autograd.gradcheck(loss, omega) and torch.autograd.gradgradcheck(loss, omega)


def test_forms_of_omega():
    p = drawn()
    same = marginal_loss(p, torch.full((7,), 1.5, dtype=torch.float64), group=GROUP)
    torch.testing.assert_close(marginal_loss(p, 1.5, group=GROUP), same)
    table = lgd.OmegaTable(torch.full((4, 2, 2), 1.5), torch.tensor([0.0, 0.5]), torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(marginal_loss(p, table.at(p.c, p.s, p.t), group=GROUP), same)


def test_a_seed_of_each_items_own():
    """Noise follows the item, wherever it stands; and is that of self_consistency_loss."""
    seeds = torch.arange(7) + 100
    p = drawn()._replace(seed=seeds)
    torch.testing.assert_close(
        marginal_loss(p, OMEGA, group=torch.arange(7)), learn.self_consistency_loss(p, OMEGA), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    """Particles are not rounded to a half: the loss is that of the same data in float64."""
    p = drawn(dtype=dtype) if dtype != torch.bfloat16 else drawn(dtype=torch.float32)
    if dtype == torch.bfloat16:
        p = p._replace(**{name: getattr(p, name).bfloat16() for name in ("x0", "x_t", "cond", "uncond")})
    wide = p._replace(
        levels=lgd.Levels(*(level.double() for level in p.levels)),
        **{name: getattr(p, name).double() for name in ("x0", "x_t", "cond", "uncond")},
    )
    found = marginal_loss(p, OMEGA.float(), group=GROUP)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), marginal_loss(wide, OMEGA, group=GROUP), rtol=1e-5, atol=1e-5)


def test_pooled_particles_of_the_exact_model_have_the_least_loss_unguided():
    """Data N(0, 1), and uncond off by 1: omega = 0 gives the law at s, and no other does."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    s, t = torch.full((400,), 0.2, dtype=torch.float64), torch.full((400,), 0.7, dtype=torch.float64)

    def exact(x, t, c):
        signal, noise = (per_sample(level, x) for level in SCHEDULE.signal_noise(t))
        return signal * x / (signal**2 + noise**2) + c[:, None]  # shifted, where the condition says so

    p = draw(Frozen(exact, SCHEDULE, null=1), x0, torch.zeros(400, dtype=torch.int64), s, t, seed=5)
    losses = torch.stack([marginal_loss(p, w)[0] for w in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    assert int(losses.argmin()) == 2 and losses[2] < losses[1] - 0.01 and losses[2] < losses[3] - 0.01


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"group": GROUP[:3]}, TypeError, r"`group` is a torch.int64 \[3\], expected int64 \[B\] = \[7\]"),
        ({"group": GROUP.float()}, TypeError, "`group` is a torch.float32"),
        ({"group": 3}, TypeError, "`group` is a int"),
        ({"group": GROUP - 1}, ValueError, "`group` is -1 for an item, expected 0 or more"),
        ({"group": GROUP * 2}, ValueError, "group 1 has no items"),
        ({"targets": 0}, ValueError, "`targets` is 0, expected 1 or more"),
        ({"beta": 3.0}, ValueError, "`beta` is 3.0"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        marginal_loss(drawn(), OMEGA, **change)
    with pytest.raises(ValueError, match="a group has one particle"):
        marginal_loss(drawn(m=1), OMEGA, group=GROUP)
    with pytest.raises(ValueError, match=r"`omega` has shape \[3\], expected \[B\] = \[7\]"):
        marginal_loss(drawn(), OMEGA[:3])


CASES = {"three groups": GROUP, "one group": GROUP * 0, "none given": None}


@pytest.mark.parametrize("size", [2, 4])
def test_processes_find_what_one_does(size, tmp_path):
    """gloo, with parts of unequal size, and groups that some of them hold nothing of."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, __file__, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True,
                         timeout=200)  # fmt: skip
    assert_ended(run)
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, group in CASES.items():
        omega = OMEGA.clone().requires_grad_()
        loss = marginal_loss(drawn(), omega, group=group)
        loss.sum().backward()
        for found in processes:
            torch.testing.assert_close(found[name][0], loss.detach(), rtol=0, atol=1e-12)
            assert torch.equal(found[name][0], processes[0][name][0])
        gradient = torch.cat([found[name][1] for found in processes])
        torch.testing.assert_close(gradient, omega.grad, rtol=0, atol=1e-12)
    assert all("group 1 has no items" in found["refused"] for found in processes)


def main(folder):
    torch.set_num_threads(1)
    with process_group("gloo"):
        rank, size = distributed.get_rank(), distributed.get_world_size()
        ends = [0, 3, 7] if size == 2 else [0, 3, 4, 6, 7]
        part, found = slice(ends[rank], ends[rank + 1]), {}
        p = drawn(part=part)
        for name, group in CASES.items():
            omega = OMEGA[part].clone().requires_grad_()
            own = None if group is None else group[part]
            loss = marginal_loss(p, omega, group=own, process_group=distributed.group.WORLD)
            loss.sum().backward()
            found[name] = (loss.detach(), omega.grad)
        try:
            marginal_loss(p, 1.0, group=2 * GROUP[part], process_group=distributed.group.WORLD)
        except ValueError as error:
            found["refused"] = str(error)
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
