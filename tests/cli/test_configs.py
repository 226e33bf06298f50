"""Every shipped config runs, and is found by its bare name."""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import invrecon.methods
from invrecon.data.intensity import Intensity
from invrecon.errors import InputError
from invrecon.metrics import seam_statistic
from invrecon.precision import training_precision
from tests.cli.tiny import FAST, QUIET, ROOT, SIZE, files_in, learn, read, reconstruct

# What makes each config tiny. A reconstruction of CT that is not named here is made tiny by what it has (`shrink`).
TRAINING = ("patch_ct", "whole_ct", "patch_ellipses", "whole_ellipses", "patch_rgb", "drunet_ct")
LEVELS = ("--model.method.schedule.num_levels=3", "--model.adaptation.steps=1")
ADAPTATION = {
    "tta_ct": (
        "--model.prior={}/patch.safetensors",
        "--model.method.num_levels=2",
        "--model.adaptation.rounds=1",
        "--model.adaptation.steps=1",
    ),
    "scd_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
    "ddip_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
    "patch_ss_ct": ("--model.prior={}/patch.safetensors", *LEVELS),
    "whole_ss_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
}
FAST_PATCH = ("--model.prior={}/patch.safetensors", "--model.method.num_levels=2")
RECONSTRUCTION = {
    **ADAPTATION,
    "recon_ct": FAST_PATCH,
    "recon_ct512": (*FAST_PATCH, "--model.layout.patch_size=8"),
    "limited_angle_ct": FAST_PATCH,
    "deblur_uniform_ct": FAST_PATCH,
    "deblur_heavy_ct": FAST_PATCH,
    "deblur_gaussian_ct": FAST_PATCH,
    "superres_block_ct": FAST_PATCH,
    "superres_bicubic_ct": FAST_PATCH,
    "inpaint_random_ct": FAST_PATCH,
    "inpaint_box_ct": (*FAST_PATCH, "--model.operator.box=8"),
    "recon_rgb": ("--model.prior={}/rgb.safetensors", "--model.method.num_levels=2"),
    "padis_ct": ("--model.prior={}/patch.safetensors", "--model.method.num_levels=2", "--model.method.num_inner=2"),
    "tv_ct": ("--model.method.num_iterations=25",),
    "fbp_ct": (),
    "dip_ct": ("--model.method.num_iterations=3",),
    "udig_dip_ct": (
        "--model.prior={}/whole.safetensors",
        "--model.method.num_iterations=3",
        "--model.method.num_inner=1",
    ),
    "sirt_ct": ("--model.method.num_iterations=3",),
    "wavelet_ct": ("--model.method.num_iterations=3",),
    "pnp_ct": ("--model.prior={}/whole.safetensors", "--model.method.num_iterations=2"),
    "red_ct": ("--model.prior={}/patch.safetensors", "--model.method.num_iterations=2"),
}
GENERATION = ("generate_ct",)
MRI = (
    "recon_mri",
    "patch_mri",
    "whole_mri",
    "zero_filled_mri",
    "cgsense_mri",
    "tv_mri",
    "wavelet_mri",
    "udig_dip_mri",
    "tta_mri",
)  # see test_mri.py


def shrink(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Returns options that make a reconstruction tiny: another prior where it has one, levels or iterations."""
    method, prior = arguments["method"], str(arguments.get("prior", ""))
    kind = getattr(invrecon.methods, method if isinstance(method, str) else method["class_path"])
    counts = [name for name in ("num_levels", "num_iterations") if name in inspect.signature(kind).parameters]
    file = f"{'whole' if prior.startswith('whole') else 'patch'}.safetensors"
    priors = (f"--model.prior={{}}/{file}",) if prior else ()
    return (*priors, *(f"--model.method.{name}=2" for name in counts[:1]))


SHIPPED = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
for name in sorted(SHIPPED - {*TRAINING, *RECONSTRUCTION, *GENERATION, *MRI}):
    model = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]
    if name.endswith("_ct") and model["class_path"] == "Reconstruction":
        RECONSTRUCTION[name] = shrink(model["init_args"])


def test_every_shipped_config_is_tested() -> None:
    assert {*TRAINING, *RECONSTRUCTION, *GENERATION, *MRI} == SHIPPED


@pytest.mark.parametrize("config", TRAINING)
def test_a_prior_is_trained_validated_and_used(
    config: str, invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    run, rgb = tmp_path / "run", config.endswith("rgb")
    command = learn(f"{config}.yaml", library / ("photos" if rgb else "scans"), run)
    invrecon(command)
    assert {"checkpoints/last.ckpt", "prior.safetensors", "prior.md"} <= files_in(run)
    prior = load_file(run / "prior.safetensors")
    assert f"| precision | {training_precision('cpu')} |" in (run / "prior.md").read_text()
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == 4

    if config in ("patch_ct", "patch_rgb"):  # one loop for all: once for scans, once for photographs
        invrecon(command)  # finished: exports the same weights again
        again = load_file(run / "prior.safetensors")
        assert all(torch.equal(prior[key], again[key]) for key in prior)

        cli = invrecon(["validate", *command[1:]])
        assert torch.equal(cli.model.ema.state_dict()["network.stem.weight"], prior["network.stem.weight"])
        assert float(cli.trainer.callback_metrics["validation/loss"]) > 0

    args = (f"--model.prior={run / 'prior.safetensors'}", *FAST)
    user, data = ("recon_rgb.yaml", "photos") if rgb else ("recon_ct.yaml", "scans/a.h5")
    invrecon(reconstruct("predict", user, library / data, tmp_path / "out", *args))
    result = read(tmp_path / "out" / f"{Path(data).stem}.h5")
    assert result.shape == ((4, 3, SIZE, SIZE) if rgb else (4, SIZE, SIZE))
    assert not files_in(here)


def test_the_precision_that_is_asked_for_wins(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("invrecon.cli.training_precision", lambda device: "bf16-mixed")
    command = learn("patch_ct.yaml", library / "scans", tmp_path / "run")
    assert invrecon([*command, "--trainer.precision=32-true"]).trainer.precision == "32-true"
    assert invrecon(["validate", *command[1:]]).trainer.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("accelerator", "cuda", "mps", "device"),
    [
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("auto", False, True, "other"),
        ("cpu", True, True, "cpu"),
        ("gpu", True, False, "cuda"),
        ("mps", False, True, "other"),
    ],
)
def test_the_device_of_an_accelerator(
    accelerator: str, cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invrecon.cli import training_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert training_device(accelerator) == device


def test_an_interrupted_training_is_continued_by_the_same_command(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invrecon.tasks.score_matching import ScoreMatching

    undisturbed, disturbed = (learn("patch_ct.yaml", library / "scans", tmp_path / name) for name in "ud")
    invrecon(undisturbed)
    step = ScoreMatching.training_step

    def dies(self: Any, batch: Any, batch_index: int) -> Any:
        if self.global_step == 3:
            raise RuntimeError("the power is gone")
        return step(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreMatching, "training_step", dies)
        with pytest.raises(RuntimeError, match="power"):
            invrecon(disturbed)
    assert not (tmp_path / "d" / "prior.safetensors").exists()
    invrecon(disturbed)
    one, other = (load_file(tmp_path / name / "prior.safetensors") for name in "ud")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_training_is_not_continued_with_other_data(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    invrecon(learn("patch_ct.yaml", library / "scans", tmp_path / "run"))
    card = (tmp_path / "run" / "prior.md").read_text()
    with pytest.raises(InputError, match=r"data\.paths.*another --output"):
        invrecon(learn("patch_ct.yaml", library / "ten.h5", tmp_path / "run"))
    assert (tmp_path / "run" / "prior.md").read_text() == card


@pytest.mark.parametrize(
    ("config", "command"),
    # `test` is one loop for all of a kind
    [(name, "predict") for name in RECONSTRUCTION]
    + [(name, "test") for name in ("fbp_ct", "recon_rgb", *ADAPTATION, "dip_ct")],
)
def test_reconstruction_configs(
    config: str, command: str, invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    more = [option.format(library) for option in RECONSTRUCTION[config]]
    data = "photos" if config.endswith("rgb") else "scans"
    more += ["--model.num_figures=0", "--data.slices=0"]  # of each of three patients
    args = reconstruct(command, f"{config}.yaml", library / data, tmp_path / "out", *more)
    invrecon(args)
    expected = {"config.yaml", "metrics.csv", "summary.json"}
    if config in ADAPTATION or "dip" in config:
        expected.add("adaptation.json")
    volumes = {"photos.h5"} if data == "photos" else {"a.h5", "b.h5", "c.h5"}
    assert files_in(tmp_path / "out") == expected | ({*volumes, "report.html"} if command == "predict" else set())
    assert not files_in(here)


def test_a_fit_has_a_figure_of_its_losses(
    invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    more = [option.format(library) for option in RECONSTRUCTION["dip_ct"]]
    data = (library / "scans" / "a.h5", tmp_path / "out", "--model.num_figures=1")
    invrecon(reconstruct("predict", "dip_ct.yaml", *data, *more))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Fit</h2>" in page and "<h2>Adaptation</h2>" not in page
    assert any(name.endswith("_adaptation.png") for name in files_in(tmp_path / "out" / "figures"))


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("BicubicDownsample", (3, SIZE // 4, SIZE // 4)),
        ("BlockDownsample", (3, SIZE // 4, SIZE // 4)),
        ("UniformBlur", (3, SIZE, SIZE)),
        ("RandomInpainting", (3, SIZE, SIZE)),
        ("BoxInpainting", (3, SIZE, SIZE)),
    ],
)
def test_the_operator_of_colour_images_is_swapped_by_name(
    operator: str, shape: tuple[int, ...], invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    args = [f"--model.operator={operator}", f"--model.prior={library}/rgb.safetensors", *FAST]
    args += ["--model.operator.box=8"] if operator == "BoxInpainting" else []
    cli = invrecon(reconstruct("test", "recon_rgb.yaml", library / "photos", tmp_path / "out", *args))
    assert type(cli.model.operator).__name__ == operator
    assert cli.model.operator.measurement_shape == shape


def test_a_colour_image_is_reported_without_hounsfield_units(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    args = [f"--model.prior={library}/rgb.safetensors", "--model.method.num_levels=2", "--model.num_figures=1"]
    args += ["--model.method.num_samples=2", "--model.save_samples=true"]
    invrecon(reconstruct("predict", "recon_rgb.yaml", library / "photos", tmp_path / "out", *args))
    assert read(tmp_path / "out" / "photos.h5", "samples").shape == (4, 2, 3, SIZE, SIZE)
    mean = read(tmp_path / "out" / "photos.h5")
    assert mean.min() >= 0 and 100 < mean.max() <= 255
    page = (tmp_path / "out" / "report.html").read_text()
    text = re.sub(r"base64,[^\"]*", "", page)
    assert "8 bit" in text and not re.search(r"\bHU\b|PSNR, body", text)
    assert (tmp_path / "out" / "figures" / "photos_0002.png").is_file()


def test_a_prior_of_ct_is_not_for_photos(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    args = [f"--model.prior={library}/patch.safetensors", *FAST]
    with pytest.raises(InputError, match="intensity scale"):
        invrecon(reconstruct("test", "recon_rgb.yaml", library / "photos", tmp_path / "out", *args))


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_unconditional_samples(invrecon: Callable[..., Any], library: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    args = ["predict", "--config", "generate_ct.yaml", "--output", str(out), *QUIET, "--model.num_figures=1"]
    args += [f"--model.prior={library}/{kind}.safetensors", f"--model.operator.size={SIZE}", f"--data.size={SIZE}"]
    invrecon([*args, "--model.method.schedule.num_levels=2", "--data.num_images=3", "--data.batch_size=2"])
    samples = read(out / "sample.h5")
    assert samples.shape == (3, SIZE, SIZE)
    assert abs(samples[0] - samples[1]).max() > 1  # [HU]: each from a seed of its own
    assert {"report.html", "figures/sample_0001.png"} <= files_in(out)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    summary, page = json.loads((out / "summary.json").read_text()), (out / "report.html").read_text()
    assert len(rows) == 3 and all(value != "" for row in rows for value in row.values()), "no column is empty"
    assert not {"psnr", "ssim", "psnr_body"} & {*rows[0], *summary}
    seams = {"seams", "contrast"}  # only patches have them
    assert seams & set(rows[0]) == seams & set(summary) == (seams if kind == "patch" else set())
    assert ("Seam contrast" in page) == (kind == "patch") and "show nobody" in page
    if kind == "patch":
        images = Intensity().encode(torch.from_numpy(samples))[:, None]  # 8-pixel patches: a centred grid begins at 0
        expected = seam_statistic(images, 8).tolist()
        assert [float(row["seams"]) for row in rows] == pytest.approx(expected, rel=0.02)


def test_an_existing_file_wins_over_a_shipped_config(
    invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    text = (ROOT / "configs" / "fbp_ct.yaml").read_text()
    assert "num_views: 20" in text
    (here / "fbp_ct.yaml").write_text(text.replace("num_views: 20", "num_views: 9"))
    args = reconstruct("test", "fbp_ct.yaml", library / "scans", tmp_path / "out")
    args.remove("--model.operator.num_views=12")
    assert invrecon(args).model.operator.num_views == 9
    (here / "fbp_ct.yaml").unlink()
    assert invrecon([arg.replace("fbp_ct.yaml", "fbp_ct") for arg in args]).model.operator.num_views == 20


def test_an_unknown_config_is_named_with_what_there_is(invrecon: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"no config file 'recon.yaml'.*recon_ct\.yaml"):
        invrecon(["test", "--config", "recon.yaml"])


def test_the_config_that_a_run_keeps_runs_again(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    more = ("--data.slices", "0:4:2", "--model.noise=RelativeGaussianNoise", "--model.num_figures=0")
    invrecon(reconstruct("predict", "fbp_ct.yaml", library / "ten.h5", first, *more))
    invrecon(["predict", "--config", str(first / "config.yaml"), "--output", str(second)])
    assert (read(first / "ten.h5") == read(second / "ten.h5")).all()
