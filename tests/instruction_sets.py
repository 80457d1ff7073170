"""Print a digest of every op's results. test_instruction_sets.py runs this file once for each instruction set."""

import hashlib
import json
import sys

import torch

import lgd_kernels as lgd
from lgd_kernels import _C, testing
from lgd_kernels.guidance import rules


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, (tuple, list)) else []


def results(dtype: torch.dtype):
    """Yield (name, result) of every op, on rows that fill vectors and on rows that do not."""
    generator = torch.Generator().manual_seed(0)
    for row in (1, 19, 333, 2050):
        data = [testing.sample((3, row), dtype, generator) for _ in range(4)]
        x, c, u, z = (one.requires_grad_() for one in data)
        levels, omega = testing.step_levels(3), torch.rand(3, generator=generator, requires_grad=True)
        table = testing.omegas(3, generator)["table"]
        steps = {
            "guided_score": lambda c=c, u=u, omega=omega: lgd.guided_score(c, u, omega),
            "guided_step": lambda x=x, c=c, u=u, z=z, omega=omega, levels=levels: lgd.guided_step(
                x, c, u, omega, levels, churn=0.5, noise=z, prediction="v"),
            "guided_step, drawn": lambda x=x, c=c, u=u, table=table, levels=levels: lgd.guided_step(
                x, c, u, table, levels, churn=1.0, seed=3, prediction="flow"),
            "combine": lambda x=x, c=c, u=u: lgd.combine((x, c, u), torch.ones(3, 2, 2), columns=(0, (1, 2))),
            "dynamic_threshold": lambda c=c: 2 * lgd.dynamic_threshold(c, quantile=0.9),
        }  # fmt: skip
        for name, step in steps.items():
            found = tensors(step())
            leaves = [one for one in (x, c, u, z, omega) if one.requires_grad]
            grads = torch.autograd.grad(sum(one.square().sum() for one in found), leaves, allow_unused=True)
            yield f"{name} {row}", found + [grad for grad in grads if grad is not None]
        with torch.no_grad():
            yield f"moments {row}", tensors(lgd.moments((c, u), columns=(0, (0, 1))))
            yield f"moments of a pair {row}", tensors(lgd.moments((c, u), columns=(0, 1, (0, 1))))
            yield (
                f"drawn sums {row}",
                tensors(lgd.combine((c, u), torch.ones(3, 2), noise_scale=1.0, seed=5, moments=True)),
            )
            yield f"rule {row}", [lgd.guided_score(c, u, omega, rule=rules.tcfg)]
        particles = [testing.sample((2, 4, row), dtype, generator).requires_grad_() for _ in range(4)]
        levels, omega = testing.step_levels(2), torch.rand(2, generator=generator, requires_grad=True)
        for target in (particles[3], lgd.Renoise(particles[3][:, 0].detach(), 3, 1)):
            loss = lgd.guided_energy(*particles[:3], omega, levels, target, churn=0.5, seed=1)
            grads = torch.autograd.grad(loss.sum(), (omega, *particles[:3]))
            yield f"guided_energy {row} {type(target).__name__}", [loss, *grads]
        curve = lgd.guided_energy_curve(*(one.detach() for one in particles[:3]), levels, particles[3].detach())
        yield f"guided_energy_curve {row}", [curve.loss(0.5), curve.hessian(0.5)]
    for n, width in ((70, 2), (131, 19), (200, 80)):
        x, y = (testing.sample((n, width), dtype, generator).requires_grad_() for _ in range(2))
        for kernel in (lgd.Energy(), lgd.Energy(1.75), lgd.Gaussian(2.0), lgd.Laplace(2.0), lgd.RationalQuadratic(),
                       lgd.Polynomial()):  # fmt: skip
            loss = lgd.energy_mmd(x, y, kernel=kernel, precision="direct")
            yield f"energy_mmd {width} {kernel}", [loss, *torch.autograd.grad(loss, (x, y))]
        with torch.no_grad():
            yield f"energy_mmd {width} alone", [lgd.energy_mmd(x, y, precision="direct")]


def main() -> None:
    found = {"instruction set": _C.instruction_set()}
    for shape in ((3, 1), (2, 257), (2, 8195)):
        found[f"noise {shape}"] = [lgd.philox_normal(shape, 7)]
    for dtype in testing.DTYPES:
        found |= {f"{name} {dtype}": result for name, result in results(dtype)}
    if len(sys.argv) > 1:
        torch.save({name: value if isinstance(value, str) else [one.detach() for one in value]
                    for name, value in found.items()}, sys.argv[1])  # fmt: skip
    digests = {
        name: value if isinstance(value, str)
        else hashlib.sha256(b"".join(one.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                                     for one in value)).hexdigest()[:16]
        for name, value in found.items()
    }  # fmt: skip
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
