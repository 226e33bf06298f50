"""NIfTI, NRRD and DICOM: the same scan, written with every axis order and direction, is read as one."""

import itertools

import numpy as np
import pytest
import torch

from invrecon.data.volumes import find_volumes, open_volume, read_volume
from invrecon.errors import InputError

SHAPE, VOXEL = (4, 5, 6), (3.0, 0.75, 0.5)  # (z, y, x), feet to head, front to back, right to left


@pytest.fixture
def hu():
    return np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.int16)


def arrangements():
    """Axis orders and flips of the array, some of the 48."""
    every = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
    return every[::5]


def rearranged(hu, order, signs):
    """Returns the array `(axes in `order`)` and its directions `(3, 3)`, columns per array axis, in LPS."""
    array, directions = np.transpose(hu, order), np.zeros((3, 3))
    for k, axis in enumerate(order):  # world row: x of LPS is hu's axis 2
        directions[2 - axis, k] = signs[k] * VOXEL[axis]
        if signs[k] < 0:
            array = np.flip(array, k)
    return array, directions


def assert_same(path, hu):
    values, volume = read_volume(path)
    assert torch.equal(values, torch.from_numpy(hu).float())
    assert volume.voxel_mm == pytest.approx(VOXEL)
    assert volume.units == "HU"


@pytest.mark.parametrize(("order", "signs"), arrangements())
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti(tmp_path, hu, order, signs, suffix):
    nibabel = pytest.importorskip("nibabel")
    array, directions = rearranged(hu, order, signs)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ directions
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array), affine), tmp_path / f"scan{suffix}")
    assert_same(tmp_path / f"scan{suffix}", hu)
    assert open_volume(tmp_path / f"scan{suffix}").patient == "scan"


@pytest.mark.parametrize(("order", "signs"), arrangements())
def test_nrrd(tmp_path, hu, order, signs):
    nrrd = pytest.importorskip("nrrd")
    array, directions = rearranged(hu, order, signs)
    for space, flip in (("left-posterior-superior", [1, 1, 1]), ("RAS", [-1, -1, 1])):
        header = {"space": space, "space directions": (np.diag(flip) @ directions).T}
        nrrd.write(str(tmp_path / "scan.nrrd"), np.ascontiguousarray(array), header)
        assert_same(tmp_path / "scan.nrrd", hu)


def test_nrrd_with_spacings_or_nothing(tmp_path, hu):
    nrrd = pytest.importorskip("nrrd")
    array = np.transpose(hu, (2, 1, 0))
    nrrd.write(str(tmp_path / "a.nrrd"), array, {"spacings": VOXEL[::-1]})
    assert_same(tmp_path / "a.nrrd", hu)
    nrrd.write(str(tmp_path / "b.nrrd"), array)
    assert open_volume(tmp_path / "b.nrrd").voxel_mm is None
    assert torch.equal(read_volume(tmp_path / "b.nrrd")[0], torch.from_numpy(hu).float())


def test_nifti_rescales_and_drops_unit_axes(tmp_path, hu):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.transpose(hu, (2, 1, 0))[..., None], np.diag([-0.5, -0.75, 3, 1]))
    image.header.set_slope_inter(2.0, -1024.0)
    nibabel.save(image, tmp_path / "scan.nii")
    values, _ = read_volume(tmp_path / "scan.nii")
    raw = nibabel.load(tmp_path / "scan.nii").get_fdata()[..., 0]
    np.testing.assert_allclose(values, np.transpose(raw, (2, 1, 0)), atol=1e-3)


def test_bad_nifti_and_nrrd(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for name in ("bad.nii", "bad.nii.gz", "bad.nrrd"):
        (tmp_path / name).write_bytes(b"nonsense" * 10)
        with pytest.raises(InputError, match=rf"{name} is not a readable"):
            open_volume(tmp_path / name)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(InputError, match="expected three axes"):
        open_volume(tmp_path / "four.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    with pytest.raises(InputError, match="complex"):
        open_volume(tmp_path / "complex.nii")


def test_truncated_scans(tmp_path, hu):
    nibabel, nrrd = pytest.importorskip("nibabel"), pytest.importorskip("nrrd")
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)), tmp_path / "cut.nii")
    nrrd.write(str(tmp_path / "cut.nrrd"), hu)
    for name in ("cut.nii", "cut.nrrd"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(InputError, match=rf"Slice \d of .*{name} cannot be read"):
            read_volume(path)


# --- DICOM ------------------------------------------------------------------------------------------------


def dicom(path, pixels, position, **more):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientID, ds.SeriesInstanceUID = "CT", "D-1", "1.2.3"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.RescaleSlope, ds.RescaleIntercept = 2, -1024
    ds.PixelSpacing, ds.SliceThickness = [VOXEL[1], VOXEL[2]], 9.0
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, position]
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    for key, value in more.items():
        setattr(ds, key, value)
    ds.save_as(path, enforce_file_format=True)


@pytest.fixture
def series(tmp_path):
    """A folder of DICOM whose file names do not sort as its slices do; and its HU."""
    stored = np.random.default_rng(0).integers(0, 1500, SHAPE)
    folder = tmp_path / "series"
    folder.mkdir()
    for k in range(SHAPE[0]):
        dicom(folder / f"{(7 * k) % 10}{'.dcm' if k % 2 else ''}", stored[k], -100 + VOXEL[0] * k)
    (folder / "notes.txt").write_text("no slice")
    return folder, (2 * stored - 1024).astype(np.int16)


def test_dicom(series):
    folder, hu = series
    assert_same(folder, hu)
    volume = open_volume(folder)
    assert (volume.patient, volume.stem) == ("D-1", "series")
    assert find_volumes(folder) == [folder] and find_volumes(folder.parent) == [folder]


def test_dicom_without_positions_follows_the_instance_number(tmp_path):
    pytest.importorskip("pydicom")
    for k in range(3):
        pixels = np.full((4, 4), k)
        dicom(tmp_path / f"{k}.dcm", pixels, 0, InstanceNumber=10 - k, ImagePositionPatient=None)
        ds = pytest.importorskip("pydicom").dcmread(tmp_path / f"{k}.dcm")
        del ds.ImagePositionPatient
        ds.save_as(tmp_path / f"{k}.dcm")
    volume = open_volume(tmp_path)
    assert [float(volume.read(k)[0, 0]) for k in range(3)] == [-1020, -1022, -1024]
    assert volume.voxel_mm == (9.0, VOXEL[1], VOXEL[2])


def test_bad_dicom(tmp_path, series):
    folder, _ = series
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no DICOM image"):
        open_volume(tmp_path / "empty")
    dicom(folder / "other.dcm", np.zeros((5, 6)), 0, SeriesInstanceUID="9.9")
    with pytest.raises(InputError, match="mixes 2 DICOM series"):
        open_volume(folder)
    dicom(folder / "other.dcm", np.zeros((3, 3)), 0)
    with pytest.raises(InputError, match="differ in size"):
        open_volume(folder)
    (folder / "other.dcm").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"other\.dcm is not a readable DICOM"):
        open_volume(folder)


def test_slices_at_one_position_are_no_volume(tmp_path, series):
    folder, _ = series
    dicom(folder / "again.dcm", np.zeros((5, 6)), -100)
    with pytest.raises(InputError, match="share one position"):
        open_volume(folder)


def test_colour_and_truncated_dicom(tmp_path):
    dicom(tmp_path / "a.dcm", np.zeros((4, 4)), 0, SamplesPerPixel=3)
    with pytest.raises(InputError, match="colour or multi-frame"):
        open_volume(tmp_path)
    dicom(tmp_path / "a.dcm", np.ones((4, 4)), 0)
    raw = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(raw[:-8])
    with pytest.raises(InputError, match=r"not a readable DICOM|cannot be read"):
        open_volume(tmp_path).read(0)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nibabel", None)
    (tmp_path / "scan.nii").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs the package 'nibabel'.*invrecon\[io\]"):
        open_volume(tmp_path / "scan.nii")
