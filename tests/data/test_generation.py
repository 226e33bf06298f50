"""What unconditional generation is asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from invrecon.cli import main
from invrecon.data.generation import GenerationData
from invrecon.data.intensity import HOUNSFIELD, RGB
from invrecon.errors import InputError
from tests.cli.tiny import NETWORK, QUIET, SIZE, make_prior, read


def test_samples_are_asked_for_once_and_those_at_hand_not_again() -> None:
    data = GenerationData(num_images=5, batch_size=2)
    assert data.intensity == HOUNSFIELD
    data.skip_ids = {"sample/0001", "sample/0004"}
    batches = list(data.predict_dataloader())
    assert [batch.id for batch in batches] == [["sample/0000", "sample/0002"], ["sample/0003"]]
    assert [batch.index for batch in batches] == [[0, 2], [3]]
    assert all(batch.reference is None and batch.measurement is None for batch in batches)


@pytest.mark.parametrize("name", ["num_images", "size", "batch_size"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"data.{name} is 0"):
        GenerationData(**{name: 0})


def test_a_prior_of_another_scale_and_more_channels(tmp_path: Path) -> None:
    """Colour samples come out in the units that their prior was trained in; on the CT scale they are refused."""
    network = {**NETWORK, "image_channels": 3}
    prior = make_prior(tmp_path / "rgb.safetensors", network=network, intensity=asdict(RGB))
    args = ["predict", "--config", "generate_ct.yaml", "--output", str(tmp_path / "out"), *QUIET]
    args += [f"--model.prior={prior}", f"--model.operator.size={SIZE}", "--model.operator.num_channels=3"]
    args += [f"--data.size={SIZE}", "--data.num_images=1", "--model.method.schedule.num_levels=2"]
    with pytest.raises(InputError, match="intensity scale"):
        main(args)
    scale = ["--data.intensity.offset=0", "--data.intensity.scale=255", "--data.intensity.units=8 bit"]
    main([*args, "--model.num_figures=0", *scale])
    sample = read(tmp_path / "out" / "sample.h5")
    assert sample.shape[0] == 1 and 3 in sample.shape and 0 <= sample.min() < sample.max() <= 255
