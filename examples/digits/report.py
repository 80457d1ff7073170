"""Print the table of the digits, and make their report."""

from __future__ import annotations

from typing import Any

from examples.digits.figures import draw
from examples.digits.study import FIGURES
from examples.shared.report import QUICK, Table, many, percent, plus_minus, render, signed

TITLES = {
    "energy": ("energy distance per class", "lower is better; the primary figure"),
    "energy_overall": ("energy distance overall", "lower is better"),
    "frechet": ("Fréchet distance on pixels", "lower is better"),
    "accuracy": ("classifier accuracy", "higher is better"),
}


def text_table(metrics: dict[str, Any]) -> str:
    """Return what the command prints: every figure over the seeds, and the paired differences of the primary one."""
    summary, seeds = metrics["summary"], metrics["seeds"]
    lines = [f"held-out digits, {many(len(seeds))}, noise {metrics['config']['noise']}: mean ± standard deviation", ""]
    lines.append(f"{'':10}" + "".join(f"{TITLES[name][0]:>29}" for name in FIGURES))
    for method, values in summary["methods"].items():
        lines.append(f"{method:10}" + "".join(f"{plus_minus(values[name]):>29}" for name in FIGURES))
    lines += ["", "energy distance per class, paired differences (below 0: learned is better)"]
    for pair, values in summary["paired"].items():
        each = " ".join(f"{value:+.3f}" for value in values["energy"]["values"])
        lines.append(f"{pair:20} {signed(values['energy'])}   by seed: {each}")
    lines += ["", *cost(metrics)]
    return "\n".join(lines + (["", QUICK] if metrics["quick"] else []))


def page(metrics: dict[str, Any], shown: list[dict]) -> str:
    """Return the report. `shown` holds what `study.run_seed` returns under "show", for each seed."""
    seeds = metrics["seeds"]
    heads = [TITLES[name] for name in FIGURES]
    summary = metrics["summary"]
    return render(
        "digits/report.html",
        metrics=metrics,
        config=metrics["config"],
        seeds=seeds,
        first=f"Seed {seeds[0]['seed']}",
        pictures=draw(metrics, shown),
        results=Table(
            [("", ""), *heads],
            [[method, *(plus_minus(one[name]) for name in FIGURES)] for method, one in summary["methods"].items()],
        ),
        differences=Table(
            [("", ""), *heads],
            [
                [pair.replace("-", "−"), *(signed(one[name]) for name in FIGURES)]
                for pair, one in summary["paired"].items()
            ],
        ),
        by_seed=by_seed(seeds),
        rewards=rewards([seed["reward"] for seed in seeds]),
        cost=cost(metrics),
    )


def by_seed(seeds: list[dict]) -> Table:
    """Return the primary figure of every method, and the settings that were chosen, for each seed."""
    heads = [(title, "") for title in ("seed", *seeds[0]["test"])]
    heads += [("learned", "− constant"), ("learned", "− interval"), ("constant", "best"), ("interval", "best")]
    rows = []
    for seed in seeds:
        chosen = seed["chosen"]
        interval, learned = chosen["interval"], chosen["learned"]
        energy = {method: values["energy"] for method, values in seed["test"].items()}
        rows.append(
            [
                str(seed["seed"]),
                *(f"{value:.3f}" for value in energy.values()),
                f"{energy['learned'] - energy['constant']:+.3f}",
                f"{energy['learned'] - energy['interval']:+.3f}",
                f"{chosen['constant']['omega']:g}",
                f"{interval['omega']:g} on [{interval['low']:g}, {interval['high']:g}]",
                f"{learned['delta']:g}, {learned['s_min']:g}, {learned['steps']}",
            ]
        )
    return Table([*heads, ("learned", "delta, s_min, steps")], rows)


def rewards(sweeps: list[list[dict]]) -> Table:
    """Return the means over the seeds for each gamma."""
    titles = {
        "gamma": "gamma",
        "reward": "log-probability of the digit",
        "energy": "energy distance per class",
        "accuracy": "accuracy",
        "omega": "mean omega",
    }
    rows = []
    for at in zip(*sweeps, strict=True):
        means = {name: sum(row[name] for row in at) / len(at) for name in titles}
        rows.append([f"{means.pop('gamma'):g}", *(f"{mean:.3f}" for mean in means.values())])
    return Table([(title, "") for title in titles.values()], rows)


def cost(metrics: dict[str, Any]) -> list[str]:
    """Return, in a sentence each, what share of a training step the loss takes and what the fitted table costs."""
    lines = []
    for kind, share in metrics["summary"]["loss_share"].items():
        step = "of a training step" if kind == "predicted" else "of a training step with cached predictions"
        lines.append(
            f"The loss takes {percent(share['eager'])} {step} in eager PyTorch and {percent(share['one_pass'])} in one "
            f"pass (guided_energy): the loss is {share['loss_ratio']:.1f} times and the step "
            f"{share['step_ratio']:.2f} times as fast."
        )
    fit = metrics["summary"]["fit"]
    took = fit["predicted"] + fit["fitted"]
    lines.append(
        f"The fitted table took {took:.1f} s, of which the denoiser took {fit['predicted']:.1f} s; the network took "
        f"{fit['network']:.1f} s, {fit['network'] / took:.1f} times as long."
    )
    return lines
