"""The formulas of public policy-gradient trainers in float64, and stand-ins for the schedulers that they read."""

import math
from types import SimpleNamespace

import torch

from lgd_kernels import testing

SHAPE = (3, 4, 6, 5)


def flow_scheduler(steps=10, shift=3.0):
    """Stand for diffusers' FlowMatchEulerDiscreteScheduler after `set_timesteps`; test_with_diffusers has the real one.
    The first sigma is 1 and the last 0."""
    sigmas = torch.linspace(1, 1 / steps, steps)
    sigmas = torch.cat((shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)))
    timesteps = sigmas[:-1] * 1000
    return SimpleNamespace(
        sigmas=sigmas, timesteps=timesteps, index_for_timestep=lambda t: (timesteps == t).nonzero()[0].item()
    )


def ddim_scheduler(prediction="epsilon", steps=20, **config):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's
    config = {"clip_sample": False, "thresholding": False} | config
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type=prediction, **config)
    return SimpleNamespace(config=config, num_inference_steps=steps, alphas_cumprod=(1 - betas).cumprod(0))


def tensors(generator, dtype=torch.float32, shape=SHAPE, count=3):
    return [testing.sample(shape, dtype, generator) for _ in range(count)]


def over(values, like):
    return values.double().view(-1, *[1] * (like.ndim - 1))


def normal(x_s, mean, std):
    """log p of a normal, averaged over elements."""
    return (-((x_s - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def flow_grpo(v, x, sigmas, step, level, kind):
    """Flow-GRPO's formulas in float64: mean, standard deviation, s_t."""
    t, s, v, x = over(sigmas[step], x), over(sigmas[step + 1], x), v.double(), x.double()
    if kind == "cps":
        std = s * math.sin(level * math.pi / 2)
        mean = (x - t * v) * (1 - s) + (x + v * (1 - t)) * torch.sqrt(s**2 - std**2)
        return mean, std, std
    spread = torch.sqrt(t / (1 - torch.where(t == 1, sigmas[1].double(), t))) * level
    dt = s - t
    mean = x * (1 + spread**2 / (2 * t) * dt) + v * (1 + spread**2 * (1 - t) / (2 * t)) * dt
    return mean, spread * torch.sqrt(-dt), spread


def ddpo(p, x, scheduler, t, eta):
    """DDPO's formulas in float64: mean and standard deviation."""
    s = (t - 1000 // scheduler.num_inference_steps).clamp(min=0)
    a_t, a_s = (over(scheduler.alphas_cumprod[at], x) for at in (t, s))
    p, x = p.double(), x.double()
    if scheduler.config.prediction_type == "epsilon":
        x0, eps = (x - torch.sqrt(1 - a_t) * p) / torch.sqrt(a_t), p
    elif scheduler.config.prediction_type == "sample":
        x0, eps = p, (x - torch.sqrt(a_t) * p) / torch.sqrt(1 - a_t)
    else:
        x0 = torch.sqrt(a_t) * x - torch.sqrt(1 - a_t) * p
        eps = torch.sqrt(a_t) * p + torch.sqrt(1 - a_t) * x
    std = eta * torch.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    return torch.sqrt(a_s) * x0 + torch.sqrt(1 - a_s - std**2) * eps, std
