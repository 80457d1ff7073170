"""Rows as a table, and against those of an older run."""

from __future__ import annotations

from benchmarks.timing import spread

WIDTHS = 31, 9, 13, 9, 9, 7, 6, 6, 12, 9, 8
TITLES = "", "median", "p20..p80", "graph", "host", "GB/s", "copy", "ratio", "p20..p80", "memory", "error"
LEGEND = """GB/s: bytes that must move / median. copy: percent of the bandwidth of a copy of as many bytes, in this run.
ratio: time of the best baseline (1.00) / this time, round by round: above 1 is faster. memory: peak beyond the inputs.
error: largest, against float64, relative to the largest value. "coefficients given" does less: a bound, no baseline."""


def heading() -> str:
    return line(TITLES)


def table(row: dict) -> str:
    """One line for what is measured, one for each variant."""
    size = f"{row['bytes'] / 1e6:.3g} MB" + (f", {row['flops'] / 1e9:.3g} GFLOP" if row["flops"] else "")
    cold = ", cold" if row["cold"] else ""
    lines = [f"{name_of(row)} ({size}{cold})", *(variant(one, row) for one in row["variants"]), copy(row)]
    for one in row["variants"]:
        lines += [
            f"  {one['name']}: no {timer}: {why}" for timer, why in one["samples"].items() if isinstance(why, str)
        ]
    return "\n".join([*lines, ""])


def name_of(row: dict) -> str:
    return f"{row['op']} {compact(row['shape'])} {row['dtype']}, {row['case']}: {row['kind']}"


def variant(one: dict, row: dict) -> str:
    if one["status"] != "ok":
        return f"  {one['name']:28} {one['status']}: {one['message']}"
    median, low, high = spread(one["samples"]["direct"])
    others = [_time_or_dash(one["samples"].get(timer)) for timer in ("graph", "host")]
    ratio = one["ratio"].get("direct")
    return line((
        f"  {one['name']}", seconds(median), interval(low, high, median), *others,
        digits(row["bytes"] / median / 1e9), f"{100 * one['of_copy']['direct'][0]:.0f}%",
        times(ratio[0]) if ratio else "", f"{times(ratio[1])}..{times(ratio[2])}" if ratio else "",
        "" if one["memory"] is None else bytes_(one["memory"]), "" if one["error"] is None else f"{one['error']:.1e}",
    ))  # fmt: skip


def copy(row: dict) -> str:
    median, low, high = spread(row["copy"]["direct"])
    others = [_time_or_dash(row["copy"].get(timer)) for timer in ("graph", "host")]
    bandwidth = digits(row["bytes"] / median / 1e9)
    return line(("  copy", seconds(median), interval(low, high, median), *others, bandwidth, "100%", *[""] * 4))


def compare(old: dict, new: dict) -> list[str]:
    """A line for each of our timings in both runs: what it was of the run's own copy and best baseline, then and now.

    Times of different runs are not compared: machines differ, and so do their afternoons. A change counts if both
    ratios moved the same way by more than 5 % and left the other run's p20..p80.
    """
    before, lines, verdicts = ours(old), [], {"slower": 0, "faster": 0}
    for key, one in ours(new).items():
        if key not in before:
            lines.append(f"{'new':9} {key}")
            continue
        moves = [
            (before[key][what]["direct"], one[what]["direct"])
            for what in ("of_copy", "ratio")
            if "direct" in before[key][what] and "direct" in one[what]
        ]
        verdict = "no change"
        if moves and all(then[1] > now[2] and now[0] < 0.95 * then[0] for then, now in moves):
            verdict = "slower"
        elif moves and all(then[2] < now[1] and now[0] > 1.05 * then[0] for then, now in moves):
            verdict = "faster"
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        names = ("of copy", "ratio")
        said = ", ".join(
            f"{name} {then[0]:.2f} -> {now[0]:.2f}" for name, (then, now) in zip(names, moves, strict=False)
        )
        lines.append(f"{verdict:9} {key}: {said}")
    verdicts["only in the older run"] = len(before.keys() - ours(new).keys())
    return [*lines, ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())]


def ours(run: dict) -> dict[str, dict]:
    """Our timed variants by what they are of."""
    return {
        f"{name_of(row)}, {one['name']}": one
        for row in run["rows"]
        for one in row["variants"]
        if one["ours"] and one["status"] == "ok"
    }


def line(cells) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    return (f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in rest)).rstrip()


def compact(shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def seconds(value: float) -> str:
    size, unit = unit_of(value)
    return f"{digits(value / size)} {unit}"


def interval(low: float, high: float, like: float) -> str:
    """In the unit of `like`."""
    size, _ = unit_of(like)
    return f"{digits(low / size)}..{digits(high / size)}"


def unit_of(value: float) -> tuple[float, str]:
    return next(
        ((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if value >= size), (1e-9, "ns")
    )


def digits(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def bytes_(count: int) -> str:
    return (
        f"{digits(count / 1e6)} MB" if count >= 1e6 else f"{digits(count / 1e3)} kB" if count >= 1e3 else f"{count} B"
    )


def _time_or_dash(samples) -> str:
    if samples is None:
        return ""
    return seconds(spread(samples)[0]) if isinstance(samples, list) else "-"
