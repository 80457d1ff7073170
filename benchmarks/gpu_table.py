"""The rows of a result of `make gpu` as a Markdown table, for README.md and docs/."""

from __future__ import annotations

from benchmarks.report import compact, seconds, times
from benchmarks.timing import spread

TITLES = (
    "call", "size", "ours", "time", "of a copy's bandwidth", "in a graph", "on the host", "best other",
    "ratio [p20, p80]",
)  # fmt: skip


def table(result: dict) -> list[str]:
    """Return the rows of ours as a Markdown table, with date and versions. A dry run has no figures."""
    if result["dry"]:
        raise ValueError("this is the result of a dry run: its times are no measurement")
    e = result["environment"]
    versions = ", ".join(f"{name} {e.get(name) or 'unknown'}" for name in ("driver", "torch", "triton", "nvcc"))
    commit = e.get("commit", "unknown")[:10] + (" with changes" if e.get("dirty") else "")
    ours = [
        (row, one)
        for phase in result["phases"].values() for row in phase["rows"].values()
        for one in row.get("variants", ()) if one["ours"] and one["status"] == "ok"
    ]  # fmt: skip
    lines = [f"{result['date'][:10]}, commit {commit}, {e['gpu']}; {versions}.", ""]
    lines += [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    return lines + [line(row, one) for row, one in ours]


def line(row: dict, mine: dict) -> str:
    taken = {timer: seconds(spread(found)[0]) for timer, found in mine["samples"].items() if isinstance(found, list)}
    ratio, kind = mine["ratio"].get("direct"), "" if row["kind"] == "forward" else f", {row['kind']}"
    return "| " + " | ".join([
        f"`{row['op']}` {row['case']}{kind}",
        f"{compact(row['shape'])} {row['dtype'].replace('float', 'f')}",
        mine["name"], taken["direct"], f"{100 * mine['of_copy']['direct'][0]:.0f} %",
        taken.get("graph", "-"), taken.get("host", "-"), row["best"]["direct"] or "-",
        f"{times(ratio[0])} [{times(ratio[1])}, {times(ratio[2])}]" if ratio else "-",
    ]) + " |"  # fmt: skip
