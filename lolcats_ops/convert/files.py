"""Files that are written whole or not at all, and whether one is whole."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open  # type: ignore[import-not-found]

# Files by which a folder is recognised. Old ones that a new model, or its tokenizer, lacks are
# deleted: they would be read as its own.
OF_A_MODEL = (
    "model*.safetensors",
    "adapter_model*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


NEW = 5.0  # seconds in which a process has long locked what it made


@contextmanager
def _locked(path: Path | str) -> Iterator[bool]:
    """A lock that ends with the process at the latest, and whether it was to be had: not where
    another process has it, or where the file system has none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _delete_abandoned(folder: Path, pattern: str) -> None:
    """Deletes what killed processes have left half-written."""
    for path in folder.glob(pattern):
        with suppress(OSError), _locked(path) as free:  # or another process was faster
            if free and time.time() - path.stat().st_mtime > NEW:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is on the disk: whatever interrupts
    that leaves the previous one. Processes that write the same one do not meet."""
    path = Path(path)
    _delete_abandoned(path.parent, f"{glob.escape(path.name)}.*.partial")
    partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file, _locked(partial):
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without its bytes
            os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a full disk
            error.filename = str(path)
        raise


def make_writable(folder: Path, size: int = 0) -> None:
    """Makes a folder to save a model of ``size`` bytes to, and asks now, not after hours of
    training, whether that will work.

    Raises:
        OSError: it will not.
        ValueError: it has files of that kind, and no model.
    """
    _refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-"):
        pass
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder}: {free} bytes are free there, and the model has {size}")


def _refuse_others(folder: Path) -> None:
    """Raises ValueError where a folder has files that a model would replace or be read with, and
    that are of none."""
    found = sorted({file for pattern in OF_A_MODEL for file in folder.glob(pattern)})
    config = folder / "config.json"
    if config in found and is_whole(config) and "model_type" not in json.loads(config.read_bytes()):
        found = [config]
    elif any(file.suffix == ".safetensors" or file.name.endswith("config.json") for file in found):
        return
    if found:
        raise ValueError(
            f"{found[0]} is of no model, and would be replaced by that of one, or be read as a "
            "part of it: give another folder"
        )


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A new folder to save a model in, whose files take the place of those of a model in ``folder``
    once all are written: an error before that leaves these. Other files stay.

    Raises:
        OSError: what cannot be written.
        ValueError: it has files of that kind, and no model.
    """
    _refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(folder, ".new-*")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new, _locked(new):
        try:
            yield Path(new)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from error
        names = {file.relative_to(new) for file in Path(new).rglob("*") if file.is_file()}
        for name in names:
            with open(Path(new) / name, "rb") as file:
                os.fsync(file.fileno())
        # Last what says how to read the rest.
        for name in sorted(names, key=lambda name: (name.name == "config.json", name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(new) / name, folder / name)
        for old in {old for pattern in OF_A_MODEL for old in folder.glob(pattern)}:
            if old.relative_to(folder) not in names:
                old.unlink()


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
