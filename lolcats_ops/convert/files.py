"""Files that are written whole or not at all, and whether one is whole."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open  # type: ignore[import-not-found]

WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json")


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is on the disk: whatever interrupts
    that leaves the previous one."""
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name without its bytes
    os.replace(partial, path)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A new folder to save a model in, whose files take the place of those of a model in ``folder``
    once all are written: an error before that leaves these.

    Raises:
        OSError: what cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
        try:
            yield Path(new)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from error
        for pattern in WEIGHTS:  # of other names, if there are more or fewer
            for old in folder.glob(pattern):
                old.unlink()
        for file in Path(new).iterdir():
            os.replace(file, folder / file.name)


def is_whole(path: Path) -> bool:
    """Whether a .json, .safetensors or torch file exists and was written to its end."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the size
                pass
        else:
            return zipfile.is_zipfile(path)  # whose directory is at the end
    except (OSError, ValueError, SafetensorError):
        return False
    return True
