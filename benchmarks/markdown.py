"""The short table of a run, as docs/benchmarks.md carries it: between two comments, by which a test finds it and the
run that it came from."""

from __future__ import annotations

from benchmarks.report import bytes_, compact, seconds, times
from benchmarks.timing import spread

TITLES = "op", "size", "ours", "best other", "ratio [p20, p80]", "memory, ours / theirs"


def block(run: dict, name: str) -> str:
    """The table, its conditions, and the comments around them; `name` is the file in benchmarks/results/."""
    return "\n".join([f"<!-- benchmarks: {name} -->", conditions(run["environment"]), "", *table(run), "<!-- end -->"])


def conditions(e: dict) -> str:
    commit = e["commit"][:10] + (" with changes" if e["dirty"] else "")
    machine = e["gpu"] if e["device"] == "cuda" else f"{e['cpu']}, {e['threads']} threads"
    peers = ", ".join(f"{name} {e[name]}" for name in ("torch", "diffusers", "geomloss", "pykeops") if name in e)
    return f"{e['date'][:10]}, commit {commit}, {machine}; {peers}."


def table(run: dict) -> list[str]:
    """A line for each of ours in each row, beside the fastest other that does the same work."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    return lines + [line(row, one) for row in run["rows"] for one in row["variants"] if one["ours"] and one["ratio"]]


def line(row: dict, mine: dict) -> str:
    best = row["best"]["direct"]
    theirs = next(one for one in row["variants"] if one["name"] == best)
    middle, low, high = mine["ratio"]["direct"]
    kind = "" if row["kind"] == "forward" else ", " + row["kind"].replace("forward + backward", "and backward")
    return "| " + " | ".join([
        f"`{row['op']}` {row['case']}{kind}",
        f"{compact(row['shape'])} {row['dtype'].replace('float', 'f')}",
        f"{mine['name']} {seconds(spread(mine['samples']['direct'])[0])}",
        f"{best} {seconds(spread(theirs['samples']['direct'])[0])}",
        f"{times(middle)} [{times(low)}, {times(high)}]",
        " / ".join("-" if one["memory"] is None else bytes_(one["memory"]) for one in (mine, theirs)),
    ]) + " |"  # fmt: skip
