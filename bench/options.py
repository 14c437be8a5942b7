"""What both commands, ``python -m bench`` and ``python -m bench.gpu_report``, can be told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from .cases import CASES, Case, select
from .device import DEVICES
from .peers import find


def positive_seconds(text: str) -> float:
    """Seconds that an option asks for, which are finite and above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value


def positive_count(text: str) -> int:
    """How many of something an option asks for: 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, needs 1 or more")
    return int(text)


def make_parser(
    prog: str, about: str | None, examples: str, *, budget_s: float, out: str, device: str
) -> argparse.ArgumentParser:
    """A parser of the options that the commands share, with their defaults."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only cases whose name contains this text or matches this glob; repeat for more",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="these instead of lolcats and the peers of each case",
    )
    parser.add_argument(
        "--budget",
        type=positive_seconds,
        default=budget_s,
        metavar="SECONDS",
        help="of samples for each implementation of a case (default %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help="where to write (default %(default)s)",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default=device, help="what to measure (default %(default)s)"
    )
    return parser


def make_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Makes the folder to write to; ends the process where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--out {folder}: {error.strerror}")


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[Case]]:
    """The options and the cases that they select; ends the process where a name is unknown."""
    options = parser.parse_args(arguments)
    try:
        for name in options.implementations:
            find(name)
        return options, select(options.case, CASES[options.device])
    except ValueError as error:
        parser.error(f"{error}; python -m bench --list shows all of them")
