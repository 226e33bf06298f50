"""Volumes become files that fastMRI's reader and ours read alike."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fastmri.data import SliceDataset

from invrecon.data.kspace_files import open_kspace
from invrecon.data.mri import MRIData
from invrecon.data.phantoms import ellipse_phantom
from invrecon.data.simulate import main, simulate
from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_pairs
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import EquispacedLines
from invrecon.rng import make_generator

SIZE, N = 32, 3


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    heads = [1000 * (0.2 + ellipse_phantom(SIZE, make_generator(i, "head"))[0]) for i in range(N)]
    with h5py.File(tmp_path / "head.h5", "w") as file:
        file["data"] = torch.stack(heads).numpy()
        file.attrs.update({"units": "a.u.", "patient": "p", "voxel_mm": (1.0, 1.5, 2.0)})
    return tmp_path / "head.h5"


@pytest.mark.parametrize("num_coils", [1, 3])
def test_both_readers_see_the_same(volume: Path, tmp_path: Path, num_coils: int) -> None:
    (path,) = simulate(volume, tmp_path / "out", size=SIZE, num_coils=num_coils)
    theirs = SliceDataset(
        root=path.parent, challenge="multicoil" if num_coils > 1 else "singlecoil", use_dataset_cache=False
    )
    ours = open_kspace(path)
    assert len(theirs) == len(ours) == N and ours.voxel_mm == (2.0, 1.5, 1.0) and ours.patient == "p"
    for index in range(N):
        kspace, _, target, attributes, *_ = theirs[index]
        read, mask = ours.read(index)
        expected = complex_to_pairs(torch.from_numpy(kspace.reshape(num_coils, SIZE, SIZE)))
        assert torch.equal(read, expected) and mask.all()
        assert attributes["max"] == pytest.approx(ours.maximum) and target.shape == (SIZE, SIZE)
        assert float(target.max()) <= attributes["max"] * (1 + 1e-6)


def test_it_is_what_a_reconstruction_of_the_volume_measures(volume: Path, tmp_path: Path) -> None:
    (path,) = simulate(volume, tmp_path / "k.h5", size=SIZE, num_coils=3, snr=None, slices="1")
    data = MRIData(str(volume), slices="1", size=SIZE, num_coils=3, sampling=EquispacedLines(2, 0.3))
    (batch,) = list(data.test_dataloader())
    operator = CartesianMRI((SIZE, SIZE), maps=batch.maps)
    expected = operator(batch.reference)[0] * batch.scale[0]
    read, _ = open_kspace(path).read(0)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_empty_slices_are_left_out(volume: Path, tmp_path: Path) -> None:
    with h5py.File(volume, "r+") as file:
        file["data"][1] = 0
    with pytest.warns(UserWarning, match=r"zero in slices \[1\]"):
        (path,) = simulate(volume, tmp_path / "k.h5", size=SIZE, num_coils=2, snr=None)
    batches = list(MRIData(str(path), sampling=EquispacedLines(2, 0.3)).test_dataloader())
    assert len(batches) == N - 1
    with pytest.raises(InputError, match="zero in all slices"):
        simulate(volume, tmp_path / "none.h5", size=SIZE, slices="1")
    assert not (tmp_path / "none.h5").exists()


def test_patients_are_not_mixed(volume: Path, tmp_path: Path) -> None:
    names = [[f"head.h5[{i}]", f"p{i > 0}"] for i in range(N)]
    (tmp_path / "head.patients.json").write_text(json.dumps(names))
    with pytest.raises(InputError, match="several patients"):
        simulate(volume, tmp_path / "k.h5", size=SIZE)


def test_noise_is_as_stated(volume: Path, tmp_path: Path) -> None:
    clean, noisy = (
        open_kspace(simulate(volume, tmp_path / f"{snr}.h5", size=SIZE, num_coils=2, snr=snr)[0]).read(0)[0]
        for snr in (None, 20.0)
    )
    ratio = float(clean.square().mean() / (noisy - clean).square().mean())
    assert 10 * np.log10(ratio) == pytest.approx(20.0, abs=0.4)


def test_the_command(volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(volume), str(tmp_path / "out.h5"), "--size", str(SIZE), "--coils", "2", "--slices", "0:2"]
    assert main(args) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "out.h5")
    assert len(open_kspace(tmp_path / "out.h5")) == 2
    assert main(args) == 1 and "exists already" in capsys.readouterr().err
    assert main([*args, "--force", "--coils", "0"]) == 1 and "to be 0 coils" in capsys.readouterr().err
    assert main([str(tmp_path / "none.h5"), *args[1:], "--force"]) == 1
