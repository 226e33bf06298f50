"""The store: nothing lost, nothing computed twice, memory constant in the number of slices."""

import json
import tracemalloc

import h5py
import numpy as np
import pytest
import torch

from invrecon.errors import InputError
from invrecon.report import store as store_module
from invrecon.report import volume as volume_module
from invrecon.report.provenance import file_identity, fingerprint, provenance
from invrecon.report.store import ROW_FIELDS, PredictionStore, remove_leftovers, write_metrics

RUN = fingerprint({"method": "fbp", "seed": 0}, "abc")


def image(index: int, size: int = 8) -> torch.Tensor:
    return torch.randn(1, size, size, generator=torch.Generator().manual_seed(index))


def save(store: PredictionStore, index: int, case: str = "lung", run: str = RUN, **arrays) -> None:
    row = {"case": case, "slice": index, "patient": case, "psnr": 30.0 + index}
    arrays = {"mean": image(index), "std": None, **arrays}
    store.save(f"{case}/{index:04d}", run, arrays, row, voxel_mm=(5.0, 1.25, 1.25), source=f"/data/{case}.h5")


def test_parts_become_a_volume(tmp_path):
    store = PredictionStore(tmp_path, provenance={"seed": 3})
    for index in (30, 10, 20):  # in whatever order the ranks finish
        samples = torch.stack([image(index), image(index + 1)])
        save(store, index, std=image(index).abs(), samples=samples, reference=image(0), baseline=image(1))
    assert store.completed(RUN) == {"lung/0010", "lung/0020", "lung/0030"}
    assert set(store.read("lung/0020").arrays) == {"mean", "std", "samples", "reference", "baseline"}
    assert store.assemble() == [tmp_path / "lung.h5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lung.h5"]
    with h5py.File(tmp_path / "lung.h5") as file:
        assert set(file) == {"mean", "std", "samples", "slices", "rows"}
        assert file["mean"].shape == (3, 8, 8) and file["samples"].shape == (3, 2, 8, 8)
        assert file["mean"].chunks == (1, 8, 8) and file["samples"].chunks == (1, 1, 8, 8)
        assert file["slices"][:].tolist() == [10, 20, 30]
        assert np.array_equal(file["mean"][1], image(20)[0].numpy())
        assert file.attrs["units"] == "HU" and file.attrs["voxel_mm"].tolist() == [5.0, 1.25, 1.25]
        assert json.loads(file.attrs["provenance"]) == {"seed": 3}
    part = store.read("lung/0020")
    assert np.array_equal(part.arrays["mean"], image(20)[0].numpy()) and part.row["psnr"] == 50.0
    assert (part.case, part.index, part.voxel_mm) == ("lung", 20, (5.0, 1.25, 1.25))


def test_a_rerun_recognises_parts_and_volumes_and_extends_them(tmp_path):
    first = PredictionStore(tmp_path)
    save(first, 1), save(first, 2), save(first, 7, case="abdomen")
    first.assemble()
    second = PredictionStore(tmp_path)
    assert second.completed(RUN) == {"lung/0001", "lung/0002", "abdomen/0007"}
    save(second, 0)
    assert second.completed(RUN) == {"lung/0000", "lung/0001", "lung/0002", "abdomen/0007"}
    assert second.assemble() == [tmp_path / "lung.h5"]
    assert [row["slice"] for row in second.rows()] == [7, 0, 1, 2]
    with h5py.File(tmp_path / "lung.h5") as file:
        for n in range(3):
            assert np.array_equal(file["mean"][n], image(n)[0].numpy())
    assert second.assemble() == [] and second.ids() == ["abdomen/0007", "lung/0000", "lung/0001", "lung/0002"]


@pytest.mark.parametrize("assembled", [False, True])
def test_another_run_is_refused(tmp_path, assembled):
    store = PredictionStore(tmp_path)
    save(store, 1)
    if assembled:
        store.assemble()
    with pytest.raises(InputError, match=r"another run: .*Choose another --output"):
        store.completed(fingerprint({"method": "tv"}))


def test_a_kill_while_assembling_loses_nothing(tmp_path, monkeypatch):
    store = PredictionStore(tmp_path)
    save(store, 1), save(store, 2)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(volume_module, "_check_part", killed)
        with pytest.raises(KeyboardInterrupt):
            store.assemble()
    assert not (tmp_path / "lung.h5").exists() and len(store.completed(RUN)) == 2
    with monkeypatch.context() as patch:  # between the volume and the removal of its parts
        patch.setattr(store_module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.assemble()
    assert (tmp_path / "lung.h5").exists() and len(store.completed(RUN)) == 2
    assert len(store.rows()) == 2
    store.assemble()
    assert len(store.rows()) == 2 and not store.parts_dir.exists()


def test_a_damaged_part_is_computed_again_and_a_damaged_volume_is_named(tmp_path):
    store = PredictionStore(tmp_path)
    save(store, 1), save(store, 2)
    path = store.parts_dir / "lung" / "0001.h5"
    path.write_bytes(path.read_bytes()[:100])
    assert store.completed(RUN) == {"lung/0002"}
    store.remove_damaged()  # the next run may not ask for that slice
    assert [row["slice"] for row in store.rows()] == [2] and store.ids() == ["lung/0002"]
    save(store, 1)
    store.assemble()
    volume = tmp_path / "lung.h5"
    volume.write_bytes(volume.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"lung\.h5 is damaged"):
        store.completed(RUN)


def test_a_strangers_file_in_the_folder_is_refused(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(InputError, match=r"scan\.h5 is no result of invrecon"):
        PredictionStore(tmp_path).completed(RUN)


def test_slices_that_do_not_fit_together_are_refused(tmp_path):
    store = PredictionStore(tmp_path)
    save(store, 1)
    save(store, 2, mean=torch.zeros(1, 9, 9))
    with pytest.raises(InputError, match=r"shape \(9, 9\).*\(8, 8\)"):
        store.assemble()
    save(store, 2)
    store.save("lung/0003", RUN, {"mean": image(3)}, {}, source="/elsewhere/lung.h5")
    with pytest.raises(InputError, match="Two input files share the name 'lung'"):
        store.assemble()
    with pytest.raises(InputError, match="rename"):
        store.save("../x/0001", RUN, {"mean": image(3)})


def test_rows_without_images_stay_parts(tmp_path):
    """`test` keeps its rows the same way, makes no volume, and can be continued."""
    store = PredictionStore(tmp_path)
    for index in range(3):
        store.save(f"lung/{index:04d}", RUN, {}, {"case": "lung", "slice": index, "psnr": float("inf")})
    assert store.assemble() == [] and len(store.completed(RUN)) == 3
    store.clear()
    assert store.completed(RUN) == set()


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path):
    peaks = []
    for num_slices in (4, 32):
        store = PredictionStore(tmp_path / str(num_slices))
        for index in range(num_slices):
            save(store, index, mean=image(index, size=256))
        tracemalloc.start()
        store.assemble()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 256 * 4  # less than one slice more for eight times the slices


def test_fingerprint_follows_what_decides_the_numbers(tmp_path):
    base = fingerprint({"a": 1, "b": [1, 2]}, "w", ["x", "y"])
    assert base == fingerprint({"b": (1, 2), "a": 1}, "w", ["y", "x"])
    assert (
        len(
            {
                base,
                fingerprint({"a": 2, "b": [1, 2]}, "w", ["x", "y"]),
                fingerprint({"a": 1, "b": [1, 2]}, "v"),
            }
        )
        == 3
    )
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = file_identity(path)
    path.write_bytes(b"12")
    assert file_identity(path) != before
    with pytest.raises(InputError, match="Cannot read"):
        file_identity(tmp_path / "absent")


def test_leftovers_of_a_kill_are_removed(tmp_path):
    store = PredictionStore(tmp_path)
    save(store, 1)
    for folder in (tmp_path, store.parts_dir / "lung"):
        (folder / ".x.h5.00.partial").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and store.completed(RUN) == {"lung/0001"}


def test_metrics_and_summary(tmp_path):
    rows = [{"case": "a", "slice": i, "patient": "a", "method": "FBP", "psnr": 20.0 + i} for i in range(4)]
    summary = write_metrics(tmp_path, rows)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["psnr"]["mean"] == 21.5 and summary["num_cases"] == 4
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == ",".join(ROW_FIELDS)
    two = write_metrics(tmp_path, rows + [{**row, "method": "TV"} for row in rows])
    assert list(two) == ["FBP", "TV"] and two["TV"]["psnr"]["mean"] == 21.5
    assert write_metrics(tmp_path, [])["num_cases"] == 0
    write_metrics(tmp_path, [{"case": "sample", "slice": 0, "seams": 1.0, "measurement": "none"}])
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "case,slice,seams,measurement"


def test_provenance_names_versions_and_command():
    record = provenance({"x": 1}, weights_sha256="ab", seed=0, command=["invrecon", "predict", "--output", "a b"])
    assert record["command"] == "invrecon predict --output 'a b'"
    assert {"python", "torch", "numpy"} <= set(record["versions"])
