"""Memory that is freed stays with the process, where glibc would give it back and ask for it again."""

import platform
import subprocess
import sys

import pytest

HELD = """
import os, sys, torch
from invrecon.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def use_and_free(times):
    for _ in range(times):
        maps = [torch.ones(2**22) for _ in range(8)]  # feature maps of 16 MB
        del maps
    return resident() // 2**20
before = resident() // 2**20
first, settled, last = use_and_free(1), use_and_free(8), use_and_free(4)
print(kept, first - before, last - settled)
"""


def _run(how: str) -> tuple[str, int, int]:
    done = subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, text=True, check=True)
    kept, held, grown = done.stdout.split()
    return kept, int(held), int(grown)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own rules")
def test_freed_memory_is_kept_for_the_next_feature_map():
    """128 MB of feature maps are still the process's when they are freed, and later ones take nothing more.

    Told by the resident memory after the first use: glibc then moves its own thresholds, and what it gives back, and
    how many pages fault, depend on how the blocks of the moment happen to lie.
    """
    kept, held, grown = _run("kept")
    _, without, _ = _run("default")
    assert kept == "True"
    assert held > 120 and without < 16
    assert grown < 16


def test_another_c_library_is_left_alone(monkeypatch):
    """Where there is no glibc, nothing is changed and the answer says so."""
    from invrecon.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
