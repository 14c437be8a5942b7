"""The conformance tests of a device, in processes that they may crash (see isolated)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .isolated import MESSAGE_CHARACTERS, Channel, end_if_broken, work_through

TESTS = ("tests/conformance", "tests/test_cupy.py")
ON_GPU = ("-m", "gpu")  # see tests/conformance/conftest.py


@dataclass(frozen=True)
class Result:
    """What one test said."""

    name: str
    outcome: str  # passed, failed, skipped
    message: str = ""
    seconds: float = 0.0


def run_tests(
    arguments: Sequence[str],
    device: str,
    *,
    log: Path,
    timeout_s: float,
    jobs: int = 1,
    on_collected: Callable[[int], None] = lambda number: None,
    on_start: Callable[[str], None] = lambda name: None,
) -> Iterator[Result]:
    """Runs what pytest finds with ``arguments``, in ``jobs`` processes at a time.

    Tests that cannot be collected have failed.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    if device == "cuda":
        environment["TRITON_INTERPRET"] = "0"  # whatever the shell says
    run = partial(
        work_through,
        [sys.executable, "-m", "bench.conformance"],
        log=log,
        timeout_s=timeout_s,
        environment=environment,
    )
    settings = {"pytest": list(arguments), "device": device}
    (found,) = run(["collection"], settings=settings | {"collect": True})
    if found.error:
        yield Result("collection", "failed", found.error)
        return
    on_collected(len(found.value))
    for outcome in run(found.value, settings=settings, jobs=jobs, on_start=on_start):
        if outcome.error:
            yield Result(outcome.item, "failed", outcome.error)
        else:
            yield Result(outcome.item, **outcome.value)


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    outcomes = [test.outcome for test in results]
    return {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}


def as_json(tests: Sequence[Result]) -> dict[str, Any]:
    """Counts, and all that did not pass with its message."""
    others = [asdict(test) for test in tests if test.outcome != "passed"]
    seconds = sum(test.seconds for test in tests)
    return {**counts(tests), "seconds": seconds, "not passed": others}


def main() -> None:
    """The child: collects, or runs the tests that it is given."""
    channel = Channel()
    import pytest

    settings = channel.settings
    arguments = ["-p", "no:cacheprovider", *settings["pytest"]]
    if settings.get("collect"):
        collector = _Collector()
        code = pytest.main([*arguments, "--collect-only"], plugins=[collector])
        none = "no test was found" if code == pytest.ExitCode.NO_TESTS_COLLECTED else ""
        error = (
            collector.error or none or (f"pytest ended with {code!r}, see the log" if code else "")
        )
        channel.done("0", collector.names, error)
        return
    pytest.main(arguments, plugins=[_Reporter(channel)])


class _Collector:
    """A plugin that notes the names of the tests."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.error = ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.error = self.error or report.longreprtext[-MESSAGE_CHARACTERS:]

    def pytest_collection_finish(self, session: Any) -> None:
        self.names = [item.nodeid for item in session.items]


class _Reporter:
    """A plugin that runs the items of a channel, and tells it of each."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.numbers = {name: number for number, name in channel.items.items()}
        self.value: dict[str, Any] = {}
        self.error = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self.numbers]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.channel.start(self.numbers[nodeid])
        self.value, self.error = {"outcome": "passed", "seconds": 0.0}, ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.value["seconds"] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else report.longreprtext
            self.error = self.error or message[:MESSAGE_CHARACTERS]
        elif report.skipped:
            self.value |= {"outcome": "skipped", "message": report.longrepr[2]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.channel.done(self.numbers[nodeid], self.value, self.error)
        if self.error:
            from .device import synchronize  # torch, which tests without errors may not need

            end_if_broken(partial(synchronize, self.channel.settings["device"]))


if __name__ == "__main__":
    main()
