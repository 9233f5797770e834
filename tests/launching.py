"""Runs commands of the package in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def as_options(values: dict) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def start(
    command: str, values: dict, *words: str, processes: int = 1, fsdp: bool = False, log: Path | None = None
) -> subprocess.Popen:
    """Starts a command of the package, on CPUs, in one process or several; what it prints can go to a file."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--standalone"]
    if fsdp:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        launcher += [str(TESTS / "fsdp_on_cpu.py")]
    else:
        launcher += ["-m", "par_diffusers"]
    return subprocess.Popen(
        [*launcher, command, *as_options(values), *words],
        env=environment,
        stdout=subprocess.PIPE if log is None else log.open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for a command that must succeed; what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_losses(folder: Path) -> list[float]:
    """The loss of every step, 1, 2, 3, ..."""
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    return [line["loss"] for line in metrics]
