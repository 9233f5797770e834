"""Output folders that several processes and later runs share."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import safe_open


@contextmanager
def lock_folder(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Makes `folder` and holds it for this run; the lock goes with the process, however that ends."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output` must be a folder, {folder} is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"`output` must not be in use by another run, {folder} is.") from None
    try:
        accelerator.wait_for_everyone()
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


def publish(partial: Path, file: Path) -> None:
    """Gives a file that is written its name, once it is on the disk."""
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    publish(partial, file)


def check_same_extraction(output: Path, kind: str, files: list[Path], facts: dict) -> None:
    """The shards `kind-*.safetensors` that are there already must be those that would be written."""
    for file in sorted(output.glob(f"{kind}-*.safetensors")):
        with safe_open(file, "pt") as shard:
            theirs = json.loads(shard.metadata()["extraction"])
        other = [name for name in facts if facts[name] != theirs.get(name)]
        if other or file not in files:
            raise ValueError(
                f"`output` must be new or hold an extraction with the same settings, {output} differs in "
                f"{', '.join(other) or 'the number of shards'}."
            )


def sync_folder(folder: Path) -> None:
    """Waits until the files of `folder` are on the disk: a rename must not get there before them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
