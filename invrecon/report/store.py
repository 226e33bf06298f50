"""Results on disk while a run goes on: one small file a slice from any rank, one volume a case at the end.

    <output>/.parts/<case>/<index>.h5    written by whichever rank reconstructed the slice
    <output>/<case>.h5                   assembled slice by slice by one process: memory does not grow with N

Either appears whole or not at all and carries the run's fingerprint. A rerun skips what is complete and
refuses a folder of another run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from invrecon.errors import InputError
from invrecon.files import TEMPORARY_SUFFIX, atomic_h5, to_json, write_csv, write_json
from invrecon.metrics.summary import summarise, summarise_by
from invrecon.report.volume import (
    VOLUME_DATASETS,
    has_mean,
    open_volume,
    read_attributes,
    squeeze_channel,
    voxel_of,
    write_volume,
)

if TYPE_CHECKING:
    import h5py

ADAPTATION = "adaptation.json"
TRACE = "trace"
STACKS = ("samples", "samples_phase", "steps")  # several images of a slice

ROW_FIELDS = (
    *("case", "slice", "patient", "method", "psnr", "ssim", "psnr_body", "relative_residual"),
    *("num_evaluations", "num_operator_calls", "seconds", "peak_memory_mb", "seed"),
)


@dataclass
class Part:
    """What is stored of one slice.

    Attributes:
        id: `'<case>/<index:04d>'`.
        arrays: By name: `mean`, `std`, `reference`, `baseline` `(H, W)`, `samples` `(S, H, W)`, ... in
        `units`.
        row: Its line of `metrics.csv`.
        voxel_mm: Voxel size (z, y, x) in [mm].
        source: The input file.
        trace: How the prior was adapted (`adaptation.encode_trace`); empty if it was not.
    """

    id: str
    arrays: dict[str, np.ndarray]
    row: dict[str, Any] = field(default_factory=dict)
    voxel_mm: tuple[float, float, float] | None = None
    source: str = ""
    trace: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> str:
        """The case, i.e. the stem of its file."""
        return self.id.rsplit("/", 1)[0]

    @property
    def index(self) -> int:
        """The slice's index within its file."""
        return int(self.id.rsplit("/", 1)[1])


class PredictionStore:
    """Keeps a run's slices safe while it goes on, and makes volumes of them when it ends.

    Every rank calls `save`; after a barrier one process calls `assemble`. `completed` is asked before
    anything is reconstructed, by every rank, with a barrier before the first `save`.

    Args:
        output_dir: The folder that holds all that the run writes.
        units: Of the stored images.
        provenance: Written into every volume as JSON: see `provenance.provenance`.
        inputs: Case -> identity of its input file (`provenance.file_identity`), kept with its results. Results of other
            cases are let be, so that files can be added.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        units: str = "HU",
        provenance: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.parts_dir = self.output_dir / ".parts"
        self.units = units
        self.provenance = dict(provenance or {})
        self.inputs = dict(inputs or {})

    def completed(self, fingerprint: str) -> set[str]:
        """Returns the ids of slices that need not be reconstructed again, from parts and volumes.

        Args:
            fingerprint: Identity of this run's settings and weights: see `provenance.fingerprint`.

        Raises:
            InputError: The folder holds results of another run or of a file that has changed since, or a volume that
                cannot be read.
        """
        ids = set()
        for path in self._part_paths():
            try:
                found = read_attributes(path, "fingerprint", "input")
            except (OSError, KeyError):  # a damaged part is simply computed again: see `remove_damaged`
                continue
            self._check(path, path.parent.name, found, fingerprint)
            ids.add(_id_of(path))
        for path in self._volume_paths():
            with open_volume(path) as file:
                found = [str(file.attrs.get(name, "")) for name in ("fingerprint", "input")]
                self._check(path, path.stem, found, fingerprint)
                ids.update(f"{path.stem}/{index:04d}" for index in file["slices"][:].tolist())
        return ids

    def remove_damaged(self) -> None:
        """Removes parts that cannot be opened, asked for or not; one process, once all have asked `completed`."""
        for path in self._part_paths():
            try:
                read_attributes(path, "fingerprint", "input", "row")
            except (OSError, KeyError):
                path.unlink(missing_ok=True)

    def save(
        self,
        case_id: str,
        fingerprint: str,
        arrays: Mapping[str, Tensor | np.ndarray | None],
        row: Mapping[str, Any] | None = None,
        *,
        voxel_mm: Sequence[float] | None = None,
        source: str = "",
        trace: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes one slice's part, atomically.

        Args:
            case_id: `'<case>/<index:04d>'`.
            fingerprint: As given to `completed`.
            arrays: Images in the store's units, `(H, W)` or `(1, H, W)`; `samples` as `(S, H, W)` or `(S, 1,
            H, W)`.
                `mean`, `std` and `samples` go into the volume, anything else (`reference`, `baseline`,
                `residual`, ...) is kept for figures until `assemble`. None is skipped.
            row: The slice's line of `metrics.csv`.
            voxel_mm: Voxel size (z, y, x) in [mm].
            source: The input file.
            trace: How the prior was adapted; the estimates on the way are among the arrays, as `steps` `(K, H, W)` or
                `(K, 1, H, W)`.

        Raises:
            InputError: The disk is full or the folder cannot be written to.
        """
        path = self._part_path(case_id)
        with atomic_h5(path) as file:
            for name, value in arrays.items():
                if value is not None:
                    file.create_dataset(name, data=squeeze_channel(value, keep_first=name in STACKS))
            file.attrs["fingerprint"] = fingerprint
            file.attrs["input"] = self.inputs.get(path.parent.name, "")
            file.attrs["row"] = to_json(row or {})
            file.attrs["source"] = str(source)
            if trace is not None:
                file[TRACE] = to_json(trace)  # a dataset: an attribute is limited to 64 kB
            if voxel_mm is not None:
                file.attrs["voxel_mm"] = np.asarray(voxel_mm, dtype=np.float64)
        return path

    def read(self, case_id: str) -> Part:
        """Reads one slice back, from its part if it is still there, else from its volume.

        Raises:
            InputError: There is no such slice.
        """
        import h5py

        path = self._part_path(case_id)
        if path.exists():
            with h5py.File(path, "r") as file:
                arrays = {name: file[name][()] for name in file if name != TRACE}
                row, source = json.loads(file.attrs["row"]), str(file.attrs["source"])
                return Part(case_id, arrays, row, voxel_of(file), source, _trace_of(file))
        case, index = case_id.rsplit("/", 1)
        volume = self._volume_path(case)
        if volume.exists():
            with open_volume(volume) as file:
                positions = np.nonzero(file["slices"][:] == int(index))[0]
                if len(positions):
                    n = int(positions[0])
                    arrays = {name: file[name][n] for name in VOLUME_DATASETS if name in file}
                    row = json.loads(file["rows"].asstr()[n])
                    return Part(case_id, arrays, row, voxel_of(file), str(file.attrs["source"]))
        raise InputError(f"{self.output_dir} holds no result for '{case_id}': run predict first.")

    def volume_ids(self) -> set[str]:
        """Ids of the slices that are in volumes, of which no more than that is kept."""
        found = set[str]()
        for path in self._volume_paths():
            with open_volume(path) as file:
                found.update(f"{path.stem}/{index:04d}" for index in file["slices"][:].tolist())
        return found

    def is_older_than(self, page: Path) -> bool:
        """Whether all that is stored was there when `page` was written."""
        if not page.exists() or next(self._part_paths(), None) is not None:
            return False
        return all(path.stat().st_mtime_ns <= page.stat().st_mtime_ns for path in self._volume_paths())

    def ids(self) -> list[str]:
        """Ids of all stored slices, sorted."""
        return sorted(self.volume_ids() | {_id_of(path) for path in self._part_paths()}, key=_order)

    def rows(self) -> list[dict[str, Any]]:
        """The lines of `metrics.csv`, sorted by case and slice, whatever rank or run wrote them."""
        import h5py

        rows: dict[str, dict[str, Any]] = {}
        for path in self._volume_paths():
            with open_volume(path) as file:
                texts = file["rows"].asstr()[:]
                for index, text in zip(file["slices"][:].tolist(), texts, strict=True):
                    rows[f"{path.stem}/{index:04d}"] = json.loads(text)
        for path in self._part_paths():
            with h5py.File(path, "r") as file:
                rows[_id_of(path)] = json.loads(file.attrs["row"])
        return [rows[key] for key in sorted(rows, key=_order) if rows[key]]

    def traces(self) -> dict[str, dict[str, Any]]:
        """How the prior was adapted, by id: of the parts and, for slices in a volume, as `adaptation.json` has it."""
        import h5py

        ids, found = self.ids(), {}
        path = self.output_dir / ADAPTATION
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path} is damaged: remove it and run the same command again.") from error
        for part in self._part_paths():
            with h5py.File(part, "r") as file:
                found[_id_of(part)] = _trace_of(file)
        return {name: found[name] for name in ids if found.get(name)}

    def assemble(self) -> list[Path]:
        """Makes one volume a case of its parts, one slice in memory at a time, and removes the parts.

        A volume that is there already is kept and extended. Each volume replaces its predecessor atomically
        and only then its parts go, so a kill at any point loses nothing. Parts without a `mean` (of a `test`)
        stay.

        Returns:
            The volumes that were written.

        Raises:
            InputError: The disk is full, or slices of one case disagree in shape or source.
        """
        written = []
        for folder in sorted(self.parts_dir.glob("*/")):
            parts = {int(path.stem): path for path in sorted(folder.glob("[0-9]*.h5"))}
            first = next(iter(parts.values()), None)
            if first is None or not has_mean(first):
                continue
            path = self._volume_path(folder.name)
            write_volume(path, parts, self.units, self.provenance)
            written.append(path)
            shutil.rmtree(folder)
        if written:
            _remove_if_empty(self.parts_dir)
        return written

    def clear(self) -> None:
        """Removes all parts; volumes, tables and figures stay."""
        shutil.rmtree(self.parts_dir, ignore_errors=True)

    def _check(self, path: Path, case: str, found: Sequence[str], expected: str) -> None:
        run, identity = found
        if run != expected:
            raise InputError(
                f"{self.output_dir} holds results of another run: {path.name} was made with other settings or "
                f"weights (fingerprint {run[:12]}, expected {expected[:12]}). Choose another --output, or remove that "
                "folder."
            )
        if identity != self.inputs.get(case, identity):
            raise InputError(
                f"{path} was made from another version of its input file, which was of another size or is newer now: "
                "choose another --output, or remove that result."
            )

    def _part_path(self, case_id: str) -> Path:
        case, index = case_id.rsplit("/", 1)
        return self.parts_dir / _safe(case) / f"{int(index):04d}.h5"

    def _volume_path(self, case: str) -> Path:
        return self.output_dir / f"{_safe(case)}.h5"

    def _part_paths(self) -> Iterator[Path]:
        return iter(sorted(self.parts_dir.glob("*/[0-9]*.h5")))

    def _volume_paths(self) -> Iterator[Path]:
        return iter(sorted(path for path in self.output_dir.glob("*.h5") if path.is_file()))


def write_metrics(
    output_dir: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """Writes `metrics.csv` (a row a slice) and `summary.json`, and returns the latter's content.

    Of samples that answer no measurement, columns that no row has a value for are left out, such as PSNR.

    Args:
        output_dir: Where.
        rows: As of `PredictionStore.rows`. With one method the summary is that of `metrics.summarise`, so
        that
            `psnr.mean` is `summary["psnr"]["mean"]`; with several it maps each method to its own.
        seed: Of the bootstrap.

    Raises:
        InputError: The disk is full or the folder cannot be written to.
    """
    named = summarise_by(rows, "method", seed=seed)
    summary = next(iter(named.values())) if len(named) == 1 else (named or summarise([]))
    generated = bool(rows) and all(row.get("measurement") == "none" for row in rows)
    fields = [name for name in ROW_FIELDS if not generated or any(row.get(name) is not None for row in rows)]
    write_csv(Path(output_dir) / "metrics.csv", rows, fields)
    write_json(Path(output_dir) / "summary.json", summary)
    return summary


def write_traces(output_dir: str | os.PathLike[str], traces: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `adaptation.json`, by id; nothing where nothing was adapted.

    Raises:
        InputError: The disk is full or the folder cannot be written to.
    """
    if traces:
        without = {name: {k: v for k, v in trace.items() if k != "shown"} for name, trace in traces.items()}
        write_json(Path(output_dir) / ADAPTATION, without)


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Removes temporary files that a kill left behind; call from one process before any rank writes."""
    root = Path(output_dir)
    for pattern in (
        f".*{TEMPORARY_SUFFIX}",
        f".parts/*/.*{TEMPORARY_SUFFIX}",
        f"figures/.*{TEMPORARY_SUFFIX}",
    ):
        for path in root.glob(pattern):
            path.unlink(missing_ok=True)


def _safe(case: str) -> str:
    """The case's name, which has to be one path component: it becomes a file inside the output folder."""
    if "/" in case or "\0" in case or case in ("", ".", ".."):
        raise InputError(f"A case's name becomes a file name, got '{case}': rename its file.")
    return case


def _trace_of(file: h5py.File) -> dict[str, Any]:
    return json.loads(file[TRACE].asstr()[()]) if TRACE in file else {}


def _id_of(path: Path) -> str:
    return f"{path.parent.name}/{int(path.stem):04d}"


def _order(case_id: str) -> tuple[str, int]:
    case, index = case_id.rsplit("/", 1)
    return case, int(index)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # parts of a test, or of another case, remain
        folder.rmdir()
