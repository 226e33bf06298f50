"""Where a benchmark runs: the device, what is said of it, and what a reader needs to judge the times."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._record import Row
from invrecon.allocator import keep_freed_memory
from invrecon.errors import InputError
from invrecon.precision import has_bfloat16

CPU = torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` is a GPU where there is one.

    Raises:
        InputError: There is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no GPU: use --device cpu, or auto.")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def synchronize() -> None:
    """Waits until a GPU has done what it was given, so that a clock sees all of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine(threads: int, device: torch.device = CPU) -> dict[str, Any]:
    """Sets the number of threads and how memory is kept; returns what a reader needs to judge the times."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"processor": name, "threads": threads, **versions, "device": device.type}
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    instructions = torch.backends.cpu.get_cpu_capability() + ", bfloat16" * has_bfloat16("cpu")
    return {"processor": processor, "instructions": instructions, "threads": threads, **versions}


def describe_machine(facts: Mapping[str, Any]) -> str:
    """Returns the machine as a line."""
    threads = "" if "device" in facts else f", {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    instructions = f" ({facts['instructions']})" if "instructions" in facts else ""
    return f"{facts['processor']}{instructions}{threads}, torch {facts['torch']}, Python {facts['python']}"


def describe_machines(rows: Iterable[Row]) -> str:
    """Returns the machines that rows were measured on, and the precision of the networks there, as a line."""
    found = dict.fromkeys((row["machine"], row.get("precision")) for row in rows if "machine" in row)
    words = {"bf16": "bfloat16", "32": "float32", "16": "float16"}
    used: dict[str, list[str]] = {}
    for machine, precision in found:
        used.setdefault(machine, []).extend([words[precision]] if precision else [])
    return "; ".join(f"{name} ({', '.join(own)})" if own else name for name, own in used.items())
