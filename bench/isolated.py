"""Work in child processes: what crashes, hangs or breaks its process costs one item of many.

An error of a GPU's kernel leaves its process without a GPU, and a hang never ends; so children work
through the items and tell of each, and where one ends or falls silent another goes on with what it
had left. Messages are lines of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic
from typing import Any

from . import CHECKOUT

PATIENCE_S = 10  # for a process to end, which a driver may hold
MESSAGE_CHARACTERS = 1000  # of an error, the whole of which is in the log


@dataclass(frozen=True)
class Outcome:
    """What became of an item: a value, or an error."""

    item: Any
    value: Any = None
    error: str = ""


def work_through(
    command: Sequence[str],
    items: Sequence[Any],
    *,
    log: Path,
    timeout_s: float,
    jobs: int = 1,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    on_start: Callable[[Any], None] = lambda item: None,
) -> Iterator[Outcome]:
    """The outcome of every item, as they come. ``command`` starts a child that calls ``serve``.

    An item, or the start of a child, gets ``timeout_s``; ``jobs`` children share the items. What
    they print goes to ``log``.
    """
    lines: Queue[tuple[_Child, str]] = Queue()

    def start(share: dict[int, Any]) -> _Child:
        return _Child(command, settings, share, log, environment, lines)

    numbered = list(enumerate(items))
    children = [start(dict(numbered[i::jobs])) for i in range(min(jobs, len(items)))]
    try:
        while children:
            child, message = _next_message(children, lines, timeout_s)
            if "start" in message:
                child.current = message["start"]
                on_start(child.remaining[child.current])
                continue
            if "item" in message:
                child.current = None
                item = child.remaining.pop(message["item"])
                yield Outcome(item, message["value"], message["error"])
                if child.remaining:
                    continue
            child.kill()
            children.remove(child)
            if child.current is not None:
                yield Outcome(child.remaining.pop(child.current), error=message["ended"])
            elif len(child.remaining) == child.given:  # nor will another one do anything
                for item in child.remaining.values():
                    yield Outcome(item, error=f"the process did not start: {message['ended']}")
                continue
            if child.remaining:
                children.append(start(child.remaining))
    finally:
        for child in children:
            child.kill()


def _next_message(
    children: Sequence[_Child], lines: Queue[tuple[_Child, str]], timeout_s: float
) -> tuple[_Child, dict[str, Any]]:
    """From any child; {"ended": why} from one that will send no more, or has been silent."""
    while True:
        silent = min(children, key=lambda child: child.heard)
        try:
            child, line = lines.get(timeout=max(0, silent.heard + timeout_s - monotonic()))
        except Empty:
            return silent, {"ended": f"took longer than {timeout_s:g} s"}
        if child in children:
            child.heard = monotonic()
            return child, json.loads(line) if line else {"ended": child.cause()}


class _Child:
    """A process, and what it has not yet done."""

    def __init__(
        self,
        command: Sequence[str],
        settings: Mapping[str, Any] | None,
        items: dict[int, Any],
        log: Path,
        environment: Mapping[str, str] | None,
        lines: Queue[tuple[_Child, str]],
    ) -> None:
        self.remaining, self.given, self.current = items, len(items), None
        self.heard = monotonic()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # the group of all that it starts, which ends with it
            )
        request = json.dumps({"settings": settings or {}, "items": items})
        Thread(target=self._talk, args=(request, lines), daemon=True).start()

    def cause(self) -> str:
        """Why it sends no more."""
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "its process closed its output, and did not end"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process ended: {cause}"

    def kill(self) -> None:
        """Ends the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)

    def _talk(self, request: str, lines: Queue[tuple[_Child, str]]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and its last message says so
            self._process.stdin.write(request)
            self._process.stdin.close()
        for line in self._process.stdout:
            lines.put((self, line))
        lines.put((self, ""))


class Channel:
    """The child's side: what it was asked, and its replies. What else it prints goes to the log."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        request = json.load(sys.stdin)
        self.settings: dict[str, Any] = request["settings"]
        self.items: dict[str, Any] = request["items"]

    def start(self, number: str) -> None:
        """Work on an item begins."""
        self._send(start=int(number))

    def done(self, number: str, value: Any = None, error: str = "") -> None:
        """Work on an item has ended."""
        self._send(item=int(number), value=value, error=error)

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._replies, flush=True)


def serve(channel: Channel, work: Callable[[Any], Any], synchronize: Callable[[], None]) -> None:
    """Works through the items; ends the process where ``synchronize`` fails after an error."""
    for number, item in channel.items.items():
        channel.start(number)
        try:
            value = work(item)
            synchronize()
        except Exception as error:
            traceback.print_exc()
            channel.done(number, error=summary(error))
            end_if_broken(synchronize)
        else:
            channel.done(number, value)


def end_if_broken(synchronize: Callable[[], None]) -> None:
    """Ends a process whose GPU does not answer any more; another one gets the rest."""
    try:
        synchronize()
    except RuntimeError:
        sys.stderr.flush()
        os._exit(1)  # no clean-up, which would ask the GPU


def summary(error: BaseException) -> str:
    """Type and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MESSAGE_CHARACTERS]
