"""Files appear whole or not at all, also on a full disk."""

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invrecon.errors import InputError
from invrecon.files import atomic_h5, atomic_path, atomic_write, sha256, write_csv, write_json


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_content_appears_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc" and listing(path.parent) == ["file.bin"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"new")
        raise KeyError("interrupted")
    with pytest.raises(KeyboardInterrupt), atomic_h5(path) as h5:
        h5["a"] = np.ones(3)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, code, function):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(InputError, match=r"Cannot write .*file\.bin: the disk .* free some space.* intact"):
        write_json(path, "new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["file.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["bytes", "h5"])
def test_the_kernel_says_no_space_left(tmp_path, monkeypatch, kind):
    """The temporary file is a link to /dev/full, where every write fails as on a full disk."""
    import builtins

    import invrecon.files as files

    def open_full(path, mode="r", **options):
        is_temporary = str(path).endswith(files.TEMPORARY_SUFFIX)
        return builtins.open("/dev/full", "r+b", buffering=0) if is_temporary else builtins.open(path, mode, **options)

    monkeypatch.setattr(files, "open", open_full, raising=False)
    with pytest.raises(InputError, match="the disk is full"):
        if kind == "bytes":
            with atomic_write(tmp_path / "a") as file:
                file.write(b"1")
        else:
            with atomic_h5(tmp_path / "a.h5") as file:
                file["x"] = np.ones(1000)
    assert listing(tmp_path) == []


def test_a_real_limit_in_the_middle_of_a_volume(tmp_path):
    """A process that may not write beyond 200 kB: HDF5 does not crash, and the finished file stays."""
    script = """
        import resource, signal, sys, numpy as np
        from invrecon.errors import InputError
        from invrecon.files import atomic_h5
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        def write(rows):
            with atomic_h5(sys.argv[1]) as file:
                data = file.create_dataset("a", (rows, 5000), "f8", chunks=(1, 5000), compression="gzip")
                for i in range(rows):
                    data[i] = np.random.default_rng(i).normal(size=5000)
        write(2)
        try:
            write(100)
        except InputError as error:
            print(error)
    """
    path = tmp_path / "volume.h5"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stderr == ""
    assert "volume.h5: the file would be larger than allowed" in result.stdout
    assert listing(tmp_path) == ["volume.h5"]
    with h5py.File(path) as file:
        assert file["a"].shape == (2, 5000)


def test_a_file_where_a_folder_is_due(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a folder"), atomic_write(tmp_path / "file" / "x"):
        pass


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        (tmp_path / "absent").read_bytes()


def test_json_is_strict(tmp_path):
    path = tmp_path / "a.json"
    content = {
        "psnr": {"mean": np.float32(1.5), "low": math.nan, "high": math.inf},
        "n": torch.tensor([1, 2]),
        "p": path,
    }
    write_json(path, content)
    expected = {"psnr": {"mean": 1.5, "low": None, "high": None}, "n": [1, 2], "p": str(path)}
    assert json.loads(path.read_text()) == expected


def test_csv_has_every_column_and_quotes(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, [{"case": 'a,"b"', "psnr": math.inf}, {"case": "c", "extra": 1}], ["case", "slice", "psnr"])
    assert path.read_text() == 'case,slice,psnr,extra\n"a,""b""",,inf,\nc,,,1\n'


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf")
    with pytest.raises(InputError, match="Cannot read"):
        sha256(tmp_path / "absent")
