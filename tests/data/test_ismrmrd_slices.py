"""Slices of ISMRMRD that lack readouts, and samples of readouts that are to be discarded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.fastmri_files import fastmri_header
from invrecon.data.ismrmrd import GROUP
from invrecon.data.kspace import UNDERSAMPLED
from invrecon.data.kspace_files import open_kspace
from invrecon.data.mri import MRIData
from invrecon.errors import InputError
from invrecon.operators.coils import LowResolutionMaps
from tests.data.kspace import COILS, H, N, W, write_ismrmrd

PLAIN = fastmri_header((H, W), (H, W), (5.0, 1.0, 1.0))
NO_LIMITS = PLAIN.replace(b"<maximum>", b"<other>").replace(b"</maximum>", b"</other>")


def limits(slices: int) -> bytes:
    """A header that states a number of slices."""
    entry = b"<slice><minimum>0</minimum><maximum>%d</maximum><center>0</center></slice>" % (slices - 1)
    return PLAIN.replace(b"</encodingLimits>", entry + b"</encodingLimits>")


def keep(path: Path, chosen: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Leaves those readouts, the noise scan aside, that a function of their counters chooses."""
    with h5py.File(path, "r+") as file:
        data = file[GROUP]["data"][()]
        left = chosen(data["head"]["idx"])
        left[0] = True
        del file[GROUP]["data"]
        file[GROUP].create_dataset("data", data=data[left])
    return path


def told(path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MRIData(str(path), maps=LowResolutionMaps()).setup()
    return [str(w.message) for w in caught if str(path) in str(w.message)]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (range(W), ""),
        (range(1, W - 1), ""),
        (range(4, W), "partial Fourier, with columns 4 to 13 of 0 to 13"),
        ([c for c in range(W) if c != 3], UNDERSAMPLED),
    ],
)
def test_every_slice_has_readouts_of_its_own(columns: Sequence[int], what: str, tmp_path: Path, kspace: Tensor) -> None:
    """The other slice is complete, so that the columns of both are all."""
    path = write_ismrmrd(tmp_path / "a.mrd", kspace, header=NO_LIMITS)
    keep(path, lambda idx: (idx["slice"] == 0) | np.isin(idx["kspace_encode_step_1"], columns))
    file = open_kspace(path)
    assert [file.lacking(index, file.read(index)[1]) for index in range(N)] == ["", what]
    assert file.states_mask == bool(what)


def test_a_partial_echo_has_no_reference(tmp_path: Path, kspace: Tensor) -> None:
    file = open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, discard=(5, 0)))
    assert file.lacking(0, file.read(0)[1]) == "partial Fourier, with rows 5 to 15 of 0 to 15"


def test_readouts_that_a_header_states_and_a_slice_lacks_are_told(tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.mrd", kspace)
    keep(path, lambda idx: (idx["slice"] == 0) | np.isin(idx["kspace_encode_step_1"], range(1, W - 1)))
    (text,) = told(path)
    assert f"incomplete, with {W - 2} of the {W} readouts of a slice that its header states (1 of 2 slices" in text
    with pytest.warns(UserWarning, match="incomplete"):
        one, other = MRIData(str(path), maps=LowResolutionMaps()).test_dataloader()
    assert one.reference is not None and other.reference is None


def test_parallel_imaging_is_no_loss_of_readouts(tmp_path: Path, kspace: Tensor) -> None:
    factor = b"<accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1></accelerationFactor>"
    header = PLAIN.replace(b"</encoding>", b"<parallelImaging>" + factor + b"</parallelImaging></encoding>")
    columns = [c for c in range(W) if c % 2 == 0 or 4 <= c < 10]
    for name, text, what in (("a", header, UNDERSAMPLED), ("b", PLAIN, f"incomplete, with {len(columns)} of the {W}")):
        file = open_kspace(write_ismrmrd(tmp_path / f"{name}.mrd", kspace, columns, text))
        assert file.lacking(0, file.read(0)[1]).startswith(what)


def test_slices_that_a_header_states_and_a_file_lacks_are_told(tmp_path: Path, kspace: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"a\.mrd holds readouts of 2 slices, its header \(enc.*\) states 5"):
        open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, header=limits(5)))
    assert not told(write_ismrmrd(tmp_path / "b.mrd", kspace, header=limits(N)))


def test_discarded_samples_about_a_readout_are_cut_off(tmp_path: Path, kspace: Tensor) -> None:
    garbage = torch.full((N, COILS, 4, W, 2), torch.nan)
    longer = torch.cat([garbage, kspace, garbage], dim=2)
    file = open_kspace(write_ismrmrd(tmp_path / "a.mrd", longer, header=PLAIN, discard=(4, 4)))
    y, kept = file.read(1)
    assert kept.all() and torch.equal(y, kspace[1]) and not file.lacking(1, kept)


@pytest.mark.parametrize("discard", [(3, 0), (0, 2), (2, 2)])
def test_discarded_samples_within_a_readout_were_not_measured(
    discard: tuple[int, int], tmp_path: Path, kspace: Tensor
) -> None:
    valid = torch.zeros(H, dtype=torch.bool)
    valid[discard[0] : H - discard[1]] = True
    spoilt = torch.where(valid[:, None, None], kspace, 1e6)
    y, kept = open_kspace(write_ismrmrd(tmp_path / "a.mrd", spoilt, discard=discard)).read(0)
    assert torch.equal(kept, valid[:, None].expand(H, W))
    assert torch.equal(y, torch.where(valid[:, None, None], kspace[0], 0))


def test_a_readout_that_is_discarded_as_a_whole_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    with pytest.raises(InputError, match=rf"Readout 1 of .* has {H} samples, and its header discards them all"):
        open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, discard=(H - 2, 2)))


def test_noise_that_is_to_be_discarded_says_nothing_of_the_covariance(tmp_path: Path, kspace: Tensor) -> None:
    noise = torch.randn(COILS, 1000, 2, generator=torch.Generator().manual_seed(0))
    clean = open_kspace(write_ismrmrd(tmp_path / "a.mrd", kspace, noise=noise)).noise_covariance
    spoilt = torch.cat([torch.full((COILS, 7, 2), 1e4), noise, torch.full((COILS, 2, 2), torch.nan)], dim=1)
    path = write_ismrmrd(tmp_path / "b.mrd", kspace, noise=spoilt)
    with h5py.File(path, "r+") as file:
        data = file[GROUP]["data"][()]
        data[0]["head"]["discard_pre"], data[0]["head"]["discard_post"] = 7, 2
        file[GROUP]["data"][...] = data
    found = open_kspace(path).noise_covariance
    assert clean is not None and found is not None and torch.equal(clean, found)
