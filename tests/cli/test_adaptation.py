"""`test` and `predict` with an adapted prior: what they write, pooled reruns, and wrong names."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from invrecon.data.reconstruction import ReconstructionData
from invrecon.errors import InputError
from tests.cli.tiny import QUIET, SIZE, files_in, read
from tests.tasks.test_adaptation import Nudge


@pytest.fixture
def command(library: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a run on the four slices of `a`, two at once."""
    model = {
        "operator": {"class_path": "ParallelBeamCT", "init_args": {"size": SIZE, "num_views": 12, "num_bins": 48}},
        "method": {"class_path": "ProximalDiffusion", "init_args": {"num_levels": 2}},
        "adaptation": {
            "class_path": "tests.tasks.test_adaptation.Nudge",
            "init_args": {"log": str(tmp_path / "log.txt")},
        },
        "prior": str(library / "whole.safetensors"),
        "num_figures": 1,
    }
    data = {"paths": str(library / "scans" / "a.h5"), "size": SIZE, "batch_size": 2}
    config = {
        "model": {"class_path": "TestTimeAdaptation", "init_args": model},
        "data": {"class_path": "ReconstructionData", "init_args": data},
    }
    (tmp_path / "tta.yaml").write_text(yaml.safe_dump(config))

    def arguments(name: str, *more: str, output: str = "out") -> list[str]:
        return [name, "--config", str(tmp_path / "tta.yaml"), "--output", str(tmp_path / output), *QUIET, *more]

    return arguments


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log.txt").read_text().split()]


def test_what_predict_writes(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    invrecon(command("predict", "--model.adaptation.verdict=it does not suit"))
    figures = {"figures/a_0002.png", "figures/a_0002_adaptation.png"}
    tables = {"metrics.csv", "summary.json", "config.yaml", "adaptation.json"}
    assert files_in(out) == figures | tables | {"a.h5", "report.html"}
    traces = json.loads((out / "adaptation.json").read_text())
    assert list(traces) == [f"a/{i:04d}" for i in range(4)]
    trace = traces["a/0002"]
    assert [step["name"] for step in trace["steps"]] == ["round 0", "round 1", "round 2"]
    assert (trace["stopped_at"], trace["cases"], trace["verdict"]) == (1, ["a/0002"], "it does not suit")
    assert "image" not in trace["steps"][0] and "shown" not in trace and trace["movement"]["head"] > 0
    rows = rows_of(out)
    assert {row["stopped_at"] for row in rows} == {"round 1"} and {row["verdict"] for row in rows} == {trace["verdict"]}
    assert all(float(row["data_loss"]) == 0.25 and float(row["held_out_loss"]) == 1.0 for row in rows)
    assert {"data_loss", "held_out_loss", "num_trainable"} < json.loads((out / "summary.json").read_text()).keys()
    assert "ProximalDiffusion + Nudge" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    section = page.split("<h2>Adaptation</h2>")[1].split("</section>")[0]
    assert section.count("<img") == 1 and "The result is that of “round 1” (the held-out loss rose)." in section
    assert "anew for every slice" in page

    before = {name: (out / name).read_bytes() for name in figures | {"adaptation.json"}}
    invrecon(command("predict", "--model.adaptation.verdict=it does not suit"))
    assert len(calls(tmp_path)) == 4  # none again
    assert before == {name: (out / name).read_bytes() for name in before}
    assert (out / "report.html").read_text().count("<h2>Adaptation</h2>") == 1


def test_more_slices_keep_the_traces_of_the_first(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    invrecon(command("predict", "--data.slices=0", "--model.num_figures=0"))
    first = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    invrecon(command("predict", "--data.slices=0:2", "--data.batch_size=3", "--model.num_figures=0"))
    both = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert list(both) == ["a/0000", "a/0001"] and both["a/0000"] == first["a/0000"] != both["a/0001"]
    assert calls(tmp_path) == [1, 1]


def test_test_writes_the_rows_of_predict(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    invrecon(command("test"))
    invrecon(command("predict", "--model.num_figures=0", output="predict"))
    assert files_in(tmp_path / "out") == {"metrics.csv", "summary.json", "config.yaml", "adaptation.json"}
    measured = {"seconds", "peak_memory_mb"}
    test, predict = (
        [{k: v for k, v in row.items() if k not in measured} for row in rows_of(tmp_path / name)]
        for name in ("out", "predict")
    )
    assert test == predict
    texts = [(tmp_path / name / "adaptation.json").read_text() for name in ("out", "predict")]
    assert texts[0] == texts[1]


def test_a_pooled_run_that_was_interrupted_gives_the_numbers_of_one_that_was_not(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, adapt, num = tmp_path / "out", Nudge.adapt, []

    def fails(self: Nudge, *args: Any) -> Any:
        num.append(None)
        if len(num) > 1:
            raise RuntimeError("the power is gone")
        return adapt(self, *args)

    pooled = "--model.pool=true"
    with monkeypatch.context() as patch:
        patch.setattr("tests.tasks.test_adaptation.Nudge.adapt", fails)
        with pytest.raises(RuntimeError, match="power"):
            invrecon(command("predict", pooled))
    (out / ".parts" / "a" / "0001.h5").unlink()  # as if the first batch had been written in part
    invrecon(command("predict", pooled))
    assert calls(tmp_path) == [2, 2, 2]  # both batches whole, the first for a second time
    invrecon(command("predict", pooled, "--model.num_figures=0", output="undisturbed"))
    assert (read(out / "a.h5") == read(tmp_path / "undisturbed" / "a.h5")).all()
    traces = json.loads((out / "adaptation.json").read_text())
    assert traces["a/0000"]["cases"] == traces["a/0001"]["cases"] == ["a/0000", "a/0001"]
    assert traces["a/0000"] == traces["a/0001"] != traces["a/0002"]
    page = (out / "report.html").read_text()
    assert "shared by 2 slices" in page and "shared by the slices of a batch" in page


@pytest.mark.parametrize("change", ["--data.batch_size=3", "--data.slices=0:3"])
def test_what_shares_an_adapter_decides_numbers_when_pooled(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], change: str
) -> None:
    invrecon(command("predict", "--data.slices=0:2", "--model.pool=true", "--model.num_figures=0"))
    with pytest.raises(InputError, match="holds results of another run"):
        invrecon(command("predict", "--data.slices=0:2", "--model.pool=true", "--model.num_figures=0", change))


def test_batches_do_not_depend_on_what_is_done_when_pooled(library: Path) -> None:
    data = ReconstructionData(str(library / "scans" / "a.h5"), size=SIZE, batch_size=2)
    data.skip_ids = {"a/0000", "a/0002", "a/0003"}
    assert [batch.id for batch in data.predict_dataloader()] == [["a/0001"]]
    data.whole_batches = True
    assert [batch.id for batch in data.predict_dataloader()] == [["a/0000", "a/0001"]]
    data.skip_ids = {"a/0000", "a/0003"}
    assert len(list(data.predict_dataloader())) == 2


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--model.adaptation=Scd", r"model.adaptation is 'Scd', expected one of .*ExpectationMaximisation.*SCD"),
        (
            "--model.adaptation={class_path: ExpectationMaximisation, init_args: {trainable: Lora}}",
            r"adaptation.trainable is 'Lora', expected one of AllWeights, .*LoRA",
        ),
        (
            "--model.method=FBP",
            r"model.method is 'FBP', expected one of (?!.* FBP,|.* REDDiff,).*PaDIS, .*ProximalDiffusion, Sampler",
        ),
    ],
)
def test_a_wrong_name_is_answered_by_the_choices(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], option: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        invrecon(command("predict", option))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["SCD", "DDIP", "ExpectationMaximisation"])
def test_adaptations_go_by_their_names(
    invrecon: Callable[..., Any], command: Callable[..., list[str]], name: str, tmp_path: Path
) -> None:
    adaptation = {"class_path": name}
    if name == "ExpectationMaximisation":
        adaptation["init_args"] = {"rounds": 1, "steps": 1, "held_out": {"class_path": "HeldOutViews"}}
    levels = "--model.method.num_levels=4"  # DDIP leaves out the first and the last
    options = (f"--model.adaptation={json.dumps(adaptation)}", "--data.slices=0", levels)
    model = invrecon(command("predict", *options)).model
    assert type(model.adaptation).__name__ == name
    with Image.open(tmp_path / "out" / "figures" / "a_0000_adaptation.png") as image:
        image.verify()
    section = (tmp_path / "out" / "report.html").read_text().split("<h2>Adaptation</h2>")[1]
    caption = section.split("<figcaption>")[1].split("</figcaption>")[0]
    assert caption.startswith("a, slice 0: ") and not re.search(r"\bnan\b|\binf\b", caption)
