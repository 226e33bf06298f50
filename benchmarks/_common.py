"""What the benchmarks share: data, settings, the machine's name, interleaved timing, a record that is continued."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks._machine import choose_device, describe_machine, machine, synchronize
from benchmarks._record import Record, Row
from invrecon import operators
from invrecon.adapt import Adaptation, SuitabilityTest
from invrecon.data.cases import CaseBatch
from invrecon.data.reconstruction import ReconstructionData
from invrecon.errors import InputError
from invrecon.files import sha256
from invrecon.methods import Method
from invrecon.metrics.image import psnr
from invrecon.metrics.summary import format_entry, heading, summarise
from invrecon.operators import (
    LinearOperator,
    NoiseModel,
    NoNoise,
    ParallelBeamCT,
    RelativeGaussianNoise,
    TransmissionPoisson,
)
from invrecon.precision import resolve_precision
from invrecon.priors import layouts
from invrecon.priors.layouts import Layout
from invrecon.report.provenance import fingerprint
from invrecon.shared import find_shared
from invrecon.tasks.adaptation import TestTimeAdaptation
from invrecon.tasks.reconstruction import Reconstruction, Result

HELD_OUT = "ct/heldout/4DLung-113_HM10395.h5"
NATIVE = "ct/heldout/4DLung-113_native512_7slices.h5"
VALIDATION = "ct/train/Lung_Dx-A0002.h5"  # kept out of training: knobs are tuned on it, never on the held-out patient
TEST_SLICES, FEW_SLICES = "10:90:5", "10,35,60,85"
# The native file states no voxel size; the same patient's volume at half the resolution states 1.9532 mm pixels,
# so a field of 500 mm.
NATIVE_VOXEL_MM = (3.0, 0.9766, 0.9766)
METRICS = ("psnr", "ssim", "psnr_body", "relative_residual")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        name: Key of its rows.
        title: Its name in tables.
        num_views: Of parallel-beam CT; ignored by other physics.
        noise: Of the measurement.
        native: Whether it is simulated on the scanner's grid and reconstructed on half.
        physics: Another operator, by the name of its class (`class`) and its arguments but the size.
    """

    name: str
    title: str
    num_views: int
    noise: NoiseModel
    native: bool = False
    physics: Mapping[str, Any] | None = None


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("20-clean", "20 views", 20, NoNoise()),
        Setting("60-clean", "60 views", 60, NoNoise()),
        Setting("20-noisy", "20 views, 1 % noise", 20, RelativeGaussianNoise(0.01)),
        Setting("60-noisy", "60 views, 1 % noise", 60, RelativeGaussianNoise(0.01)),
        Setting("20-native", "20 views, no inverse crime, photon noise", 20, TransmissionPoisson(1e5), True),
        Setting("60-native", "60 views, no inverse crime, photon noise", 60, TransmissionPoisson(1e5), True),
    )
}


def data_folder() -> Path:
    """Returns the folder of the benchmark data."""
    return Path(os.environ.get("INVRECON_DATA", "../shared/data"))


def without_folder(error: InputError) -> str:
    """Returns a message without the folder of the data, which is this machine's own."""
    return str(error).replace(f"{data_folder()}/", "").replace(f"in '{data_folder()}'", "in the folder of the data")


def data_file(name: str) -> Path:
    """Returns a file of the benchmark data.

    Raises:
        InputError: The folder is not there, or lacks the file.
    """
    folder = data_folder()
    if not (folder / name).is_file():
        raise InputError(f"The benchmark data '{name}' is not in '{folder}': name its folder by INVRECON_DATA.")
    return folder / name


@cache
def load_batches(name: str, slices: str | None, size: int, batch_size: int) -> list[CaseBatch]:
    """Reads the chosen slices of a file of the benchmark data, in batches."""
    data = ReconstructionData(str(data_file(name)), slices=slices, size=size, batch_size=batch_size)
    batches = list(data.test_dataloader())
    if name == NATIVE:
        stated = [[voxel or NATIVE_VOXEL_MM for voxel in batch.voxel_mm] for batch in batches]
        batches = [replace(batch, voxel_mm=voxel) for batch, voxel in zip(batches, stated, strict=True)]
    return batches


def plain(value: Any) -> Any:
    """Returns the public attributes of an object as nested dictionaries: all that decides what a method does.

    Constants of its class are not among them: after a change of one, compute again (`--redo`).
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__dict__"):
        return {"class": type(value).__name__, **{k: plain(v) for k, v in vars(value).items() if k[0] != "_"}}
    return value


file_hash = cache(sha256)


@dataclass(frozen=True)
class Entry:
    """Who competes: a method, with what it needs.

    Attributes:
        label: Name of its rows.
        method: What reconstructs.
        prior: A prior file, or the name of a shipped one; ignored by methods that need none.
        adaptation: What adapts the prior; None for nothing.
        suitability: What decides whether to adapt; None always adapts.
        layout: How patches cover an image, as of `make_layout`; None for the prior's own.
        weights: What stands for the weights in fingerprints; None for the hash of their file.
        mirror: Whether evaluations are of the image or of its mirror image, at random; ignored where the prior adapts.
        pool: Whether the slices of a batch share what adapts.
    """

    label: str
    method: Method
    prior: str | None = None
    adaptation: Adaptation | None = None
    suitability: SuitabilityTest | None = None
    layout: Mapping[str, Any] | None = None
    weights: str | None = None
    mirror: bool = False
    pool: bool = False


@dataclass
class Bench:
    """Runs methods on settings, on the device of its record, and keeps their rows.

    Attributes:
        reconstruction: The task, where nothing adapts.
        record: Where rows are kept.
        size: Side of the reconstructed images; the detector has twice as many bins, as PaDIS has it.
        precision: Of the priors' networks; `auto` is what a row of this device has.
        seed: Of noise and sampling.
    """

    reconstruction: ClassVar[type[Reconstruction]] = Reconstruction

    record: Record
    size: int = 256
    precision: str = "auto"
    seed: int = 0

    def operator(self, setting: Setting) -> LinearOperator:
        """Returns the PaDIS parallel geometry, or the setting's own physics."""
        if setting.physics is None:
            return ParallelBeamCT(self.size, setting.num_views, num_bins=2 * self.size)
        arguments = {key: value for key, value in setting.physics.items() if key != "class"}
        kind = getattr(operators, setting.physics["class"])
        bins = {"num_bins": 2 * self.size} if issubclass(kind, operators.CT) else {}
        return kind(self.size, **bins, **arguments)

    def task(self, setting: Setting, entry: Entry, precision: str | None = None) -> Reconstruction:
        """Returns the task that measures and reconstructs; matrix and norm are made here, outside of any timing."""
        operator = self.operator(setting).to(self.record.device)
        operator.norm()
        prior = entry.prior if entry.method.needs_prior else None
        shared = (setting.noise, prior, precision or self.precision, self.seed)
        if entry.adaptation is None:
            way = {"layout": make_layout(entry.layout), "mirror": entry.mirror}
            task = self.reconstruction(operator, entry.method, *shared, **way)
        else:
            way = {"suitability": entry.suitability, "pool": entry.pool}
            task = TestTimeAdaptation(operator, entry.method, entry.adaptation, *shared, **way)
        return task.to(self.record.device)

    def reconstruct(self, setting: Setting, entry: Entry, batch: CaseBatch) -> Result:
        """Returns the result of a batch, which may be on any device; its tensors are on the record's."""
        return self.task(setting, entry).reconstruct(batch.to(self.record.device))

    def identity(
        self,
        setting: Setting,
        method: Method,
        prior: str | None,
        source: str,
        weights: str | None = None,
        **more: Any,
    ) -> str:
        """Returns the fingerprint of all that decides a row but the machine and what it rounds to.

        An image hardly depends on these. Times do: a row says where it was measured, and ratios of times are taken
        within a machine alone.
        """
        settings = {
            "geometry": setting.physics or self.operator(setting).geometry,
            "size": self.size,
            "noise": plain(setting.noise),
            "method": plain(method),
            "seed": self.seed,
            **more,
        }
        own = weights or weights_hash(prior) if method.needs_prior else None
        return fingerprint(settings, own, [file_hash(source)])

    def locate(self, setting: Setting, entry: Entry, batch: CaseBatch) -> tuple[list[str], str]:
        """Returns the names of a batch's rows in the record, and their fingerprint."""
        adapts = {"adaptation": plain(entry.adaptation), "suitability": plain(entry.suitability)}
        more = {} if entry.adaptation is None else adapts
        more |= {} if entry.layout is None else {"layout": dict(entry.layout)}
        more |= {"mirror": True} if entry.mirror else {}  # unsaid otherwise: rows of before have no such key
        more |= {"pool": list(batch.index)} if entry.pool else {}
        more |= {"weights": entry.weights, "batch_size": len(batch)}
        identity = self.identity(setting, entry.method, entry.prior, batch.source[0], **more)
        return [f"{setting.name}/{entry.label}/{case}" for case in batch.id], identity

    def find(self, setting: Setting, entry: Entry, batch: CaseBatch) -> list[Row] | None:
        """Returns a row a slice if the record has all of them."""
        keys, identity = self.locate(setting, entry, batch)
        found = [row for key in keys if (row := self.record.find(key, identity)) is not None]
        return found if len(found) == len(keys) else None

    @torch.no_grad()
    def rows(self, setting: Setting, entry: Entry, batch: CaseBatch) -> list[Row]:
        """Returns a row a slice, from the record or by reconstructing the batch."""
        found = self.find(setting, entry, batch)
        if found is not None:
            return found
        result = self.reconstruct(setting, entry, batch)
        stats, device = result.estimate.stats, self.record.device
        solver = {k: v for k in ("num_iterations", "relative_gap") if isinstance(v := stats.get(k), list)}
        rows = [
            {
                **row,
                "setting": setting.name,
                "method": entry.label,
                "machine": describe_machine(self.record.machine),
                **({"precision": resolve_precision(self.precision, device)} if entry.method.needs_prior else {}),
                **{name: values[b] for name, values in solver.items()},
            }
            for b, row in enumerate(result.rows)
        ]
        rows = [row | trace for row, trace in zip(rows, trace_columns(result), strict=True)]
        keys, identity = self.locate(setting, entry, batch)
        self.record.add(dict(zip(keys, rows, strict=True)), identity)
        mean, seconds = statistics.fmean(row["psnr"] for row in rows), rows[0]["seconds"]
        indices = ", ".join(map(str, batch.index))
        progress(f"{setting.title}, {entry.label}, slices {indices}: {mean:.2f} dB, {seconds:.2f} s a slice")
        return rows


def make_layout(layout: Mapping[str, Any] | None) -> Layout | None:
    """Returns a patch layout: `class` names one of `invrecon.priors.layouts`, the rest are its arguments."""
    if layout is None:
        return None
    return getattr(layouts, layout["class"])(**{key: value for key, value in layout.items() if key != "class"})


def trace_columns(result: Result) -> list[Row]:
    """Returns how good each case's adaptation was at each step: PSNR of its estimates and loss on held-out views.

    Of cases that share an adapter, one alone was watched. Of complex images, nothing.
    """
    if result.reference is not None and result.reference.shape[1] == 2:
        return [{} for _ in result.rows]
    if result.traces is None or not any(step.image is not None for trace in result.traces for step in trace.steps):
        return [{} for _ in result.rows]
    assert result.reference is not None
    reference = result.reference.cpu()
    return [
        {}
        if trace.watched not in (None, b)
        else {
            "psnr_trace": [
                None if step.image is None else psnr(step.image[None].cpu(), reference[b : b + 1]).item()
                for step in trace.steps
            ],
            "held_out_trace": [step.held_out_loss for step in trace.steps],
            "stopped_step": trace.stopped_at,
            "reason": trace.reason,
        }
        for b, trace in enumerate(result.traces)
    ]


def has_weights(prior: str) -> bool:
    """Says whether there is a prior file, or a shipped one of that name."""
    return find_shared(prior, "checkpoints", ".safetensors").is_file()


@cache
def weights_hash(prior: str | None) -> str:
    """Returns the hash of a prior file, found as the command line finds it.

    Raises:
        InputError: There is none.
    """
    path = find_shared(prior or "", "checkpoints", ".safetensors")
    if prior is None or not path.is_file():
        raise InputError(
            f"There is no prior '{prior}': train it, or name a prior file by --prior, --whole or --priors."
        )
    return file_hash(path)


def interleave(runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Times contestants in turn, so that a busy machine slows all of them alike; returns seconds, one a repeat."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_seconds(rows: Iterable[Row]) -> float:
    """Returns the median time a slice, on the machine that most of the rows were measured on."""
    by_machine: dict[str | None, list[float]] = {}
    for row in rows:
        by_machine.setdefault(row.get("machine"), []).append(row["seconds"])
    return statistics.median(max(by_machine.values(), key=len))


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table, numbers to the right of its first column."""
    table = [list(header), ["---", *["---:"] * (len(header) - 1)], *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def metric_cells(rows: Sequence[Row]) -> list[str]:
    """Returns the cells of `METRICS` (mean and interval) and the median time a slice."""
    summary = summarise(rows, METRICS)
    return [*(format_entry(name, summary[name]) for name in METRICS), f"{median_seconds(rows):.2f}"]


METRIC_HEADINGS = [*(heading(name) for name in METRICS), "s a slice, median"]


def difference_cell(entry: Mapping[str, Any], unit: str = "dB") -> str:
    """Returns a paired difference with its interval."""
    interval = "" if entry["low"] is None else f" [{entry['low']:+.2f}, {entry['high']:+.2f}]"
    return f"{entry['mean']:+.2f}{interval} {unit}"


def progress(text: str) -> None:
    """Prints a line at once."""
    print(f"  {text}", flush=True)


def make_parser(doc: str | None, device: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have; `device` of those that can use a GPU."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; a file of an earlier run is continued")
    parser.add_argument("--threads", type=int, default=2)
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="auto: a GPU if any")
    return parser


def make_quality_parser(doc: str | None, slices: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of benchmarks that reconstruct."""
    parser = make_parser(doc)
    parser.add_argument("--prior", default="patch_ct_fine", help="patch prior: a file, or the name of a shipped one")
    parser.add_argument("--slices", default=slices, help=f"slices, as of `invrecon test` (default {slices})")
    parser.add_argument("--size", type=int, default=256, help="side of the reconstructed images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    return parser


def start(arguments: argparse.Namespace, benchmark: str) -> Record:
    """Sets the threads, prints the machine and opens the record, with what `--merge` names."""
    facts = machine(arguments.threads, choose_device(getattr(arguments, "device", "cpu")))
    print(describe_machine(facts), flush=True)
    record = Record(arguments.json, benchmark, facts, getattr(arguments, "redo", False))
    record.merge(getattr(arguments, "merge", ()))
    return record


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark; what the user can mend is one sentence and status 1."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(1)
