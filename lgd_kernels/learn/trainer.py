"""Learn omega(c, s, t) in the paper's loop, with checkpoints and logs for long runs."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgd_kernels.learn import checkpoint, distributed
from lgd_kernels.learn.batches import Batches, Settings
from lgd_kernels.learn.data import Data, size_of
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.learn.logs import Row
from lgd_kernels.learn.losses import self_consistency_loss
from lgd_kernels.learn.particles import Particles
from lgd_kernels.learn.reward import Loss
from lgd_kernels.omega.common import know
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import OmegaTable, TableModule
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.progress import Track, silent


class NotFinite(ArithmeticError):
    """Report a loss, a gradient or a weight that is NaN or infinite; omega is as before the update."""


class Trainer:
    """Learn omega for a frozen denoiser.

    Args:
        omega: a module called as `omega(c [B], s [B], t [B]) -> [B]`: a network, or one of `lgd_kernels.omega.forms`.
            The trainer trains the module in place; `trainer.ema` is its average. An `OmegaTable` is copied into a
            `TableModule`, and `trainer.ema.table()` returns the table.
        frozen: the denoiser, on the same device.
        data: `(x0 [N, ...], c [N, ...])`, or a dataset of pairs (x0, c).
        settings: see `Settings`.
        loss: `(particles, omega [B]) -> [B]`, such as those of `lgd_kernels.learn`, `functools.partial` of one with
            other options, or `with_reward(...)`.
        held_out: more such data, for a loss of the average omega on fixed draws.
        folder: of the checkpoint; None writes no checkpoint. The trainer creates the folder. While one trainer trains
            in a folder, another one, also in another process, raises ValueError.
        every: the interval, in updates, at which the trainer logs a row and writes a checkpoint; it does so at the end
            too.
        logs: functions that take each row, a dict of numbers: see `lgd_kernels.learn.logs`.
        cache_folder: where the `settings.cache` predicted items lie in files, mapped and not read into memory; a folder
            that holds none is filled. With several processes, each needs a folder of its own.

    Raises TypeError or ValueError, naming the argument.

    `train(steps)` goes on until `steps` updates are done in all. `resume()` continues from the checkpoint with the same
    bits as a run without interruption: a run that is killed loses one interval at most. Under torchrun each process
    takes its part of every batch, and together they train on the same batches as one process: see
    `lgd_kernels.learn.distributed`.

    >>> import torch, lgd_kernels as lgd
    >>> from lgd_kernels.learn import Frozen
    >>> class Constant(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.value = torch.nn.Parameter(torch.tensor(1.0))
    ...     def forward(self, c, s, t):
    ...         return self.value.relu().expand(len(s))
    >>> frozen = Frozen(lambda x, t, c: x * 0 + c[:, None], lgd.RectifiedFlow(), null=0)  # g = 1 + omega
    >>> data = torch.full((64, 3), 3.0), torch.ones(64, dtype=torch.int64)
    >>> trainer = Trainer(Constant(), frozen, data, Settings(lr=0.05, batch=32))
    >>> trainer.train(100)
    >>> bool((trainer.omega.value - 2).abs() < 0.1)
    True
    """

    def __init__(
        self,
        omega: nn.Module | OmegaTable,
        frozen: Frozen,
        data: Data,
        settings: Settings | None = None,
        *,
        loss: Loss = self_consistency_loss,
        held_out: Data | None = None,
        folder: Path | str | None = None,
        every: int = 500,
        logs: Sequence[Callable[[Row], None]] = (),
        cache_folder: Path | str | None = None,
    ) -> None:
        omega = TableModule(omega) if isinstance(omega, OmegaTable) else omega
        if not isinstance(omega, nn.Module) or not any(weight.requires_grad for weight in omega.parameters()):
            raise TypeError(
                f"Trainer: `omega` is a {type(omega).__name__}, expected a torch.nn.Module with parameters to learn, "
                "or an OmegaTable"
            )
        self.settings = settings = Settings() if settings is None else settings
        if not isinstance(settings, Settings):
            raise TypeError(f"Trainer: `settings` is a {type(settings).__name__}, expected lgd_kernels.learn.Settings")
        if not isinstance(frozen, Frozen):
            raise TypeError(f"Trainer: `frozen` is a {type(frozen).__name__}, expected lgd_kernels.learn.Frozen")
        if not callable(loss):
            raise TypeError(
                f"Trainer: `loss` is a {type(loss).__name__}, expected a function (particles, omega) -> [B]"
            )
        if not isinstance(logs, Sequence) or not all(callable(log) for log in logs):
            raise TypeError(f"Trainer: `logs` is {logs!r}, expected a list of functions that take a row; logs=[...]")
        checks.count("Trainer", "every", every)
        if settings.batch < distributed.rank_and_size()[1]:
            raise ValueError(f"Trainer: a batch of {settings.batch} leaves a process with nothing to do")
        self.omega, self.loss, self.held_out = omega, loss, held_out
        self.path = Path(folder) / "trainer.ckpt" if folder is not None else None
        self.every, self.logs, self.step = every, logs, 0
        with self._alone():
            pass  # an invalid folder raises now, not at the first checkpoint
        self.device = next(omega.parameters()).device
        self.batches = Batches(frozen, data, settings, self.device, cache_folder)
        self.parallel = distributed.parallel(omega)
        self.ema = copy.deepcopy(omega).requires_grad_(False).eval()
        if isinstance(omega, (OmegaNetwork, TableModule, Constant, Interval, ClampLinear)):  # files store both
            know(self.ema, getattr(omega, "schedule", frozen.schedule), frozen.prediction)
        self.weights: list[Tensor] = [weight for weight in omega.parameters() if weight.numel()]
        self.means: list[Tensor] = [mean for mean in self.ema.parameters() if mean.numel()]
        self.before = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.validation: list[Particles] | None = None

    def train(self, steps: int, track: Track = silent) -> None:
        """Update until `steps` updates are done in all. Raises NotFinite before an update would make omega NaN, and
        ValueError if another trainer trains in the folder.

        Args:
            steps: the total number of updates, with those before a resume.
            track: shows progress, such as `lgd_kernels.runtime.progress.bars("omega")`.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"Trainer.train: `steps` is {steps!r}, expected an integer, 0 or more")
        losses: Tensor | float = 0.0
        seen, started = 0, time.perf_counter()
        with self._alone():
            for _ in track(range(self.step, steps), "omega"):
                loss, norm = self.update()
                losses, seen = losses + loss, seen + 1
                if self.step % self.every == 0 or self.step == steps:
                    row = {"step": self.step, "loss": float(losses / seen), "gradient": float(norm)}
                    row["seconds"] = time.perf_counter() - started
                    losses, seen, started = 0.0, 0, time.perf_counter()
                    self.record(row)

    def update(self) -> tuple[Tensor, Tensor]:
        """Take one step of the paper's algorithm. Return the loss of the whole batch, and the norm of its gradient."""
        particles = self.batches.next()
        omega = self.parallel(particles.c, particles.s, particles.t)  # [B]
        each = self.loss(particles, omega)  # [B]
        if not isinstance(each, Tensor) or each.shape != omega.shape:
            came = list(each.shape) if isinstance(each, Tensor) else f"a {type(each).__name__}"
            raise ValueError(f"Trainer: `loss` returned {came}, expected {list(omega.shape)}, a loss for each item")
        share = distributed.rank_and_size()[1] / self.settings.batch  # gradients are averaged over the processes
        self.optimizer.zero_grad()
        (each.sum() * share).backward()
        norm = nn.utils.clip_grad_norm_(self.weights, math.inf if self.settings.clip is None else self.settings.clip)
        loss = distributed.total(each.detach().sum()) / self.settings.batch
        if not math.isfinite(float(loss) + float(norm)):
            raise NotFinite(self._seen(particles, omega, each, norm))
        with torch.no_grad():
            torch._foreach_copy_(self.before, self.weights)
            self.optimizer.step()
            largest = torch._foreach_norm(self.weights, math.inf)  # NaN where a weight is
            if not bool(torch.stack(largest).isfinite().all()):
                torch._foreach_copy_(self.weights, self.before)
                raise NotFinite(
                    f"update {self.step + 1}: AdamW made weights of omega NaN or infinite, from a loss of "
                    f"{float(loss):g} and a gradient of norm {float(norm):g}; a smaller `lr` or `weight_decay` helps"
                )
        if isinstance(self.omega, TableModule):
            self.omega.project()
        self.average()
        self.step += 1
        return loss, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss of the average omega on held-out data: a pair of times for each item, fixed draws."""
        if self.held_out is None:
            raise ValueError("Trainer.validate: there are no held-out data; pass Trainer(..., held_out=...)")
        if self.validation is None:
            size = size_of(self.held_out)
            whole = self.batches.of(self.held_out, size, self.settings.seed + 1)
            parts = torch.arange(size, device="cpu").split(self.settings.batch)
            self.validation = [whole.take(part.to(self.device), seed) for seed, part in enumerate(parts)]
        losses = [self.loss(part, self.ema(part.c, part.s, part.t)) for part in self.validation]
        return float(torch.cat(losses).mean())

    def record(self, row: Row) -> None:
        """Log a row, with the loss on held-out data if there are any, and write the checkpoint, on rank 0."""
        if distributed.rank_and_size()[0] != 0:
            return
        if self.held_out is not None:
            row["held_out"] = self.validate()
        for log in self.logs:
            log(row)
        if self.path is not None:
            self.save()

    def save(self) -> None:
        """Write the checkpoint completely or not at all. Raises NotFinite, before it writes, for NaN."""
        if self.path is None:
            raise ValueError("Trainer.save: there is no folder; pass Trainer(..., folder=...)")
        state = {"run": json.dumps(self._run()), "step": self.step, "generator": self.batches.generator.get_state()}
        state["torch"] = torch.get_rng_state()
        state["cuda"] = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        for name in ("omega", "ema", "optimizer"):
            state[name] = getattr(self, name).state_dict()
        if spoilt := checkpoint.with_nan(state):
            raise NotFinite(f"update {self.step}: NaN in {', '.join(spoilt)}; the checkpoint was not written")
        with self._alone():
            checkpoint.write(self.path, state)

    def resume(self) -> bool:
        """Continue from the checkpoint in the folder; False if there is none: then the files of `logs` start anew.

        Raises ValueError for a file that is damaged, that holds NaN, or that another run wrote: other settings, another
        omega, schedule or amount of data. (`resume` cannot compare the loss and the denoiser; pass the same.) After an
        error nothing has changed.
        """
        if self.path is None or not self.path.exists():
            self._rewind()
            return False
        state = checkpoint.read(self.path)
        wrote, here = json.loads(state["run"]), json.loads(json.dumps(self._run()))
        for name in here:
            if wrote.get(name) != here[name]:
                raise ValueError(
                    f"Trainer.resume: {self.path} is of another run: its {name} is {wrote.get(name)}, here it is "
                    f"{here[name]}; pass the same, or another folder"
                )
        if spoilt := checkpoint.with_nan(state):
            raise ValueError(f"Trainer.resume: {self.path} holds NaN in {', '.join(spoilt)}; nothing was loaded")
        for name in ("omega", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.batches.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.step = state["step"]
        self._rewind()
        return True

    def _rewind(self) -> None:
        """Drop the rows of the logs after the current step, whose updates were lost."""
        if distributed.rank_and_size()[0] == 0:
            for log in self.logs:
                getattr(log, "rewind", lambda step: None)(self.step)

    def _alone(self) -> AbstractContextManager[None]:
        """Hold the lock of the folder, if there is one, on rank 0."""
        if self.path is None or distributed.rank_and_size()[0] != 0:
            return nullcontext()
        return checkpoint.locked(self.path.parent, "Trainer: `folder`")

    def _run(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with."""
        weights = {name: [*value.shape, str(value.dtype)] for name, value in self.omega.state_dict().items()}
        frozen = f"{self.batches.frozen.schedule!r}, {self.batches.frozen.prediction}"
        return {**asdict(self.settings), "omega": weights, "denoiser": frozen, "data": size_of(self.batches.data)}

    def average(self) -> None:
        """Move the average towards the weights, after an update."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.means, self.weights, 1 - decay)
            for mean, value in zip(self.ema.buffers(), self.omega.buffers(), strict=True):
                mean.copy_(value)

    def _seen(self, particles: Particles, omega: Tensor, each: Tensor, norm: Tensor) -> str:
        """Describe an update that is not finite."""
        bad = (~each.isfinite()).nonzero().flatten().tolist()
        said = [
            f"update {self.step + 1}: the loss of {len(bad)} of {len(each)} items in this process is not finite, the "
            f"norm of the gradient is {float(norm):g}"
        ]
        for name in ("x0", "x_t", "cond", "uncond"):
            count = int((~getattr(particles, name).flatten(1).isfinite().all(1)).sum())
            said += [f"`{name}` is not finite in {count}"] if count else []
        for item in bad[:3]:
            c = f"c = {particles.c[item].item()}, " if particles.c.ndim == 1 else ""
            s, t, w = (float(one[item].detach()) for one in (particles.s, particles.t, omega))
            said += [f"item {item}: {c}s = {s:g}, t = {t:g}, omega = {w:g}"]
        return "; ".join(said)
