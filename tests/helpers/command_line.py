"""The command `lolcats`, called in this process."""

from typer.testing import CliRunner

from lolcats_ops.cli import app

TEXT = "the quick brown fox jumps over the lazy dog and runs away . " * 60


def lolcats(*arguments):
    """What a command that succeeds prints."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
