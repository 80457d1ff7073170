"""A plugin of pytest for `make gpu`: `pytest -p benchmarks.gpu_tests --record FILE --phase b --impl cuda`.

It keeps the tests of one implementation, and appends a line to the file when a test begins and when it ends, so that
a process that is killed leaves what ran, and which test was running.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_results import append


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--record", type=Path, help="the file to append to")
    group.addoption("--phase", help="the phase that these tests are part of")
    group.addoption("--impl", help="the implementation whose tests are kept")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "gpu-recorder")


class Recorder:
    """What a run of pytest appends. Workers of xdist are silent but for what they collected: the first process hears
    of every test."""

    def __init__(self, config: pytest.Config) -> None:
        self.record, self.phase, self.impl = (config.getoption(name) for name in ("--record", "--phase", "--impl"))
        self.silent = hasattr(config, "workerinput")
        self.outcomes: dict[str, tuple[str, float, str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self.impl in implementations(item)]
        config.hook.pytest_deselected(items=[item for item in items if self.impl not in implementations(item)])
        items[:] = kept

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            append(self.record, phase=self.phase, collected=len(session.items), of=session.config.args[0])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed and not self.silent:
            append(self.record, phase=self.phase, test=report.nodeid, outcome=report.outcome, message=reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.silent:
            append(self.record, phase=self.phase, test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has up to three reports: the worst one counts, and the last one is followed by logfinish."""
        seconds = report.duration + self.outcomes.get(report.nodeid, ("", 0.0, ""))[1]
        worst = self.outcomes.get(report.nodeid, ("passed", 0.0, ""))
        if not report.passed and worst[0] == "passed":
            worst = report.outcome, 0.0, reason(report)
        self.outcomes[report.nodeid] = worst[0], seconds, worst[2]
        if report.when not in ("setup", "call", "teardown"):  # a worker of xdist crashed: nothing follows
            self.pytest_runtest_logfinish(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not self.silent and nodeid in self.outcomes:
            outcome, seconds, message = self.outcomes.pop(nodeid)
            seconds = round(seconds, 3)
            append(self.record, phase=self.phase, test=nodeid, outcome=outcome, seconds=seconds, message=message)


def implementations(item: pytest.Item) -> set[str]:
    """Return the implementations that a test is of: its target's, or its parameter `impl`."""
    given = getattr(item, "callspec", None)
    parameters = given.params if given else {}
    return {getattr(parameters.get("target"), "impl", ""), str(parameters.get("impl", ""))}


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of why a test failed, or was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr).strip().split("\n")[-1]).split("\n")[0][:500]
