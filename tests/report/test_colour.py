"""Colour images are drawn and written in their colours, and nothing about them is said in Hounsfield units."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from invrecon.adapt.base import Step, Trace
from invrecon.data.intensity import RGB
from invrecon.report import figures
from invrecon.report.adaptation import adaptation_figure, encode_trace, step_images
from invrecon.report.figures import case_figure, choose_windows, comparison_figure, image_png
from invrecon.report.html import write_report
from invrecon.report.provenance import file_identity
from invrecon.report.store import PredictionStore


def photo(size: int = 48) -> torch.Tensor:
    """Left half red, right half blue, levels of 8 bit, `(3, size, size)`."""
    image = torch.zeros(3, size, size)
    image[0, :, : size // 2], image[2, :, size // 2 :] = 250.0, 250.0
    return image


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def test_the_window_is_the_whole_scale() -> None:
    (window,) = choose_windows(photo(), RGB)
    assert (window.name, window.low, window.high) == ("8 bit", 0.0, 255.0)
    assert figures.window_range(window) == "0 … 255"


def test_image_png_is_pixel_for_pixel() -> None:
    values = torch.tensor([[[0.0, 300.0], [51.0, 255.0]], [[0.0, 102.0], [51.0, -9.0]], [[255.0, 0.0], [51.0, 0.0]]])
    (window,) = choose_windows(values, RGB)
    with Image.open(io.BytesIO(image_png(values, window))) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.tolist() == [[[0, 0, 255], [255, 102, 0]], [[51, 51, 51], [255, 0, 0]]]


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_figure_shows_the_colours(with_reference: bool, tmp_path: Path) -> None:
    image = photo()
    path = case_figure(
        tmp_path / "a.png",
        {"Direct inverse": image * 0.5, "Ours": image},
        reference=image if with_reference else None,
        std=torch.ones(3, 48, 48),
        intensity=RGB,
    )
    pixels = drawn(path)
    for colour in ((250, 0, 0), (0, 0, 250), (125, 0, 0)):
        assert (pixels == colour).all(axis=1).any(), colour


def test_a_comparison_shows_the_colours(tmp_path: Path) -> None:
    image = photo()
    path = comparison_figure(tmp_path / "a.png", {"blur": {"TV": image * 0.5, "Ours": image}}, image, intensity=RGB)
    assert (drawn(path) == (125, 0, 0)).all(axis=1).any()


def test_the_estimates_of_an_adaptation_show_the_colours(tmp_path: Path) -> None:
    step = Step("round 0", None, 1.0, 1.0, photo() / 255)
    trace = Trace([step], stopped_at=0, reason="the last", num_trainable=1, movement={"stem": 0.1})
    record = encode_trace(trace, ["photos/0000"], with_images=True)
    images = RGB.decode(step_images(trace, record["shown"])).numpy()
    path = adaptation_figure(tmp_path / "a.png", record, images, intensity=RGB)
    assert (drawn(path) == (250, 0, 0)).all(axis=1).any()


def test_psnr_counts_every_channel() -> None:
    truth = np.zeros((8, 8, 3), np.float32)
    wrong = truth.copy()
    wrong[..., 0] = 25.5  # a tenth of the scale in one channel of three
    labels = figures._psnr_labels({"x": wrong}, truth, RGB.offset, RGB.scale)
    assert labels["x"][0] == f"{20 + 10 * np.log10(3):.2f} dB"


def test_the_page_speaks_of_its_own_scale(tmp_path: Path) -> None:
    row = {"case": "a", "slice": 0, "patient": "p", "method": "TV", "psnr": 30.0, "ssim": 0.9}
    page = write_report(tmp_path / "r.html", {}, None, [row], [], intensity=RGB).read_text()
    assert "HU" not in page and "body”" not in page and "x = clip(value [8 bit] / 255, 0, 1)" in page
    page = write_report(tmp_path / "r.html", {}, None, [{**row, "psnr_body": 29.0}], []).read_text()
    assert "x = clip((HU + 1000) / 3000, 0, 1)" in page and "“body”" in page


def test_a_volume_keeps_the_channels(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, units=RGB.units)
    for index in (0, 3):
        arrays = {"mean": photo() + index, "std": photo(), "samples": torch.stack([photo(), photo()])}
        store.save(f"photos/{index:04d}", "f", arrays, {"case": "photos"}, source="photos")
    (path,) = store.assemble()
    with h5py.File(path, "r") as file:
        assert (file["mean"].shape, file["samples"].shape) == ((2, 3, 48, 48), (2, 2, 3, 48, 48))
        assert np.array_equal(file["mean"][1], photo() + 3)
        assert (file.attrs["units"], file.attrs["axes"]) == ("8 bit", "slice, channel, row, column")


def test_a_changed_image_in_a_folder_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    before = file_identity(tmp_path)
    assert file_identity(tmp_path) == before
    (tmp_path / "a.png").write_bytes(b"22")
    assert file_identity(tmp_path) != before
