"""One kind of progress bar for everything that takes time: done, measures, elapsed, remaining."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from lolcats_ops.convert.processes import is_main

console = Console(stderr=True)
LINES_S = 30.0  # seconds between lines where stderr is no terminal, such as in the log of a job


@dataclass
class Bar:
    """A running progress bar."""

    display: Progress
    task: TaskID
    next_line: float = field(default_factory=lambda: monotonic() + LINES_S)

    def advance(self, steps: int = 1, **measures: float) -> None:
        """Moves on and shows the latest measures, as in `advance(loss=0.12)`."""
        text = " ".join(f"{name} {value:.4g}" for name, value in measures.items())
        self.display.update(self.task, advance=steps, measures=text)
        if is_main() and not console.is_terminal and monotonic() >= self.next_line:
            self.next_line = monotonic() + LINES_S
            console.print(self.display.get_renderable())


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps on stderr; where that is no terminal, a line every half minute and one
    at the end. Of several processes one shows it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(max_width=24)),  # what gives way
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[measures]}"),
    )
    with Progress(*columns, console=console, disable=not is_main()) as display:
        yield Bar(display, display.add_task(description, total=total, measures=""))
