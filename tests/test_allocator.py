"""Feature maps that are freed and asked for again are the same pages, where glibc would hand out new ones."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from invrecon.allocator import keep_freed_memory
from invrecon.priors.unet import SmallUNet
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
torch.set_num_threads(1)
network = SmallUNet().eval()
x, noise = torch.zeros(16, 3, 56, 56), torch.zeros(16)
def faults(num):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode():
        for _ in range(num):
            network(x, noise)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(kept, faults(2))
"""


def _run(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own rules")
def test_freed_memory_is_kept_for_the_next_feature_map():
    """A network that has run before asks the system for few pages; without, for those of most of its feature maps."""
    kept, few = _run("kept")
    _, many = _run("default")
    assert kept == "True"
    assert few < many / 5  # the convolutions' own scratch memory, which differs with the processor, is left


def test_another_c_library_is_left_alone(monkeypatch):
    """Where there is no glibc, nothing is changed and the answer says so."""
    from invrecon.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
