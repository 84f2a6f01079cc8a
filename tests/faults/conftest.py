"""One server for all fault tests, and at the end what was done how often."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import Runs, tally


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where several processes share the tests, each hands in its own count."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = dict(tally)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    tally.update(getattr(node, "workeroutput", {}).get("tally", {}))  # nothing of one that crashed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tally:
        terminalreporter.section("faults")
        for what, times in sorted(tally.items()):
            terminalreporter.line(f"{times:5}  {what}")
