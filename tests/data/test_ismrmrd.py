"""ISMRMRD raw data: readouts are sorted, noise scans whiten, and what is no stack of Cartesian slices is told."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.fastmri_files import fastmri_header, write_fastmri
from invrecon.data.ismrmrd import GROUP
from invrecon.data.kspace_files import is_kspace, open_kspace
from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_pairs, pairs_to_complex
from tests.data.kspace import COILS, H, W, write_ismrmrd

MIXING = torch.tensor([[1.0, 0, 0], [0.6 + 0.3j, 0.8, 0], [0.2j, 0.4, 2.0]], dtype=torch.complex64)


def correlated_noise(num: int, seed: int) -> Tensor:
    """Noise of three coils, `(coils, num, 2)`; its covariance a real component is `MIXING MIXING^H`."""
    white = torch.randn(COILS, num, 2, generator=torch.Generator().manual_seed(seed))
    return complex_to_pairs(MIXING @ pairs_to_complex(white))


@pytest.mark.parametrize("dwell_us", [(5.0, 5.0), (10.0, 5.0), (0.0, 5.0)])
def test_the_noise_scan_of_ismrmrd_gives_the_covariance_of_the_coils(
    tmp_path: Path, kspace: Tensor, dwell_us: tuple[float, float]
) -> None:
    noise = correlated_noise(20_000, 1)
    file = open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, noise=noise, dwell_us=dwell_us))
    times = dwell_us[0] / dwell_us[1] or 1  # a shorter dwell time is a larger bandwidth, and more noise
    expected = complex_to_pairs(times * MIXING @ MIXING.mH)
    assert file.noise_covariance is not None
    torch.testing.assert_close(file.noise_covariance, expected, atol=0.1 * times, rtol=0)
    assert torch.allclose(file.read(1)[0], kspace[1], atol=1e-6), "no part of k-space"


def test_averages_and_the_receiver_s_bandwidth_decide_the_noise(tmp_path: Path, kspace: Tensor) -> None:
    header = fastmri_header((H, W), (H, W), (5.0, 1.0, 1.0))
    system = b"<acquisitionSystemInformation><relativeReceiverNoiseBandwidth>0.8</relativeReceiverNoiseBandwidth>"
    header = header.replace(b"<encoding>", system + b"</acquisitionSystemInformation><encoding>", 1)
    noise = correlated_noise(20_000, 1)
    twice = [column for column in range(W) for _ in range(2)]
    once, averaged = (
        open_kspace(write_ismrmrd(tmp_path / name, kspace, columns, header, noise)).noise_covariance
        for name, columns in (("a.mrd", range(W)), ("b.mrd", twice))
    )
    assert once is not None and averaged is not None
    torch.testing.assert_close(once, complex_to_pairs(MIXING @ MIXING.mH / 0.8), atol=0.15, rtol=0)
    torch.testing.assert_close(averaged, once / 2)


def test_a_damaged_noise_scan_is_named_when_it_is_asked_for(tmp_path: Path, kspace: Tensor) -> None:
    noise = correlated_noise(100, 1)
    noise[0, 3] = float("nan")
    file = open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, noise=noise))
    assert torch.allclose(file.read(0)[0], kspace[0], atol=1e-6)
    with pytest.raises(InputError, match=r"a\.mrd hold NaN or Inf.*data\.prewhiten to false"):
        _ = file.noise_covariance


def test_a_noise_scan_that_is_too_short_says_nothing(tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.mrd", kspace, noise=correlated_noise(9 * COILS, 1))
    assert open_kspace(path).noise_covariance is None


def test_missing_lines_of_ismrmrd_are_not_measured(tmp_path: Path, kspace: Tensor) -> None:
    file = open_kspace(write_ismrmrd(tmp_path / "a.h5", kspace, range(0, W, 2)))
    y, kept = file.read(1)
    assert file.states_mask and torch.equal(kept, (torch.arange(W) % 2 == 0).expand(H, W))
    assert torch.equal(y, kspace[1] * kept[..., None])


def test_a_header_of_other_readouts_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    header = fastmri_header((H, W - 4), (H, W - 4), (5.0, 1.0, 1.0))
    with pytest.raises(InputError, match=rf"says that k-space has {H} x {W - 4}"):
        open_kspace(write_ismrmrd(tmp_path / "a.h5", kspace, header=header))


@pytest.mark.parametrize("kind", ["radial", "EPI", "goldenangle"])
def test_readouts_that_a_header_says_are_no_lines_are_refused(kind: str, tmp_path: Path, kspace: Tensor) -> None:
    plain = fastmri_header((H, W), (H, W), (5.0, 1.0, 1.0))
    header = plain.replace(b">cartesian<", f">{kind}<".encode())
    assert header != plain
    with pytest.raises(InputError, match=rf"trajectory is '{kind.lower()}', expected 'cartesian'"):
        open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, header=header))
    write_fastmri(tmp_path / "b.h5", kspace)
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = header
    with pytest.raises(InputError, match=rf"trajectory is '{kind.lower()}', expected 'cartesian'"):
        open_kspace(tmp_path / "b.h5")


@pytest.mark.parametrize("name", ["flags", "center_sample", "number_of_samples"])
def test_readouts_whose_heads_lack_something_are_refused(name: str, tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.mrd", kspace)
    with h5py.File(path, "r+") as file:
        whole = file[GROUP]["data"][:]
        kept = [field for field in whole["head"].dtype.names if field != name]
        parts = np.dtype([("head", whole["head"][kept].dtype), *((n, whole.dtype[n]) for n in ("traj", "data"))])
        data = np.zeros(len(whole), dtype=parts)
        for field in kept:
            data["head"][field] = whole["head"][field]
        data["data"], data["traj"] = whole["data"], whole["traj"]
        del file[GROUP]["data"]
        file[GROUP].create_dataset("data", data=data)
    with pytest.raises(InputError, match=f"heads of the readouts lack {name}"):
        open_kspace(path)


def test_a_bandwidth_in_words_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    header = fastmri_header((H, W), (H, W), (5.0, 1.0, 1.0)).replace(b"</ismrmrdHeader>", b"")
    entry = b"<relativeReceiverNoiseBandwidth>wide</relativeReceiverNoiseBandwidth>"
    header += b"<acquisitionSystemInformation>" + entry + b"</acquisitionSystemInformation></ismrmrdHeader>"
    with pytest.raises(InputError, match=r"header of .* is not understood .*'wide'"):
        open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, header=header))


@pytest.mark.parametrize("size", [0, 500, 3000])
def test_truncated_raw_data_are_no_volume(size: int, tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.mrd", kspace)
    path.write_bytes(path.read_bytes()[:size])
    assert is_kspace(path)
    with pytest.raises(InputError, match=r"truncated|not HDF5"):
        open_kspace(path)
