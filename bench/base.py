"""Another commit of this repository, built beside this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from . import CHECKOUT
from .remote import Server


class BaseError(RuntimeError):
    """A commit that does not exist, does not build or cannot be driven by this suite."""


@contextmanager
def base_server(ref: str) -> Iterator[Server]:
    """Times the library of a commit, built with the tools of this interpreter's environment.

    Raises:
        BaseError: there is no such commit, it does not build, or its interface is another.
    """
    with TemporaryDirectory(prefix="lolcats-base-") as folder:
        source, site = Path(folder, "source"), Path(folder, "site")
        try:
            _git("worktree", "add", "--detach", str(source), commit_of(ref))
        except subprocess.CalledProcessError as error:
            raise BaseError(f"--base {ref}: {_last_lines(error.stderr)}") from error
        try:
            _build(ref, source, site)
            try:
                server = Server(site)
            except RuntimeError as error:
                raise BaseError(f"--base {ref}: {error}") from error
            with server:
                yield server
        finally:
            _git("worktree", "remove", "--force", str(source))


def commit_of(ref: str) -> str:
    """The name of a commit that stays with it.

    Raises:
        BaseError: there is no such commit.
    """
    try:
        return _git("rev-parse", "--short", "--verify", f"{ref}^{{commit}}").strip()
    except subprocess.CalledProcessError as error:
        raise BaseError(f"--base {ref}: {_last_lines(error.stderr)}") from error


def describe(*options: str) -> str:
    """The commit of this checkout as git describes it; "unknown" outside one."""
    try:
        return _git("describe", "--always", *options).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _build(ref: str, source: Path, site: Path) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(source)],
        env={**os.environ, "PATH": tools},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise BaseError(f"--base {ref} does not build:\n{_last_lines(done.stdout)}")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _last_lines(output: str, number: int = 12) -> str:
    return "\n".join(output.strip().splitlines()[-number:])
