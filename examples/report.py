"""The demo's table and its self-contained HTML report."""

from __future__ import annotations

from html import escape
from pathlib import Path

FIGURES = {
    "energy": ("energy distance per class", "lower is better; the primary figure"),
    "energy_overall": ("energy distance overall", "lower is better"),
    "frechet": ("Fréchet distance on pixels", "lower is better"),
    "accuracy": ("classifier accuracy", "higher is better"),
}

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem }
p.lead { color: #555; margin-top: 0 } figure { margin: 1rem 0 } img { max-width: 100%; display: block }
figcaption, .note { color: #555; font-size: .88rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; border-bottom: 1px solid #e3e5e8; white-space: nowrap }
th { font-weight: 600; font-size: .88rem } th:first-child, td:first-child { text-align: left }
tr.learned td { font-weight: 650; color: #b3263e }
.warn { background: #fff3cd; padding: .5rem .8rem; border-radius: 4px }
"""


def text_table(metrics: dict) -> str:
    """What the demo prints: every figure, mean over the seeds, and the paired differences of the primary one."""
    summary, seeds = metrics["summary"], metrics["seeds"]
    lines = [f"held-out digits, {many(len(seeds))}, noise {metrics['config']['noise']}: mean ± standard deviation", ""]
    lines.append(f"{'':10}" + "".join(f"{title:>29}" for title, _ in FIGURES.values()))
    for method, values in summary["methods"].items():
        lines.append(f"{method:10}" + "".join(f"{plus_minus(values[name]):>29}" for name in FIGURES))
    lines += ["", "energy distance per class, paired differences (below 0: learned is better)"]
    for pair, values in summary["paired"].items():
        each = " ".join(f"{value:+.3f}" for value in values["energy"]["values"])
        lines.append(f"{pair:20} {signed(values['energy'])}   by seed: {each}")
    lines += ["", loss_share(metrics)]
    if metrics["quick"]:
        lines += ["", "--quick: the machinery was run, the figures mean nothing"]
    return "\n".join(lines)


def write_report(path: Path, metrics: dict, shown: list[dict]) -> None:
    """One HTML file with its pictures inside."""
    from examples.figures import draw

    pictures = draw(metrics, shown)
    path.write_text(page(metrics, pictures), encoding="utf-8")


def page(metrics: dict, pictures: dict[str, str]) -> str:
    config, seeds = metrics["config"], metrics["seeds"]
    replaced = "0 to 75 % over the classes" if config["noise"] == "rising" else "40 % in every class"
    quick = '<p class="warn">--quick: the machinery was run, the figures mean nothing.</p>' if metrics["quick"] else ""
    versions = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in metrics["versions"].items())
    first = f"Seed {seeds[0]['seed']}"
    captions = {
        "samples": f"{first}, the first eight of each class. Every method starts from the same noise.",
        "path": "The learned weight along the sampling path. Colour: share of the class's captions that are wrong, "
        "which nothing told the network.",
        "heat": "Learned omega for a step from t to s, mean over the seeds: the two cleanest and the two noisiest "
        "classes. The blue line is the sampling path; steps shorter than delta were not trained on.",
        "classes": "Energy distance of each class on the test split: mean over the seeds, and the seeds as dots.",
        "reward": "Reward of the samples against their energy distance, both on the test split, as gamma grows. Thin: "
        "the seeds. Thick: their mean.",
        "ablations": f"The primary figure on the test split as one number is changed, {config['variant_steps']} steps "
        "of learning each. Dots: the seeds. Line: their mean. Dashed: the default.",
        "choice": f"{first}: the primary figure of every setting on the validation split.",
    }
    ablated = ""
    if "ablations" in pictures:
        ablated = "<h2>Ablations</h2>" + figure(pictures["ablations"], captions["ablations"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Learned guidance on handwritten digits</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Learned guidance on handwritten digits</h1>
<p class="lead">A small denoiser was trained on captions that were replaced at random ({replaced}). Guidance
<i>g = c + omega (c − u)</i> repairs part of the damage. Is a weight omega(class, s, t), learned on clean labels with
the self-consistency loss, better than one number, or one number on an interval?</p>{quick}
<h2>Results on held-out digits</h2>{results(metrics)}
<p class="note">Mean ± standard deviation over {many(len(seeds))}; each seed has its own split, wrong captions and
networks. Energy distance: 2E|x − y| − E|x − x'| − E|y − y'| in pixels from −1 to 1, unbiased, so that 0 is a perfect
score. The classifier, trained on real digits, is right on
{percent([seed["accuracy_real"] for seed in seeds])} of the test split.</p>
<h3>Paired differences, learned − other</h3>{differences(metrics)}
<h3>Seed by seed: energy distance per class, mean over the classes</h3>{by_seed(seeds)}
<p class="note">"per class" is the grid searched ten times, once for each class with its own part of the figure: what
hand-made guidance can reach where every condition can be tuned alone. "baked" is the learned network as a table of
21 x 21 knots for each class (largest error {max(seed["bake_error"] for seed in seeds):.3f}), "fitted" a table of
8 x 8 fitted to the loss of {config["fit_items"]} items, without a network or a choice on the validation split,
"L2" the network learned with beta 2, lam 0. All settings were chosen
on the validation split with this same figure: the constant among
{len(config["constants"])}, the interval among {len(seeds[0]["validation"]["interval"])}, the learned weight among
{len(seeds[0]["validation"]["learned"])} checkpoints.</p>
<h2>Samples</h2>
{figure(pictures["samples"], captions["samples"])}
<h2>Where guidance is needed</h2>
{figure(pictures["path"], captions["path"])}
{figure(pictures["heat"], captions["heat"])}
{figure(pictures["classes"], captions["classes"])}
<h2>With a reward</h2>
<p class="note">The loss L + gamma L_R, L_R the mean negative log-probability that a small classifier gives the
digit asked for, at the guided estimate of x0. {config["variant_steps"]} steps from the start for each gamma; measured
on the test split. The classifier of the accuracy is another one.</p>{reward_table(metrics)}
{figure(pictures["reward"], captions["reward"])}
{ablated}
<h2>How the settings were chosen</h2>
{figure(pictures["choice"], captions["choice"])}
<h2>What learning costs</h2>
<p>{escape(loss_share(metrics))}</p>
<p class="note">A step of training: a batch of 256 items with 4 particles of 64 pixels each, the denoiser's predictions
(or those of a cache), omega, the loss, and the update. The loss: drawing the noise, the guided step, the energy, and
the gradient down to omega. Both forms were trained with in turn, {config["timing_rounds"]} steps of each and seed;
medians, on this machine and with {many(metrics["versions"]["threads"], "thread")}, whatever else was running.</p>
<h2>Settings</h2>
<p class="note">{config["sampling_steps"]} sampling steps, churn 0; learned with churn 1, 4 particles, beta 1.75,
lam 1. {config["validation_samples"]} samples per class and setting for validation, {config["test_samples"]} for test.
{versions}. {sum(seed["seconds"] for seed in seeds):.0f} s in total.</p>
</body></html>
"""


def results(metrics: dict) -> str:
    head = "".join(f"<th>{title}<br><small>{hint}</small></th>" for title, hint in FIGURES.values())
    rows = "".join(
        f'<tr class="{method}"><td>{method}</td>'
        + "".join(f"<td>{plus_minus(values[name])}</td>" for name in FIGURES)
        + "</tr>"
        for method, values in metrics["summary"]["methods"].items()
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def differences(metrics: dict) -> str:
    head = "".join(f"<th>{title}</th>" for title, _ in FIGURES.values())
    rows = "".join(
        f"<tr><td>{pair.replace('-', '−')}</td>"
        + "".join(f"<td>{signed(values[name])}</td>" for name in FIGURES)
        + "</tr>"
        for pair, values in metrics["summary"]["paired"].items()
    )
    note = "In brackets: 95 % t-interval of the mean over the seeds." if len(metrics["seeds"]) > 1 else ""
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div><p class="note">{note}</p>'


def by_seed(seeds: list[dict]) -> str:
    rows = ""
    for seed in seeds:
        chosen = seed["chosen"]
        interval, learned = chosen["interval"], chosen["learned"]
        energy = {method: values["energy"] for method, values in seed["test"].items()}
        rows += (
            f"<tr><td>{seed['seed']}</td>"
            + "".join(f"<td>{value:.3f}</td>" for value in energy.values())
            + f"<td>{energy['learned'] - energy['constant']:+.3f}</td>"
            + f"<td>{energy['learned'] - energy['interval']:+.3f}</td>"
            + f"<td>{chosen['constant']['omega']:g}</td>"
            + f"<td>{interval['omega']:g} on [{interval['low']:g}, {interval['high']:g}]</td>"
            + f"<td>{learned['delta']:g}, {learned['s_min']:g}, {learned['steps']}</td></tr>"
        )
    heads = (
        "seed", *seeds[0]["test"], "learned −<br>constant", "learned −<br>interval",
        "best constant", "best interval", "delta, s_min, steps",
    )  # fmt: skip
    head = "".join(f"<th>{title}</th>" for title in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def figure(picture: str, caption: str) -> str:
    return f'<figure><img src="{picture}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def plus_minus(value: dict) -> str:
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def signed(value: dict, digits: int = 3) -> str:
    interval = value["interval95"]
    mean = f"{value['mean']:+.{digits}f}"
    return mean + (f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else "")


def percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} %"


def loss_share(metrics: dict) -> str:
    said = []
    for kind, share in metrics["summary"]["loss_share"].items():
        where = "of a training step" if kind == "predicted" else "of one with cached predictions"
        eager, fused = (f"{100 * share[name]:.0f} %" for name in ("eager", "one_pass"))
        said.append(
            f"The loss takes {eager} {where} in eager PyTorch and {fused} in one pass (guided_energy): the loss is "
            f"{share['loss_ratio']:.1f} and the step {share['step_ratio']:.2f} times as fast."
        )
    fit = metrics["summary"]["fit"]
    took = fit["predicted"] + fit["fitted"]
    said.append(
        f"The fitted table took {took:.1f} s ({fit['predicted']:.1f} s of it the denoiser's), the network "
        f"{fit['network']:.1f} s: {fit['network'] / took:.1f} times as long."
    )
    return " ".join(said)


def reward_table(metrics: dict) -> str:
    """Mean over the seeds, for each gamma."""
    sweeps = [seed["reward"] for seed in metrics["seeds"]]
    rows = ""
    for i, at in enumerate(sweeps[0]):
        means = {name: sum(sweep[i][name] for sweep in sweeps) / len(sweeps) for name in at}
        rows += f"<tr><td>{at['gamma']:g}</td>" + "".join(
            f"<td>{means[name]:.3f}</td>" for name in ("reward", "energy", "accuracy", "omega")
        )
    heads = ("gamma", "log-probability of the digit", "energy distance per class", "accuracy", "mean omega")
    head = "".join(f"<th>{title}</th>" for title in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def many(number: int, noun: str = "seed") -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")
