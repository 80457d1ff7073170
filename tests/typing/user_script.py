"""What a user writes, for `make lint` to check types with: guide, measure, sample and learn."""

import torch
from torch import Tensor

import lgd_kernels as lgd


def denoiser(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return 0.9 * x + 0.1 * c.to(x.dtype).view(-1, 1)


def main() -> None:
    schedule = lgd.RectifiedFlow()
    x, label, none = torch.randn(4, 8), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    t, s = torch.full((4,), 0.8), torch.full((4,), 0.3)
    levels: lgd.Levels = schedule.levels(t, s)
    signal: Tensor = schedule.levels(t, 0.2).signal_s + schedule.levels(0.9, s).signal_t
    cond, uncond = denoiser(x, t, label), denoiser(x, t, none)

    guided: Tensor = lgd.guided_score(cond, uncond, 1.5, rule=lgd.rules.tcfg)
    knots = torch.linspace(0, 1, 3)
    table = lgd.OmegaTable(torch.ones(4, 3, 3, requires_grad=True), knots, knots)
    stepped = lgd.guided_step(x, cond, uncond, table.at(label, s, t), levels, churn=1.0, seed=7)
    x_t, c, u = (one[:, None].expand(-1, 4, -1) for one in (x, cond, uncond))
    target = lgd.Renoise(x, 4, seed=1)
    loss = lgd.guided_energy(x_t, c, u, table.at(label, s, t), levels, target, churn=1.0, seed=1).mean()
    loss.backward()
    curve = lgd.guided_energy_curve(x_t, c, u, levels, target, churn=1.0, seed=1)
    best: Tensor = curve.minimize(beta=1.0)

    mixed: Tensor = lgd.combine((cond, uncond), torch.ones(4, 2))
    measured = lgd.combine((cond, uncond), torch.ones(4, 2), moments=True, written=0).dots
    plain, centred = lgd.moments((cond,)).sums, lgd.moments((cond,), centred=True).means
    energy: Tensor = lgd.energy_mmd(x, stepped, kernel=lgd.Gaussian((0.5, 1.0)))

    plan = lgd.solvers.dpm_solver_2m(schedule, torch.linspace(1, 0, 5))
    x, kept = plan.step(0, x, cond, uncond, omega=0.5)
    with torch.no_grad():
        drawn: Tensor = lgd.sample(denoiser, x, plan, label, none, table, seed=3)

    frozen = lgd.learn.Frozen(denoiser, schedule, null=0)
    network = lgd.omega.network.OmegaNetwork(schedule, classes=4, hidden=8)
    trainer = lgd.learn.Trainer(network, frozen, (drawn, label), lgd.learn.Settings(batch=4))
    trainer.train(2)
    print(signal, guided, best, mixed, measured, plain, centred, energy, kept, lgd.metrics.energy_distance(x, drawn))


if __name__ == "__main__":
    main()
