import math

import h5py
import numpy as np
import pytest
import torch

from invrecon.data.measurement import is_measurement, open_measurement, write_measurement
from invrecon.errors import InputError

PARALLEL = {
    "type": "parallel",
    "angles": [(j + 0.5) * math.pi / 4 for j in range(4)],
    "num_bins": 6,
    "detector_length": 80.0,
    "field_of_view": 40.0,
}
FAN = {**PARALLEL, "type": "fan", "source_distance": 40.0, "detector_distance": 30.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scan.h5"


def write(path, geometry=PARALLEL, **options):
    y = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    write_measurement(path, y, geometry, **options)
    return y


@pytest.mark.parametrize("geometry", [PARALLEL, FAN])
def test_round_trip(path, geometry):
    y = write(path, geometry, noise_std=0.5, voxel_mm=(3.0, 1.5, 1.25), patient="A-17", source="bench")
    assert is_measurement(path)
    scan = open_measurement(path)
    assert (scan.shape, len(scan), scan.stem) == ((3, 4, 6), 3, "scan")
    assert (scan.geometry, scan.voxel_mm, scan.patient) == (geometry, (3.0, 1.5, 1.25), "A-17")
    for index in range(3):
        sinogram, std = scan.read(index)
        assert torch.equal(sinogram, y[index][None])
        assert std.shape == () and float(std) == 0.5


def test_noise_free_is_none_and_the_patient_defaults_to_the_file(path):
    write(path)
    scan = open_measurement(path)
    assert scan.read(2)[1] is None and scan.patient == "scan" and scan.voxel_mm is None


@pytest.mark.parametrize("shape", [(3,), (3, 4, 6)])
def test_noise_per_sinogram_and_per_ray(path, shape):
    noise = torch.rand(shape)
    write(path, noise_std=noise)
    for index in range(3):
        std = open_measurement(path).read(index)[1]
        assert torch.equal(std, noise[index] if noise.ndim == 1 else noise[index][None])


def test_no_reference_is_inside(path):
    write(path, noise_std=0.1, patient="p", source="s")
    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
    assert sorted(names) == ["geometry", "geometry/angles", "noise_std", "sinograms"]


def test_tensors_and_arrays_serve_as_geometry(path):
    geometry = {
        **PARALLEL,
        "angles": torch.tensor(PARALLEL["angles"], dtype=torch.float64),
        "num_bins": np.int32(6),
    }
    write(path, geometry)
    assert open_measurement(path).geometry == PARALLEL


def test_volumes_and_other_files_are_no_measurements(write_h5, tmp_path):
    assert not is_measurement(write_h5())
    assert not is_measurement(tmp_path / "gone.h5")
    assert not is_measurement(tmp_path)
    (tmp_path / "bad.h5").write_bytes(b"nothing")
    assert not is_measurement(tmp_path / "bad.h5")


def test_a_failed_write_leaves_the_old_file_whole(path):
    y = write(path)
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_measurement(path, y * float("nan"), PARALLEL)
    with pytest.raises(InputError):
        write_measurement(path, y, PARALLEL, noise_std=torch.ones(2))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# --- bad input --------------------------------------------------------------------------------------------


def change(path, edit):
    write(path, noise_std=0.1)
    with h5py.File(path, "r+") as file:
        edit(file)


def drop(*names):
    def edit(file):
        for name in names:
            del file[name]

    return edit


def put(name, value):
    def edit(file):
        del file[name]
        file[name] = value

    return edit


def attribute(group, name, value):
    return lambda file: file[group].attrs.__setitem__(name, value)


def forget(group, name):
    return lambda file: file[group].attrs.__delitem__(name)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (drop("sinograms"), "no dataset 'sinograms'; it has 'geometry/angles'"),
        (drop("geometry"), "no group 'geometry'"),
        (drop("geometry/angles"), "no dataset 'geometry/angles'"),
        (
            put("sinograms", np.zeros((3, 4, 7))),
            r"\(4, 7\) \(views, bins\), but its geometry has 4 angles and 6 bins",
        ),
        (put("sinograms", np.zeros((3, 5, 6))), "but its geometry has 4 angles"),
        (put("geometry/angles", np.zeros(3)), "but its geometry has 3 angles"),
        (put("sinograms", np.zeros((4, 6))), r"expected \(slices, views, bins\)"),
        (put("sinograms", np.zeros((0, 4, 6))), r"expected \(slices, views, bins\)"),
        (put("sinograms", np.zeros((3, 4, 6), complex)), "complex numbers"),
        (put("geometry/angles", np.array([0, 1, 2, np.nan])), "finite numbers"),
        (put("geometry/angles", np.array([0.0, 45.0, 90.0, 135.0])), "divide degrees by"),
        (put("geometry/angles", np.zeros((4, 1))), r"shape \(4, 1\)"),
        (put("geometry/angles", np.array([b"a"] * 4)), "not a number"),
        (attribute("geometry", "type", "helix"), "type 'helix', expected one of parallel, fan"),
        (forget("geometry", "type"), "type ''"),
        (forget("geometry", "field_of_view"), "lacks 'field_of_view'"),
        (attribute("geometry", "type", "fan"), "lacks 'source_distance'"),
        (attribute("geometry", "pitch", 1.0), "unknown entry 'pitch'"),
        (attribute("geometry", "detector_length", -80.0), "'detector_length' = -80.0, expected a positive"),
        (attribute("geometry", "detector_length", np.nan), "expected a positive length"),
        (attribute("/", "intensity_scale", 4000.0), "'intensity_scale' = 4000.0, expected 3000"),
        (forget("/", "intensity_offset"), "'intensity_offset' = None, expected -1000"),
        (put("noise_std", np.ones(2)), "expected one number, one per sinogram"),
        (put("noise_std", np.float32(-1)), "expected a standard deviation > 0"),
        (put("noise_std", np.float32(0)), "expected a standard deviation > 0"),
        (put("noise_std", np.float32(np.nan)), "expected a standard deviation > 0"),
        (attribute("/", "voxel_mm", [1.0, 2.0]), "'voxel_mm'"),
    ],
)
def test_a_file_that_is_not_as_documented(path, edit, reason):
    change(path, edit)
    with pytest.raises(InputError, match=reason) as caught:
        open_measurement(path)
    assert "scan.h5" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_sinogram_dataset_is_still_recognised(path):
    change(path, drop("sinograms"))
    assert is_measurement(path)


def test_nan_in_a_sinogram_and_bad_noise_per_ray(path):
    change(path, put("sinograms", np.full((3, 4, 6), np.nan)))
    with pytest.raises(InputError, match=r"Sinogram 1 of .* has 24 NaN or Inf values of 24"):
        open_measurement(path).read(1)
    change(path, put("noise_std", -np.ones((3, 4, 6))))
    with pytest.raises(InputError, match="'noise_std' of sinogram 0"):
        open_measurement(path).read(0)
    with pytest.raises(InputError, match="no sinogram 3: it has 3"):
        open_measurement(path).read(3)


def test_writing_impossible_noise(path):
    for noise in (-1.0, math.nan, torch.tensor([1.0, -1.0, 1.0])):
        with pytest.raises(InputError, match=r"noise_std.* expected"):
            write(path, noise_std=noise)


def test_missing_and_truncated_files(path):
    with pytest.raises(InputError, match="does not exist"):
        open_measurement(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        open_measurement(path)


@pytest.mark.parametrize(
    ("sinograms", "geometry", "reason"),
    [
        (torch.zeros(4, 6), PARALLEL, r"shape \(4, 6\), expected"),
        (torch.zeros(1, 4, 7), PARALLEL, "but its geometry has 4 angles and 6 bins"),
        (torch.full((1, 4, 6), math.inf), PARALLEL, "NaN or Inf"),
        (torch.zeros(1, 4, 6), {**PARALLEL, "angles": None}, "lacks 'angles'"),
        (torch.zeros(1, 4, 6), {**PARALLEL, "num_bins": "many"}, "not a number"),
    ],
)
def test_writing_what_does_not_fit(path, sinograms, geometry, reason):
    with pytest.raises(InputError, match=reason):
        write_measurement(path, sinograms, geometry)
    assert not path.exists()
