import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from invrecon.data.convert import convert, main, resample_slice
from invrecon.data.volumes import open_volume, read_volume
from invrecon.errors import InputError


def test_hdf5_of_the_right_size_is_kept_without_loss(write_h5, tmp_path):
    path = write_h5(voxel_mm=[1.0, 1.0, 2.0], patient="P", source="here")
    (out,) = convert(path, tmp_path / "out.h5", size=8)
    (a, before), (b, after) = read_volume(path), read_volume(out)
    assert torch.equal(a, b) and after.voxel_mm == (2.0, 1.0, 1.0)
    assert (after.patient, after.source, after.units) == ("P", "here", before.units)
    with h5py.File(out) as file:
        assert file["data"].dtype == np.int16 and file["data"].chunks == (1, 8, 8)
        assert file["data"].compression == "gzip"


def test_integer_factors_are_block_averages(write_h5, tmp_path):
    path = write_h5(shape=(2, 8, 8), voxel_mm=[0.5, 0.5, 3.0])
    (out,) = convert(path, tmp_path / "out.h5", size=4)
    values, volume = read_volume(out)
    expected = read_volume(path)[0].reshape(2, 4, 2, 4, 2).mean(dim=(2, 4))
    assert (values - expected).abs().max() <= 0.5 and volume.voxel_mm == (3.0, 1.0, 1.0)


def test_values_are_clipped_to_twelve_bits(write_h5, tmp_path):
    values = np.array([[[-5000.0, 5000.0], [0.4, 0.6]]], np.float32)
    (out,) = convert(write_h5(values=values), tmp_path / "out.h5", size=2)
    assert read_volume(out)[0].flatten().tolist() == [-1024, 3071, 0, 1]


def test_other_factors_interpolate_and_keep_the_mean():
    hu = torch.rand(30, 30)
    assert resample_slice(hu, 20).shape == (20, 20)
    assert float(resample_slice(hu, 20).mean()) == pytest.approx(float(hu.mean()), abs=0.02)
    torch.testing.assert_close(resample_slice(torch.full((7, 7), 5.0), 12), torch.full((12, 12), 5.0))


def test_slices_are_squared_with_air():
    square = resample_slice(torch.zeros(4, 8), 8)
    assert (square[:2] == -1024).all() and (square[6:] == -1024).all() and (square[2:6] == 0).all()
    assert (resample_slice(torch.zeros(8, 4), 8)[:, 2:6] == 0).all()


def test_dicom_and_nifti_folders(tmp_path):
    nibabel, pydicom = pytest.importorskip("nibabel"), pytest.importorskip("pydicom")
    del pydicom
    from .test_scans import dicom  # type: ignore[import-not-found]

    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 8, 8)).astype(np.int16)
    (tmp_path / "in" / "series").mkdir(parents=True)
    for k in range(3):
        dicom(tmp_path / "in" / "series" / f"{9 - k}.dcm", (hu[k] + 1024) // 2, 3.0 * k)
    image = nibabel.Nifti1Image(np.transpose(hu, (2, 1, 0)), np.diag([-0.5, -0.5, 3.0, 1.0]))
    nibabel.save(image, tmp_path / "in" / "scan.nii.gz")
    written = convert(tmp_path / "in", tmp_path / "out", size=4)
    assert [path.name for path in written] == ["scan.h5", "series.h5"]
    means = hu.reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(read_volume(written[0])[0], means, atol=0.51)
    np.testing.assert_allclose(read_volume(written[1])[0], means, atol=1.51)  # stored in steps of 2 HU
    assert open_volume(written[0]).voxel_mm == pytest.approx((3.0, 1.0, 1.0))
    assert open_volume(written[1]).patient == "D-1"


def test_patients_of_single_slices_travel_along(write_h5, tmp_path):
    path = write_h5(shape=(2, 8, 8))
    path.with_name("scan.patients.json").write_text('[["a", "A"], ["b", "B"]]')
    (out,) = convert(path, tmp_path / "to" / "new.h5", size=8)
    assert open_volume(out).patients == ("A", "B")


def test_nothing_is_overwritten_unless_forced(write_h5, tmp_path):
    path, out = write_h5(), tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        convert(path, out, size=8)
    assert out.read_text() == "precious"
    convert(path, out, size=8, force=True)
    assert open_volume(out).shape == (5, 8, 8)
    with pytest.raises(InputError, match="both input and output"):
        convert(path, path, size=8, force=True)


def test_a_failure_leaves_no_file(write_h5, tmp_path):
    values = np.zeros((3, 8, 8), np.float32)
    values[2, 0, 0] = np.nan
    with pytest.raises(InputError, match="Slice 2"):
        convert(write_h5(values=values), tmp_path / "to" / "out.h5", size=8)
    assert list((tmp_path / "to").iterdir()) == []


def test_fractions_are_not_rounded_away(write_h5, tmp_path):
    values = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 8, 8)
    with pytest.raises(InputError, match=r"between 0 and 1, expected Hounsfield units"):
        convert(write_h5(values=values), tmp_path / "to" / "out.h5", size=8)
    assert list((tmp_path / "to").iterdir()) == []


def test_many_inputs_need_a_folder(write_h5, tmp_path):
    paths = [write_h5("a.h5"), write_h5("b.h5")]
    with pytest.raises(InputError, match="name a folder"):
        convert(paths, tmp_path / "out.h5")
    with pytest.raises(InputError, match="one file"):
        convert([paths[0], write_h5("sub/a.h5")], tmp_path / "out")
    assert len(convert(paths, tmp_path / "out", size=8)) == 2
    with pytest.raises(InputError, match="at least 2"):
        convert(paths, tmp_path / "out2", size=1)


def test_the_command_line(write_h5, tmp_path, capsys):
    path, out = str(write_h5()), str(tmp_path / "out.h5")
    assert main([path, out, "--size", "4"]) == 0 and capsys.readouterr().out.strip() == out
    assert main([path, out, "--size", "4"]) == 1
    captured = capsys.readouterr()
    assert "exists already" in captured.err and "Traceback" not in captured.err
    assert main([path, out, "--size", "4", "--force"]) == 0
    assert main([str(tmp_path / "gone"), out]) == 1


def test_it_runs_as_a_module(write_h5, tmp_path):
    command = [
        sys.executable,
        "-m",
        "invrecon.data.convert",
        str(write_h5()),
        str(tmp_path / "o.h5"),
        "--size",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_full_disk_is_one_sentence_and_leaves_nothing(write_h5, tmp_path):
    out = tmp_path / "to" / "o.h5"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from invrecon.data.convert import main; sys.exit(main(sys.argv[1:]))"
    )
    path = write_h5(shape=(20, 64, 64))
    command = [sys.executable, "-c", program, str(path), str(out), "--size", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ") and "o.h5" in done.stderr and "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


def test_a_stale_sidecar_goes_with_the_file_it_belonged_to(write_h5, tmp_path):
    path, out = write_h5(shape=(2, 8, 8)), tmp_path / "out.h5"
    out.write_text("old")
    out.with_name("out.patients.json").write_text("[]")
    convert(path, out, size=8, force=True)
    assert open_volume(out).patients == ("scan", "scan")
