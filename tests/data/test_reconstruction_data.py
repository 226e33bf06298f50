"""Every selected slice once: alone, over ranks, after an interruption, through Lightning's own loops."""

from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch

from invrecon.data.measurement import write_measurement
from invrecon.data.reconstruction import ReconstructionData, resolve_paths
from invrecon.errors import InputError

GEOMETRY = {
    "type": "parallel",
    "angles": [0.1, 1.0],
    "num_bins": 6,
    "detector_length": 8.0,
    "field_of_view": 4.0,
}


def ids(loader):
    return [name for batch in loader for name in batch.id]


def on_rank(data, rank, world_size):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


@pytest.fixture
def folder(write_h5, tmp_path):
    """Two volumes of 5 and 3 slices and a measurement file of 2."""
    write_h5("in/a.h5", voxel_mm=[1.0, 1.0, 3.0], patient="P")
    write_h5("in/b.h5", shape=(3, 16, 16))
    write_measurement(tmp_path / "in" / "m.h5", torch.rand(2, 2, 6), GEOMETRY, noise_std=0.1, patient="Q")
    return str(tmp_path / "in")


ALL = [f"a/{i:04d}" for i in range(5)] + [f"b/{i:04d}" for i in range(3)] + [f"m/{i:04d}" for i in range(2)]


def test_batches_hold_volumes_and_measurements_and_never_mix_files(folder):
    data = ReconstructionData(folder, size=8, batch_size=2)
    batches = list(data.test_dataloader())
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 1, 2]
    assert all(len(set(batch.source)) == 1 for batch in batches)
    volume, fine, measured = batches[0], batches[3], batches[5]
    assert volume.reference.shape == (2, 1, 8, 8) and volume.measurement is None and volume.geometry is None
    assert volume.reference.min() >= 0 and volume.reference.max() <= 1
    assert (volume.patient, volume.voxel_mm) == (["P", "P"], [(3.0, 1.0, 1.0)] * 2)
    assert fine.reference.shape == (2, 1, 16, 16)  # finer by an integer factor: kept as stored
    assert measured.reference is None and measured.measurement.shape == (2, 1, 2, 6)
    assert torch.equal(measured.noise_std, torch.tensor([0.1, 0.1])) and measured.geometry == GEOMETRY
    assert measured.patient == ["Q", "Q"]


def test_the_index_lists_every_case(folder):
    data = ReconstructionData(folder, size=8, slices="0:2")
    assert [(path.name, indices) for path, indices in data.case_index()] == [(f"{n}.h5", [0, 1]) for n in "abm"]
    assert data.case_ids() == [f"{n}/{i:04d}" for n in "abm" for i in range(2)] == ids(data.test_dataloader())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_case_is_on_exactly_one_rank(folder, num_ranks, batch_size):
    seen = []
    for rank in range(num_ranks):
        data = on_rank(ReconstructionData(folder, size=8, batch_size=batch_size), rank, num_ranks)
        seen += ids(data.predict_dataloader())
        assert len(data.predict_dataloader()) == max(1, len(list(data.predict_dataloader())))
    assert sorted(seen) == ALL


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(folder, num_workers):
    data = ReconstructionData(folder, size=8, batch_size=2, num_workers=num_workers)
    assert ids(data.test_dataloader()) == ALL


def test_what_is_done_is_skipped_by_predict_only(folder):
    data = ReconstructionData(folder, size=8, batch_size=2)
    data.skip_ids = {"a/0001", "a/0002", "m/0000", "m/0001"}
    assert ids(data.predict_dataloader()) == [name for name in ALL if name not in data.skip_ids]
    assert ids(data.test_dataloader()) == ALL
    data.skip_ids = set(ALL)
    assert ids(data.predict_dataloader()) == []


class Collect(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.seen, self.ended = [], False

    def test_step(self, batch):
        assert self.trainer.test_dataloaders is not None
        self.seen += batch.id

    def predict_step(self, batch):
        self.seen += batch.id
        return batch.index

    def on_test_epoch_end(self):
        self.ended = True

    def on_predict_epoch_end(self):
        self.ended = True


@pytest.fixture
def trainer(tmp_path):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        default_root_dir=tmp_path,
    )


@pytest.mark.parametrize("command", ["test", "predict"])
def test_lightnings_loops_see_every_case_once(folder, command, trainer, recwarn):
    model, names = Collect(), "ab" if command == "test" else "abm"  # a measurement has nothing to be tested against
    paths = [f"{folder}/{name}.h5" for name in names]
    getattr(trainer, command)(model, datamodule=ReconstructionData(paths, size=8, batch_size=2))
    assert model.seen == [name for name in ALL if name[0] in names] and model.ended
    assert not [warning for warning in recwarn if "__len__" in str(warning.message)]


def test_a_measurement_is_not_tested_and_nothing_before_it(folder):
    data = ReconstructionData(folder, size=8)
    with pytest.raises(InputError, match=r"m\.h5 is a measurement without a reference.*predict"):
        data.setup("test")


def test_with_nothing_left_the_loops_still_end_properly(folder, trainer):
    model, data = Collect(), ReconstructionData(folder, size=8)
    data.skip_ids = set(ALL)
    trainer.predict(model, datamodule=data)
    assert model.seen == [] and model.ended


# --- paths and selections ---------------------------------------------------------------------------------


def test_shipped_files_are_found_by_name_and_existing_ones_win(write_h5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shipped,) = resolve_paths("lung2_sample.h5")
    assert shipped.parent.name == "data" and shipped.is_file()
    write_h5("lung2_sample.h5")
    assert resolve_paths(["lung2_sample.h5"])[0].resolve() == tmp_path / "lung2_sample.h5"
    with pytest.raises(InputError, match=r"nothing\.h5 does not exist, and is none of the shipped files \(lung2_mea"):
        resolve_paths("nothing.h5")


def test_selections_apply_to_each_file_and_must_fit(folder):
    with pytest.raises(InputError, match=r"ask for slice 2, but .*m\.h5 has only 0 to 1"):
        ReconstructionData(folder, size=8, slices="0:3").setup()


def test_equal_names_are_refused(write_h5):
    paths = [str(write_h5("one/a.h5")), str(write_h5("two/a.h5"))]
    with pytest.raises(InputError, match="have the same name"):
        ReconstructionData(paths, size=8).setup()


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 24, 24), (2, 16, 32), (2, 17, 17)])
def test_sizes_that_do_not_divide_point_to_the_converter(write_h5, shape):
    with pytest.raises(InputError, match=r"expected a multiple of data.size = 16.*convert .*--size 16"):
        ReconstructionData(str(write_h5(shape=shape)), size=16).setup()


@pytest.mark.parametrize("option", [{"size": 0}, {"size": 1}, {"batch_size": 0}, {"num_workers": -1}])
def test_numbers_that_make_no_sense(option):
    with pytest.raises(InputError, match=next(iter(option))):
        ReconstructionData("lung2_sample.h5", **option)


def test_bad_pixels_are_found_before_anything_is_reconstructed(write_h5):
    values = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32) * 1000
    values[5, 1, 1] = np.nan
    path = str(write_h5(values=values))
    with pytest.raises(InputError, match="Slice 5"):
        ReconstructionData(path, size=8).setup()
    ReconstructionData(path, size=8, slices=":5").setup()
    constant = str(write_h5("c.h5", values=np.full((2, 8, 8), -1000, np.int16)))
    with pytest.raises(InputError, match="constant"):
        ReconstructionData(constant, size=8).setup()


def test_selections_survive_the_command_line(tmp_path):
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ReconstructionData, "data")
    for text in ("10:50:5", "3", "1,4,9", ":", "1:30"):
        assert parser.parse_args([f"--data.slices={text}"]).data.slices == text
    parser.add_argument("--config", action="config")
    config = tmp_path / "run.yaml"
    config.write_text("data:\n  slices: '10:50:5'\n")
    assert parser.parse_args(["--config", str(config)]).data.slices == "10:50:5"
    config.write_text("data:\n  slices: 10:50:5\n")  # a base-60 number in YAML 1.1: refused, not misread
    with pytest.raises(ArgumentError, match="Expected a <class 'str'>"):
        parser.parse_args(["--config", str(config)])
    assert parser.parse_args(["--data.paths", "a.h5"]).data.paths in ("a.h5", ["a.h5"])
    assert parser.parse_args(["--data.paths", '["a.h5", "b.h5"]']).data.paths == ["a.h5", "b.h5"]
