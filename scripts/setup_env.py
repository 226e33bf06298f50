"""Installs invrecon, editable, with its requirements into the virtual environment that runs this file.

    .venv/bin/python scripts/setup_env.py [--torch torch==X.Y.Z] [extra ...]

Why not just `pip install -e .`: fastmri asks for torchvision without ever importing it, and pip then fetches
one (and with it a torch) that does not match the torch at hand: gigabytes, and torchmetrics breaks on it. So
torch comes first, its exact version then constrains everything else, and fastmri comes without torchvision.
What is required is read from the metadata of invrecon itself, that is, from pyproject.toml.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

# pip's own copy of `packaging`: the only one that a fresh environment is sure to have.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PULLS_TORCHVISION = {"fastmri"}
LEFT_OUT = {"torch", "torchvision"}  # torch is there already
# What every command or test imports: compiled once here, and not by each process where Python writes no bytecode.
# torch's part is compiled while pip installs the rest, the two others beside each other.
TORCH = "torch, torch._dynamo, torch.distributed.fsdp, sympy"
COMMANDS = "invrecon.cli, fastmri.data, torch.utils.tensorboard"
FIGURES = "matplotlib.pyplot, scipy.ndimage, scipy.sparse.linalg, PIL.Image"
TESTS = "pytest, xdist.plugin, hypothesis.extra.numpy, skimage.metrics, skimage.transform, pydicom, nibabel, nrrd"
NOT_MALICIOUS = "pytorch-lightning!=2.6.2,!=2.6.3"  # the twins of the releases that pyproject.toml excludes


def pip(*args: str, quiet: bool = True, check: bool = True) -> bool:
    """Runs pip in this environment; returns whether it succeeded, or ends the program when it had to."""
    flags = ["--disable-pip-version-check", "--no-input", *(["--quiet"] if quiet else [])]
    command = [sys.executable, "-m", "pip", *flags, *args]
    code = subprocess.run(command, stderr=None if check else subprocess.DEVNULL).returncode
    if code and check:
        sys.exit(f"setup failed: pip {' '.join(args)} ended with status {code}; pip's message is above.")
    importlib.invalidate_caches()
    return code == 0


def start_import(modules: str, quiet: bool = True) -> subprocess.Popen[bytes]:
    """Starts a fresh interpreter that imports the comma-separated `modules` and leaves their bytecode."""
    command = [sys.executable, "-c", f"import {modules}"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(command, stderr=subprocess.DEVNULL if quiet else None, env=environment)


def imports(modules: str, quiet: bool = True) -> bool:
    """Returns whether a fresh interpreter can import the comma-separated `modules`."""
    return start_import(modules, quiet).wait() == 0


def has_gpu() -> bool:
    """Returns whether the NVIDIA driver answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def install_torch(wanted: str) -> None:
    """Installs `wanted`, as the CPU build where there is no GPU and pip knows one; keeps a working torch."""
    if imports("torch"):
        return
    exact = "==" in wanted and "+" not in wanted
    if sys.platform == "linux" and exact and not has_gpu():
        print("no NVIDIA GPU here: looking for a CPU build of torch", flush=True)
        if pip("install", "--no-compile", f"{wanted}+cpu", check=False):
            return
        print(
            "pip knows of none and fetches the CUDA build (gigabytes; it works without a GPU, too).\n"
            "To avoid that, point pip's own settings (PIP_FIND_LINKS, pip.conf) at PyTorch's CPU wheels.",
            flush=True,
        )
    pip("install", "--no-compile", wanted, quiet=not sys.stdout.isatty())


def requirements(package: str, extras: list[str]) -> list[Requirement]:
    """Returns what the installed `package` requires on this machine, with `extras`, from its metadata."""
    found = [Requirement(line) for line in metadata.requires(package) or []]
    groups = ["", *extras]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": g}) for g in groups)]


def spell(requirement: Requirement) -> str:
    """Returns the requirement as pip takes it, without the marker that has been evaluated."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def check_torch(needed: list[Requirement]) -> None:
    """Ends the program if the torch that was kept is not one that `needed` allows."""
    version = metadata.version("torch")
    for wanted in (r for r in needed if r.name == "torch"):
        if not wanted.specifier.contains(version, prereleases=True):
            sys.exit(f"invrecon needs {wanted}, {sys.prefix} has {version}: remove it, start again.")


def install_rest(extras: list[str]) -> None:
    """Installs invrecon and all it requires beside the torch that is there."""
    constraints = Path(sys.prefix, "constraints.txt")
    constraints.write_text(f"torch=={metadata.version('torch')}\n{NOT_MALICIOUS}\n")
    pip("install", "--no-deps", "--editable", str(ROOT))
    needed = requirements("invrecon", extras)
    check_torch(needed)
    bare = [r for r in needed if canonicalize_name(r.name) in PULLS_TORCHVISION]
    if bare:
        pip("install", "--no-compile", "--no-deps", *map(spell, bare))
    needed += [r for package in bare for r in requirements(package.name, [])]
    names = {spell(r) for r in needed if canonicalize_name(r.name) not in PULLS_TORCHVISION | LEFT_OUT}
    # --no-warn-conflicts: that fastmri misses its torchvision is meant, and pip would call it an ERROR.
    pip("install", "--no-compile", "--no-warn-conflicts", "--constraint", str(constraints), *sorted(names))


def remove_broken_torchvision() -> None:
    """Removes a torchvision that does not fit this torch: torchmetrics and lightning would break on it."""
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    if "torchvision" in installed and not imports("torchmetrics, lightning, torchvision"):
        print("removing a torchvision that does not fit this torch", flush=True)
        pip("uninstall", "--yes", "torchvision", *({"torch-fidelity"} & installed))


def main() -> None:
    """Sets the environment up and says what it did and how long that took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml: test, io, bench, dev")
    parser.add_argument("--torch", default="torch>=2.10", help="what pip installs if no torch is there yet")
    args = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        sys.exit("setup_env.py fills the environment that runs it: use .venv/bin/python, or make setup.")
    if not (3, 10) <= sys.version_info < (3, 14):
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"invrecon needs Python 3.10 to 3.13, {sys.prefix} has {version}: remove it, start again.")
    start = time.monotonic()
    print("installing into .venv (once; some minutes on a slow connection)", flush=True)
    install_torch(args.torch)
    print(f"torch {metadata.version('torch')} is there ({time.monotonic() - start:.0f} s)", flush=True)
    compiling = start_import(TORCH)
    install_rest(args.extras)
    remove_broken_torchvision()
    compiling.wait()
    compiling = start_import(", ".join([FIGURES, *([TESTS] if "test" in args.extras else [])]))
    if not imports("torch, torchmetrics, lightning, h5py, invrecon", quiet=False):
        sys.exit("setup failed: all is installed but does not import: remove .venv and start again.")
    imports(COMMANDS)
    compiling.wait()
    print(f"ready after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
