"""Timers in another process (serve.py): another commit of this library, or torch held to AVX2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any

from . import CHECKOUT
from .cases import Case

SETTLE_S = 0.02  # for that long at most, OpenMP threads spin when their work is done


class Refused(RuntimeError):
    """An implementation that cannot run a case, or computes something else; it gets no time."""


class Server:
    """A process that prepares calls and times them on request, one line of JSON each way.

    Args:
        site: a folder with another lolcats_ops, which is used instead of the installed one.
        environment: variables to set.

    Raises:
        RuntimeError: the process could not import what it times.
    """

    def __init__(
        self, site: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        options, paths = [], [str(CHECKOUT)]
        if site is not None:
            # Without site-packages' .pth files: an editable installation would come first.
            options = ["-S"]
            paths = [str(site), str(CHECKOUT), *map(sysconfig.get_path, ("purelib", "platlib"))]
        code = f"import sys; sys.path[:0] = {paths!r}; from bench.serve import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, *options, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is this process's affair
        )
        self._reply()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # it may be in the midst of something long
            self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def prepare(
        self, name: str, case: Case, device: str = "cpu", threads: int = 0
    ) -> tuple[RemoteTimer, str, str, int | None]:
        """The implementation, as the fields of a run.Entry; "torch.mm" is one as well.

        Raises:
            Refused: it cannot run the case, or computes something else.
        """
        import torch

        threads = threads or torch.get_num_threads()
        reply = self._ask(name=name, case=asdict(case), device=device, threads=threads)
        if "refused" in reply:
            raise Refused(reply["refused"])
        timer = RemoteTimer(self, reply["entry"])
        return timer, reply["isa"], reply["version"], reply["extra_bytes"]

    def forget(self) -> None:
        """Frees what was prepared; its timers are of no use any more."""
        self._ask(forget=True)

    def seconds(self, entry: int, number: int) -> float:
        """Seconds of so many calls of something that was prepared."""
        return self._ask(entry=entry, number=number)["seconds"]

    def cold(self, entry: int, budget_s: float) -> list[float]:
        """Seconds of its calls on a GPU, each with an empty L2."""
        return self._ask(entry=entry, cold=budget_s)["seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and _reply says so
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the timing process ended with exit code {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"the timing process cannot start: {reply['error']}")
        return reply


@dataclass(frozen=True)
class RemoteTimer:
    """What a server prepared."""

    server: Server
    entry: int

    def seconds(self, number: int) -> float:
        """Seconds of so many calls, while no threads of another process spin."""
        sleep(SETTLE_S)
        self.server.seconds(self.entry, 1)  # a core that has slept is slow at first
        seconds = self.server.seconds(self.entry, number)
        sleep(SETTLE_S)
        return seconds

    def cold(self, budget_s: float) -> list[float]:
        """Seconds of calls on a GPU, each with an empty L2."""
        return self.server.cold(self.entry, budget_s)
