"""Keeps what `test` and `predict` give: volumes, tables, figures and a page, whatever rank made them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from invrecon.data.intensity import MAGNITUDE, Intensity
from invrecon.data.reconstruction import case_id
from invrecon.data.volume import file_stem
from invrecon.errors import InputError
from invrecon.files import atomic_write, read_csv, write_csv, write_json
from invrecon.metrics.summary import ADAPTATION_METRICS, METRICS, format_table, summarise
from invrecon.report.adaptation import adaptation_figure, describe_trace, encode_trace, is_fit, step_images
from invrecon.report.complex import as_magnitudes, case_intensity, is_complex, stored_maps, view, volume_rows
from invrecon.report.provenance import file_identity, fingerprint, provenance
from invrecon.report.store import ADAPTATION, Part, PredictionStore, remove_leftovers, write_metrics, write_traces

# What changes no number of a result, and so must not keep a run from being continued.
NEUTRAL = {
    "model": {"num_figures"},
    "data": {"paths", "slices", "batch_size", "num_workers"},
}
VOLUME_METRICS = ("nmse", "psnr", "ssim", "nmse_stored", "psnr_stored", "ssim_stored")
# What decides numbers after all where the cases of a batch share what is learned from them.
POOLED = {"slices", "batch_size"}


class ResultWriter(lightning.Callback):
    """Writes each slice as soon as it is reconstructed, and at the end what is made of all of them.

    Every rank writes its own slices; rank zero then writes `metrics.csv`, `summary.json` and, for `predict`, one
    HDF5 volume a case, figures and `report.html`. A slice that is there already from the same run is not
    reconstructed again.

    Args:
        output: Folder of the run; that of rank zero counts.
        config: The resolved configuration, as nested dictionaries.
        config_text: The same, as YAML.
        command: The command line.
    """

    def __init__(self, output: Path, config: Mapping[str, Any], config_text: str, command: list[str]) -> None:
        self.output, self.config, self.config_text, self.command = output, config, config_text, command
        self.store: PredictionStore
        self.fingerprint = ""
        self.drawn: set[str] = set()
        self.ranks: dist.ProcessGroup | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Agrees on the folder, refuses one of another run, and tells the data module what is done."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.output = Path(trainer.strategy.broadcast(str(self.output)))
        origin = provenance(
            self.config,
            weights_sha256=pl_module.weights_sha256,
            prior=pl_module.prior_name,
            seed=pl_module.seed,
            command=self.command,
        )
        index = data.case_index()
        inputs = {file_stem(path): file_identity(path) for path, _ in index if Path(path).exists()}
        self.store = PredictionStore(self.output, data.intensity.units, origin, inputs)
        self.fingerprint = fingerprint(self._settings(stage, pl_module.pool), pl_module.weights_sha256)
        self.ranks = patient_group()
        done = self.store.completed(self.fingerprint)
        kept = self.store.volume_ids() if stage == "predict" else set()
        trainer.strategy.barrier("completed")  # nobody writes before everybody has looked
        if stage == "predict":
            if trainer.is_global_zero:
                self.store.remove_damaged()
            data.skip_ids, data.whole_batches = done, pl_module.pool
            ids = data.case_ids()
            if (num := len(done.intersection(ids))) and trainer.is_global_zero:
                rest = "going on with the rest" if num < len(ids) else "nothing is left to do"
                print(f"{num} of {len(ids)} slices are complete in {self.output}; {rest}.")
        for path, indices in index:
            names = [case_id(path, index) for index in indices]
            # of a slice that is in a volume, reference and direct inverse are gone: its figure is there, or never
            names = [name for name in names if name not in kept or self._figure(name).exists()]
            num = min(pl_module.num_figures, len(names))
            self.drawn |= {names[(2 * k + 1) * len(names) // (2 * num)] for k in range(num)}

    def _settings(self, stage: str, pool: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"command": stage}
        for key, names in NEUTRAL.items():
            neutral = names - POOLED if pool else names
            section = dict(self.config.get(key) or {})
            arguments = {k: v for k, v in (section.get("init_args") or {}).items() if k not in neutral}
            settings[key] = {"class_path": section.get("class_path"), "init_args": arguments}
        return settings

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Begins anew: what a test that was ended has left says nothing of this one."""
        if trainer.is_global_zero:
            self.store.clear()
            for name in (ADAPTATION, "volumes.csv"):
                (self.output / name).unlink(missing_ok=True)
        self.on_predict_start(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Begins to write, now that everything has been checked."""
        end_at_once(trainer)
        if trainer.is_global_zero:
            remove_leftovers(self.output)
            with atomic_write(self.output / "config.yaml") as file:
                file.write(self.config_text.encode())
        trainer.strategy.barrier("cleaned")

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *unused: Any) -> None:
        """Keeps the metrics of a batch."""
        for b, name in enumerate(outputs.batch.id):
            trace = self._trace(outputs, b, pl_module)
            source = outputs.batch.source[b]
            arrays: dict[str, Tensor | None] = {}
            if is_complex(outputs.estimate.mean):  # for the metrics of whole volumes
                decode = case_intensity(trainer.datamodule.intensity, _scale(outputs.batch, b)).decode
                arrays = {"mean": decode(outputs.estimate.mean[b]), "reference": decode(outputs.reference[b])}
                arrays = as_magnitudes(arrays)
            self.store.save(name, self.fingerprint, arrays, outputs.rows[b], source=source, trace=trace)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *unused: Any) -> None:
        """Keeps the images and metrics of a batch."""
        estimate, batch = outputs.estimate, outputs.batch
        complex_images = is_complex(estimate.mean)
        for b, name in enumerate(batch.id):
            intensity = case_intensity(trainer.datamodule.intensity, _scale(batch, b))
            decode = intensity.decode
            arrays: dict[str, Tensor | None] = {"mean": decode(estimate.mean[b])}
            if estimate.std is not None:
                arrays["std"] = intensity.scale * estimate.std[b]
            if estimate.samples is not None and pl_module.save_samples:
                arrays["samples"] = decode(estimate.samples[b])
            if name in self.drawn and outputs.baseline is not None:
                baseline = outputs.baseline[b] if complex_images else outputs.baseline[b].clamp(0, 1)
                arrays["baseline"] = decode(baseline)
            if (name in self.drawn or complex_images) and outputs.reference is not None:
                arrays["reference"] = decode(outputs.reference[b])
            trace = self._trace(outputs, b, pl_module, with_images=name in self.drawn)
            if trace is not None and trace["shown"]:
                steps = step_images(outputs.traces[b], trace["shown"])
                theirs = case_intensity(trainer.datamodule.intensity, trace["scale"])
                arrays["steps"] = theirs.decode(steps if complex_images else steps.clamp(0, 1))
            if complex_images:
                arrays = {**as_magnitudes(arrays), "maps": stored_maps(batch, b)}
            voxel = batch.voxel_mm[b] if batch.voxel_mm else None
            if voxel is not None and batch.reference is not None and batch.measurement is None:  # perhaps stored finer
                factor = batch.reference.shape[-1] / estimate.mean.shape[-1]
                voxel = (voxel[0], voxel[1] * factor, voxel[2] * factor)
            row, source = outputs.rows[b], batch.source[b]
            self.store.save(name, self.fingerprint, arrays, row, voxel_mm=voxel, source=source, trace=trace)

    def _trace(self, outputs: Any, b: int, pl_module: Any, with_images: bool = False) -> dict[str, Any] | None:
        """How the prior was adapted to a case of the batch; None if it was not."""
        if outputs.traces is None:
            return None
        trace = outputs.traces[b]
        sharing = outputs.batch.id if pl_module.pool else [outputs.batch.id[b]]
        owner = (trace.watched or 0) if pl_module.pool else b  # whose images the steps hold
        return {**encode_trace(trace, sharing, with_images), "scale": _scale(outputs.batch, owner)}

    def on_test_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Writes and prints the table."""
        wait_for_all(self.ranks)
        if trainer.is_global_zero:
            summary = write_metrics(self.output, self.store.rows())
            write_traces(self.output, self.store.traces())
            volumes = self._write_volumes(trainer, summary)
            self.store.clear()
            print(_table(pl_module.label, summary))
            print(volumes, end="")
            if pl_module.prior_name is not None:
                print(f"Prior: {pl_module.prior_name}")
            print(f"Written to {self.output}: metrics.csv, summary.json.")

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Writes figures, tables, the page and the volumes."""
        wait_for_all(self.ranks)
        if not trainer.is_global_zero:
            return
        rows = self.store.rows()
        if self.store.is_older_than(self.output / "report.html"):
            if has_quality(rows):
                print(_table(pl_module.label, summarise(rows)))
            print(f"Nothing is new in {self.output}: report.html and figures are as they were.")
            return
        summary = write_metrics(self.output, rows)
        ids = [name for name in self.store.ids() if name in self.drawn or self._figure(name).exists()]  # also earlier
        parts = [self.store.read(name) for name in ids]
        for part in parts:
            if not self._figure(part.id).exists():
                self._draw(part, pl_module, trainer.datamodule.intensity)  # type: ignore[attr-defined]
        traces = self.store.traces()
        write_traces(self.output, traces)
        adapted = self._draw_adaptations(parts, traces, pl_module, trainer.datamodule.intensity)  # type: ignore[attr-defined]
        judged = self._write_volumes(trainer, summary)
        volumes = self.store.assemble()
        heading = "Fit" if any(is_fit(trace) for trace in traces.values()) else "Adaptation"
        self._write_page(parts, rows, summary, pl_module, trainer, adapted, heading, judged)
        if has_quality(rows):
            print(_table(pl_module.label, summary))
        print(judged, end="")
        names = ", ".join(path.name for path in volumes) or "no new volume"
        print(f"Written to {self.output}: {names}; report.html, metrics.csv, summary.json and figures.")

    def _write_volumes(self, trainer: Any, summary: dict[str, Any]) -> str:
        """Writes `volumes.csv`, and into `summary.json` their means, for complex images with references.

        Returns:
            Lines of it; empty where there is nothing to say.
        """
        path = self.output / "volumes.csv"
        if trainer.datamodule.intensity.units != MAGNITUDE.units:
            return ""
        earlier = {str(row["case"]): row for row in read_csv(path)}
        rows = volume_rows(self.store, earlier)
        lost, left_out = "", sorted(earlier.keys() - {row["case"] for row in rows})
        if left_out:
            lost = (
                f"volumes.csv leaves out {', '.join(left_out)}: of its slices that were there before no reference is "
                "kept. For metrics of the volume reconstruct all slices in one run, in another --output.\n"
            )
        if not rows:
            path.unlink(missing_ok=True)
            return lost
        names = [name for name in VOLUME_METRICS if all(name in row for row in rows)]
        write_csv(path, rows)
        means = {name: fmean(float(row[name]) for row in rows) for name in names}
        write_json(self.output / "summary.json", {**summary, "volumes": {**means, "num_volumes": len(rows)}})
        num = sum(int(row["num_slices"]) for row in rows)
        what = f"{len(rows)} volume{'s' * (len(rows) != 1)} of {num} slice{'s' * (num != 1)}, by fastMRI's formulas"
        lines = [f"{what}: " + _volume_line(means, "")]
        if "nmse_stored" in means:
            lines.append("against the root sums of squares that the files state: " + _volume_line(means, "_stored"))
        return "\n".join(lines) + "\n" + lost

    def _figure(self, name: str, what: str = "") -> Path:
        case, index = name.rsplit("/", 1)
        return self.output / "figures" / f"{case}_{index}{what}.png"

    def _draw(self, part: Part, pl_module: Any, intensity: Intensity) -> None:
        from invrecon.report.figures import case_figure

        images = {"Direct inverse": part.arrays["baseline"]} if "baseline" in part.arrays else {}
        windows, scale = view(part, intensity)
        case_figure(
            self._figure(part.id),
            {**images, pl_module.label.rsplit(" + ", 1)[-1]: part.arrays["mean"]},  # the whole would not fit
            reference=part.arrays.get("reference"),
            std=part.arrays.get("std"),
            phase=part.arrays.get("phase"),
            title=f"{part.case}, slice {part.index}",
            subtitle=part.row["measurement"],
            voxel_mm=part.voxel_mm,
            windows=windows,
            intensity=scale,
        )

    def _draw_adaptations(
        self, parts: list[Part], traces: Mapping[str, Mapping[str, Any]], pl_module: Any, intensity: Intensity
    ) -> dict[Path, str]:
        """Draws how the prior was adapted to each of the slices; returns the figures with their captions."""
        captions = {}
        for part in parts:
            if part.id not in traces:
                continue
            trace, path = part.trace or traces[part.id], self._figure(part.id, "_adaptation")
            title = f"{part.case}, slice {part.index}"
            if not path.exists():
                images = part.arrays.get("steps")
                names = {"title": f"{title}: {'fit' if is_fit(trace) else 'adaptation'}", "subtitle": pl_module.label}
                scale = case_intensity(intensity, float(trace.get("scale", part.row.get("scale", 1.0))))
                adaptation_figure(path, trace, images, intensity=scale, **names)
            captions[path] = f"{title}: {describe_trace(trace)}"
        return captions

    def _write_page(
        self,
        parts: list[Part],
        rows: list[dict[str, Any]],
        summary: Any,
        pl_module: Any,
        trainer: Any,
        adapted: Mapping[Path, str],
        heading: str,
        volumes: str,
    ) -> None:
        from invrecon.report.figures import choose_windows, image_png
        from invrecon.report.html import Comparison, Figure, write_report

        comparisons, intensity = [], trainer.datamodule.intensity
        for part in [part for part in parts if "reference" in part.arrays][:2]:
            windows, scale = view(part, intensity)
            window = (windows or choose_windows(part.arrays["reference"], scale))[-1]
            images = {
                "Reference": image_png(part.arrays["reference"], window),
                "Reconstruction": image_png(part.arrays["mean"], window),
            }
            comparisons.append(Comparison(images, f"{part.case}, slice {part.index}, {window.name} window"))
        facts = {
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "data": sorted({str(row["case"]) for row in rows}),
            "measurement": sorted({str(row["measurement"]) for row in rows}),
            **pl_module.describe(),
            **({"volumes": volumes.strip().replace("\n", "; ")} if volumes else {}),
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "weights (SHA-256)": pl_module.weights_sha256,
            "versions": self.store.provenance["versions"],
        }
        figures = [
            Figure(self._figure(part.id), f"{part.case}, slice {part.index}")
            for part in parts
            if self._figure(part.id).exists()
        ]
        write_report(
            self.output / "report.html",
            facts,
            summary if has_quality(rows) else None,
            rows,
            figures,
            self.config_text,
            title="Reconstruction report",
            subtitle=f"{len(rows)} slices by {pl_module.label}",
            command=self.store.provenance["command"],
            comparisons=comparisons,
            adaptation=[Figure(path, caption) for path, caption in adapted.items()],
            adaptation_heading=heading,
            intensity=intensity,
        )


def has_quality(rows: list[dict[str, Any]]) -> bool:
    """Whether something judges the images: a reference, or, of samples of a patch prior, their seams."""
    return any("psnr" in row or "seams" in row for row in rows)


def end_at_once(trainer: lightning.Trainer) -> None:
    """Lets SIGTERM end a run where it is, as finished slices are kept: Lightning's loops end after a batch or never."""

    def end(signum: int, frame: Any) -> None:
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signum)  # type: ignore[arg-type]
        raise SIGTERMException

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # the Trainer puts back at its end what was there before it


def patient_group() -> dist.ProcessGroup | None:
    """Returns a group of all ranks in which one may wait for days for another; None where there is but one.

    Cases take their own time where a prior is adapted, and the usual group gives up after half an hour. A rank that
    dies ends the waiting at once.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def wait_for_all(ranks: dist.ProcessGroup | None) -> None:
    """Returns once every rank has come here.

    Raises:
        InputError: Another rank has failed, and said why.
    """
    if ranks is not None:
        try:
            dist.barrier(group=ranks)
        except RuntimeError:  # of the connection, which that rank has closed
            raise InputError("Another process of this run has failed: its message says why.") from None


def _scale(batch: Any, b: int) -> float:
    return batch.scale[b] if batch.scale else 1.0


def _volume_line(means: Mapping[str, float], kind: str) -> str:
    nmse, psnr, ssim = (means[name + kind] for name in ("nmse", "psnr", "ssim"))
    return f"NMSE {nmse:.4f}, PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"


def _table(label: str, summary: Mapping[str, Any]) -> str:
    """The table for the terminal, which is too narrow for what the page says of adaptations."""
    shown = [name for name in METRICS if name in summary and name not in ADAPTATION_METRICS]
    return format_table({label: summary}, shown)
