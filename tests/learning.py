"""A small run of learning that several processes can start alike: `python tests/learning.py FOLDER STEPS [die]`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import lgd_kernels as lgd
from lgd_kernels.learn import Frozen, Settings, Trainer
from lgd_kernels.learn.distributed import process_group, rank_and_size
from lgd_kernels.learn.logs import JsonLines

ROOT = Path(__file__).parents[1]
EVERY = 10


class Omega(nn.Module):
    """Small, with dropout where asked for: the one part that draws from torch's global generator."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.condition = nn.Embedding(3, 8)
        self.head = nn.Sequential(nn.Linear(10, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 1))
        nn.init.constant_(self.head[-1].bias, 1.0)

    def forward(self, c, s, t):
        return self.head(torch.cat((self.condition(c), s[:, None], t[:, None]), 1)).squeeze(1).relu()


def denoiser(x, t, c):
    """Half of what it should say."""
    return 0.5 * (c - 1)[:, None] * torch.ones_like(x)


def data(n: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(1, 3, (n,), generator=generator)
    return (c - 1)[:, None] + 0.1 * torch.randn(n, 6, generator=generator), c


def trainer(folder=None, dropout: float = 0.0, denoiser=denoiser, logs=None, device="cpu", **settings) -> Trainer:
    torch.manual_seed(5)
    omega = Omega(dropout).to(device)
    settings = Settings(**{"batch": 11, "lr": 3e-3, "seed": 3, **settings})  # 11: no two parts are of one size
    logs = [JsonLines(Path(folder) / "log.jsonl")] if folder and logs is None else logs or []
    frozen = Frozen(denoiser, lgd.RectifiedFlow(), null=0)
    return Trainer(omega, frozen, data(), settings, held_out=data(20, 1), folder=folder, every=EVERY, logs=logs)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(run: Trainer) -> list[torch.Tensor]:
    """All that a run is made of."""
    optimizer = [value for weight in run.optimizer.state.values() for value in weight.values()]
    generators = [run.batches.generator.get_state(), torch.get_rng_state()]
    return [*run.omega.state_dict().values(), *run.ema.state_dict().values(), *optimizer, *generators]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def dying(at: int):
    """The denoiser, which kills its process the at-th time it is called."""
    calls = 0

    def counted(x, t, c):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return denoiser(x, t, c)

    return counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    with process_group("gloo"):
        run = trainer(folder, dropout=0.3, denoiser=dying(20)) if "die" in sys.argv else trainer(folder)
        run.train(steps)
        torch.save(run.omega.state_dict(), folder / f"omega{rank_and_size()[0]}.pt")
