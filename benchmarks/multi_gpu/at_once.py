"""A pytest plugin that says of each failure at once what it was: a part may not reach its end."""

from __future__ import annotations

import pytest


class _Saying:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line("")
            self._terminal.write_line(f"{report.nodeid} failed in {report.duration:.0f} s:")
            self._terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)  # after the terminal is there
def pytest_configure(config: pytest.Config) -> None:
    """Add what says so."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(terminal, pytest.TerminalReporter)
    config.pluginmanager.register(_Saying(terminal))
