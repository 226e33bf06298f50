import json

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.data.intensity import Intensity
from invrecon.data.volumes import (
    HDF5Volume,
    check_pixels,
    find_volumes,
    open_volume,
    parse_slices,
    read_volume,
)
from invrecon.errors import InputError


def test_hdf5_is_read_without_loss(write_h5):
    values = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) - 30
    path = write_h5(values=values, source="a phantom", units="HU", voxel_mm=[0.7, 0.8, 3.0], patient="P1")
    volume = open_volume(path)
    assert (volume.shape, len(volume), volume.stem) == ((3, 4, 5), 3, "scan")
    assert volume.voxel_mm == (3.0, 0.8, 0.7)  # (z, y, x), stored (x, y, z)
    assert (volume.patient, volume.patients, volume.source) == ("P1", ("P1",) * 3, "a phantom")
    for index in range(3):
        slice_ = volume.read(index)
        assert slice_.dtype == torch.float32
        assert torch.equal(slice_, torch.from_numpy(values[index]).float())
    whole, same = read_volume(path)
    assert torch.equal(whole, torch.from_numpy(values).float()) and same.shape == volume.shape


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64", ">i2"])
def test_every_real_type_is_read(write_h5, dtype):
    values = np.arange(2 * 4 * 4).reshape(2, 4, 4).astype(dtype)
    assert torch.equal(open_volume(write_h5(values=values)).read(1).int(), torch.arange(16, 32).reshape(4, 4).int())


def test_without_attributes_the_patient_is_the_file(write_h5):
    volume = open_volume(write_h5("abc.h5"))
    assert (volume.patient, volume.voxel_mm, volume.units) == ("abc", None, "HU")
    assert open_volume(write_h5("e.h5", voxel_mm=np.array([]))).voxel_mm is None


def test_another_dataset_can_be_named(write_h5):
    assert open_volume(write_h5(dataset="ct/full"), dataset="ct/full").shape == (5, 8, 8)


def test_a_sidecar_says_whose_slices_these_are(write_h5):
    path = write_h5(shape=(3, 8, 8))
    sidecar = path.with_name("scan.patients.json")
    sidecar.write_text(json.dumps([["a.dcm", "A"], ["b.dcm", "B", "more"], ["c.dcm", "B"]]))
    assert open_volume(path).patients == ("A", "B", "B")
    sidecar.write_text(json.dumps([["a.dcm", "A"]]))
    with pytest.raises(InputError, match=r"names 1 slices, but .* has 3"):
        open_volume(path)
    sidecar.write_text("{nonsense")
    with pytest.raises(InputError, match=r"patients.json is not understood"):
        open_volume(path)


def test_reading_keeps_no_slices(write_h5):
    volume = open_volume(write_h5(shape=(50, 16, 16)))
    assert isinstance(volume, HDF5Volume)
    for index in range(50):
        volume.read(index)
    held = [v for v in vars(volume).values() if isinstance(v, np.ndarray | torch.Tensor)]
    assert held == []


# --- bad input: one clear sentence each -------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.h5 does not exist"):
        open_volume(tmp_path / "gone.h5")


def test_truncated_file(write_h5):
    path = write_h5(shape=(20, 32, 32))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"scan\.h5 .*truncated"):
        open_volume(path)


@pytest.mark.parametrize("content", [b"", b"this is no HDF5", b"\x89HDF\r\n\x1a\n"])
def test_not_hdf5(tmp_path, content):
    path = tmp_path / "fake.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"fake\.h5 .*cannot be opened"):
        open_volume(path)


def test_a_damaged_chunk(tmp_path):
    path = tmp_path / "rot.h5"
    values = np.random.default_rng(0).integers(0, 1000, (2, 32, 32)).astype(np.int16)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", data=values, chunks=(1, 32, 32), compression="gzip")
        chunk = data.id.get_chunk_info(1)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset : chunk.byte_offset + 200] = b"\0" * 200
    path.write_bytes(raw)
    volume = open_volume(path)
    volume.read(0)
    with pytest.raises(InputError, match=r"Slice 1 of .*rot\.h5 cannot be read"):
        volume.read(1)


def test_wrong_dataset_name_lists_what_there_is(write_h5):
    with pytest.raises(InputError, match=r"no dataset 'data'; it has 'volume' \(5, 8, 8\)"):
        open_volume(write_h5(dataset="volume"))
    with pytest.raises(InputError, match="no dataset 'image'"):
        open_volume(write_h5(), dataset="image")


def test_a_group_is_no_dataset(write_h5):
    with pytest.raises(InputError, match=r"no dataset 'data'; it has 'data/a'"):
        open_volume(write_h5(dataset="data/a"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(write_h5, bad):
    values = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32) * 1000
    values[2, 3, :4] = bad
    volume = open_volume(write_h5(values=values))
    with pytest.raises(InputError, match=r"Slice 2 of .* has 4 NaN or Inf voxels of 64"):
        volume.read(2)
    with pytest.raises(InputError, match="Slice 2"):
        check_pixels(volume, [0, 1, 2])
    check_pixels(volume, [0, 1])


def test_values_that_are_no_hounsfield_units(write_h5):
    values = np.random.default_rng(0).uniform(-1000, 1500, (3, 8, 8)).astype(np.float32)
    fractions = open_volume(write_h5("f.h5", values=(values + 1000) / 3000))
    with pytest.raises(InputError, match=r"f\.h5' lie between .*expected Hounsfield units"):
        check_pixels(fractions, [0, 1, 2])
    with pytest.warns(UserWarning, match="no value below -500 HU"):
        check_pixels(open_volume(write_h5("o.h5", values=values + 1024)), [0, 1, 2])
    check_pixels(fractions, [0, 1, 2], Intensity(0.0, 1.0, "a.u."))


def test_constant_images(write_h5):
    values = np.full((3, 8, 8), 40, np.int16)
    path = write_h5(values=values)
    with pytest.raises(InputError, match=r"constant in .*scan\.h5: slice 1 is 40 HU"):
        check_pixels(open_volume(path), [1])
    with pytest.raises(InputError, match="all 3 slices from 0 on are 40 HU"):
        read_volume(path)
    values[1, 2, 2] = 50
    check_pixels(open_volume(write_h5(values=values)), [0, 1, 2])  # single slices of plain air are fine


def test_images_outside_the_scale_are_constant(write_h5):
    values = np.random.default_rng(0).integers(-3000, -1000, (2, 8, 8)).astype(np.int16)
    with pytest.raises(InputError, match="outside the scale"):
        check_pixels(open_volume(write_h5(values=values)), [0, 1])


def test_complex(write_h5):
    with pytest.raises(InputError, match=r"complex numbers \(complex64\), expected real"):
        open_volume(write_h5(values=np.ones((2, 4, 4), np.complex64)))


@pytest.mark.parametrize("values", [np.ones((2, 4, 4), bool), np.full((2, 4, 4), "a", dtype="S3")])
def test_elements_that_are_no_numbers(write_h5, values):
    with pytest.raises(InputError, match="expected integers or floats"):
        open_volume(write_h5(values=values))


def test_object_arrays(tmp_path):
    path = tmp_path / "objects.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", shape=(2, 4, 4), dtype=h5py.string_dtype())
    with pytest.raises(InputError, match="elements of type object"):
        open_volume(path)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0), (3, 1, 1), (3, 1, 8)])
def test_zero_size_and_one_by_one(write_h5, shape):
    with pytest.raises(InputError, match="at least one slice of 2 x 2"):
        open_volume(write_h5(values=np.zeros(shape, np.int16)))


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (2, 3, 8, 8)])
def test_wrong_number_of_axes(write_h5, shape):
    with pytest.raises(InputError, match="expected three axes"):
        open_volume(write_h5(values=np.ones(shape, np.int16)))


def test_other_units(write_h5):
    with pytest.raises(InputError, match=r"units 'a.u.', expected 'HU'"):
        open_volume(write_h5(units="a.u."))
    assert open_volume(write_h5(units="a.u."), units="a.u.").units == "a.u."


@pytest.mark.parametrize("voxel", [[1.0, 1.0], [1.0, 1.0, 0.0], [1.0, np.nan, 1.0]])
def test_bad_voxel_sizes(write_h5, voxel):
    with pytest.raises(InputError, match="'voxel_mm'"):
        open_volume(write_h5(voxel_mm=voxel))


@pytest.mark.parametrize("name", ["image.png", "array.npy", "pickled.pkl", "noname"])
def test_unknown_kinds(tmp_path, name):
    path = tmp_path / name
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes((tmp_path / "x.npy").read_bytes())
    with pytest.raises(InputError, match=r"not of a kind that can be read: expected \.h5"):
        open_volume(path)


def test_a_slice_that_is_not_there(write_h5):
    for index in (5, -1):
        with pytest.raises(InputError, match=f"no slice {index}: it has 5"):
            open_volume(write_h5()).read(index)


# --- finding ----------------------------------------------------------------------------------------------


def test_folders_are_searched_and_sorted(write_h5, tmp_path):
    for name in ("b.h5", "a.hdf5", "deep/c.h5", ".hidden.h5", "notes.txt"):
        write_h5(name)
    assert [path.name for path in find_volumes(tmp_path)] == ["a.hdf5", "b.h5", "c.h5"]
    twice = find_volumes([str(tmp_path / "b.h5"), tmp_path])
    assert [path.name for path in twice] == ["b.h5", "a.hdf5", "c.h5"]


def test_finding_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(InputError, match="holds no readable volume"):
        find_volumes(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_volumes([tmp_path / "gone"])
    with pytest.raises(InputError, match="No data path"):
        find_volumes([])


# --- selecting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, list(range(10))),
        ("3", [3]),
        ("1,4,9", [1, 4, 9]),
        ("2:8:3", [2, 5]),
        (":", list(range(10))),
        ("::4", [0, 4, 8]),
        ("7:", [7, 8, 9]),
        (":2, 5", [0, 1, 5]),
        ("8:2:-3", [8, 5]),
        ("0:10", list(range(10))),
    ],
)
def test_selections(text, expected):
    assert parse_slices(text, 10) == expected


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "1;2", "1.5", "2:8:0", ",", "1,,2"])
def test_selections_that_are_not_understood(text):
    with pytest.raises(InputError, match="are not understood"):
        parse_slices(text, 10)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10", "ask for slice 10"),
        ("-1", "ask for slice -1"),
        (":99999999999999", "ask for slice 10"),
        ("5:90:5", "ask for slice 10"),
        ("5:5", "select nothing"),
        ("1,1", "more than once"),
        ("0:3,2", "more than once"),
    ],
)
def test_selections_that_do_not_fit(text, reason):
    with pytest.raises(InputError, match=reason):
        parse_slices(text, 10)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 7), st.integers(1, 40))
def test_a_range_is_pythons_range(start, stop, step, num):
    expected = list(range(start, stop, step))
    if expected and max(expected) < num:
        assert parse_slices(f"{start}:{stop}:{step}", num) == expected
    else:
        with pytest.raises(InputError):
            parse_slices(f"{start}:{stop}:{step}", num)


@given(st.text(alphabet="0123456789:,- ax", max_size=8), st.integers(1, 12))
def test_any_text_gives_valid_slices_or_an_input_error(text, num):
    try:
        indices = parse_slices(text, num)
    except InputError:
        return
    assert indices and len(set(indices)) == len(indices) and all(0 <= index < num for index in indices)
