"""ISMRMRD raw data: readouts with a header each, sorted into the k-space of slices; read by h5py alone.

Source: Inati et al., "ISMRM Raw data format", MRM 77 (2017); the format's documentation, ismrmrd.github.io.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.fastmri_files import check_cartesian, header_entry, header_values
from invrecon.data.hdf5 import brief, open_hdf5
from invrecon.data.kspace import UNDERSAMPLED, KSpace, is_full, one_sided
from invrecon.errors import InputError
from invrecon.operators.coils import noise_covariance

GROUP = "dataset"
# Numbers (from 1) of the flags of readouts that are no part of k-space: noise, navigation, phase correction, dummies,
# feedback, coil correction and phase stabilisation.
LIMIT_DEFAULTS = (("minimum", "0"), ("maximum", "-1"))
LIMITS = ("encoding", "encodingLimits")
CENTRE = [*LIMITS, "kspace_encoding_step_1", "center"]
PARALLEL = ["encoding", "parallelImaging", "accelerationFactor", "kspace_encoding_step_1"]
BANDWIDTH = ["acquisitionSystemInformation", "relativeReceiverNoiseBandwidth"]
PATIENT = ["subjectInformation", "patientID"]
NOISE, CALIBRATION, REVERSED = 19, 20, 22
LEAST_SAMPLES = 10  # of noise, a coil
NOT_IMAGING = (NOISE, 23, 24, 26, 27, 28, 29, 30, 31)
HEAD = ("flags", "idx", "active_channels", "center_sample", "trajectory_dimensions", "number_of_samples")
INDEX = ("slice", "kspace_encode_step_1")
SINGLE = ("kspace_encode_step_2", "contrast", "phase", "repetition", "set")


class ISMRMRDFile(KSpace):
    """Cartesian two-dimensional ISMRMRD data of the first encoding space; averages are averaged.

    Readouts for calibration alone, which may be of another contrast, take the place of lines that were not measured.
    Samples that a readout's head says are to be discarded are no part of it. A slice without all of the readouts that
    the header states was not measured to the end, unless the header states parallel imaging.

    Raises:
        InputError: The header is not understood or contradicts the readouts, or the scan is no stack of Cartesian
            slices of one contrast.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path) as file:
            try:
                xml = file[GROUP]["xml"][0]
                heads = file[GROUP]["data"]["head"]
                encoded = header_values(xml, "encodedSpace", "matrixSize")
                asked = header_values(xml, "reconSpace", "matrixSize")
                field = header_values(xml, "encodedSpace", "fieldOfView_mm")
                self.voxel_mm = (field[2] / encoded[2], field[0] / encoded[0], field[1] / encoded[1])
                self._centre = int(float(header_entry(xml, CENTRE, str(int(encoded[1]) // 2))))
                patient = header_entry(xml, PATIENT, "")
                self._bandwidth = float(header_entry(xml, BANDWIDTH, "1"))
                parallel = float(header_entry(xml, PARALLEL, "1")) > 1
                self._num_stated = 0 if parallel else stated_number(xml, "kspace_encoding_step_1")
                num_slices = stated_number(xml, "slice")
                if lacking := {*HEAD} - {*heads.dtype.names} or {*INDEX, *SINGLE} - {*heads["idx"].dtype.names}:
                    raise ValueError(f"the heads of the readouts lack {', '.join(sorted(lacking))}")
            except Exception as error:
                raise InputError(
                    f"The ISMRMRD header of {path} is not understood ({brief(error)}); expected '{GROUP}/xml' with "
                    f"encodedSpace and reconSpace, and readouts in '{GROUP}/data'."
                ) from error
        check_cartesian(path, xml)
        skipped = sum(1 << (number - 1) for number in NOT_IMAGING)
        chosen = (heads["flags"] & np.uint64(skipped)) == 0
        if "encoding_space_ref" in (heads.dtype.names or ()):
            chosen &= heads["encoding_space_ref"] == 0
        place = heads["idx"]["slice"].astype(int) << 16 | heads["idx"]["kspace_encode_step_1"].astype(int)
        extra = (heads["flags"] & np.uint64(1 << (CALIBRATION - 1))) != 0
        chosen &= ~(extra & np.isin(place, place[chosen & ~extra]))
        self._lines = np.nonzero(chosen)[0]
        self._heads = heads[self._lines]
        self._encoded = (int(encoded[0]), int(encoded[1]))
        self._check()
        slices = self._heads["idx"]["slice"]
        num_coils = int(self._heads["active_channels"][0])
        self._finish((int(slices.max()) + 1, num_coils, *self._encoded), patient)
        self._noise_heads = heads
        height, width = min(int(asked[0]), self._encoded[0]), min(int(asked[1]), self._encoded[1])
        self.shape, self.matrix = (*self.shape[:2], height, self._encoded[1]), (height, width)
        present = np.unique(slices)
        self.states_mask = any(self._lacking_lines(index) for index in present)
        if len(present) < num_slices:
            warnings.warn(
                f"{path} holds readouts of {len(present)} slices, its header (encodingLimits) states {num_slices}: see "
                "that the scan was written to the end.",
                stacklevel=2,
            )

    def lacking(self, index: int, mask: Tensor) -> str:
        """As of any k-space, by the readouts of the slice; it also may lack some that the header states."""
        num, lines = len(self._columns_of(index)), self._lacking_lines(index)
        if num < self._num_stated and lines in ("", UNDERSAMPLED):
            return f"incomplete, with {num} of the {self._num_stated} readouts of a slice that its header states"
        return lines or (one_sided(mask) if is_full(mask) else UNDERSAMPLED)

    def _lacking_lines(self, index: int) -> str:
        """Says of the readouts of a slice that there are gaps between them, or that they are not centred."""
        columns = self._columns_of(index)
        kept = torch.zeros(1, self._encoded[1], dtype=torch.bool)
        kept[:, columns] = True
        return UNDERSAMPLED if len(columns) < columns[-1] - columns[0] + 1 else one_sided(kept)

    def _columns_of(self, index: int) -> np.ndarray:
        """Returns the columns of k-space that readouts of a slice fill, ascending."""
        return np.unique(self._columns()[self._heads["idx"]["slice"] == index])

    @property
    def noise_covariance(self) -> Tensor | None:  # type: ignore[override]
        """Returns the covariance of the coils' noise in k-space, from readouts of noise alone; None without them.

        Noise power is in proportion to the bandwidth: at a dwell time of `t` it is `t_noise / (t b)` times that of the
        noise readouts, with the receiver's relative noise bandwidth `b`; and averaging divides it.

        Source: Kellman & McVeigh, "Image reconstruction in SNR units", MRM 54 (2005), on noise calibration.
        """
        heads = self._noise_heads
        is_noise = (heads["flags"] & np.uint64(1 << (NOISE - 1))) != 0
        chosen = np.nonzero(is_noise & (heads["active_channels"] == self.shape[1]))[0]
        try:
            with open_hdf5(self.path) as file:
                stored = file[GROUP]["data"]
                readouts = [np.asarray(stored[int(n)]["data"], dtype=np.float32) for n in chosen]
        except Exception as error:  # every decoder has exceptions of its own
            raise InputError(
                f"The noise readouts of {self.path} cannot be read ({brief(error)}): the file is damaged or truncated; "
                "copy it again from its source, or set data.prewhiten to false."
            ) from error
        kept = zip(readouts, *kept_samples(heads[chosen]), strict=True)
        whole = [part for part in kept if part[0].size % (2 * self.shape[1]) == 0]
        samples = [values.reshape(self.shape[1], -1, 2)[:, first : max(last, 0)] for values, first, last in whole]
        if sum(values.shape[1] for values in samples) < LEAST_SAMPLES * self.shape[1]:
            return None  # of so few, the estimate itself would colour the noise
        if not all(np.isfinite(values).all() for values in samples):
            raise InputError(
                f"The noise readouts of {self.path} hold NaN or Inf, expected finite samples: leave them out, or set "
                "data.prewhiten to false."
            )
        lines = np.unique(np.stack((self._heads["idx"]["slice"], self._columns())), axis=1).shape[1]
        scale = lines / (len(self._lines) * (self._bandwidth if self._bandwidth > 0 else 1.0))
        if "sample_time_us" in (heads.dtype.names or ()):
            noise_time, time = float(heads["sample_time_us"][chosen[0]]), float(self._heads["sample_time_us"][0])
            scale *= noise_time / time if noise_time > 0 and time > 0 else 1.0
        return scale * noise_covariance(torch.from_numpy(np.concatenate(samples, axis=1)))

    def _columns(self) -> np.ndarray:
        return self._heads["idx"]["kspace_encode_step_1"].astype(int) + self._encoded[1] // 2 - self._centre

    def _check(self) -> None:
        heads = self._heads
        if not len(heads):
            raise InputError(f"{self.path} holds no imaging readout; see that the scan was written to the end.")
        if several := [name for name in SINGLE if len(np.unique(heads["idx"][name])) > 1]:
            raise InputError(
                f"{self.path} holds several values of {', '.join(several)}, expected slices of one contrast in two "
                "dimensions: write one of them to a file of its own (a third dimension transformed to images)."
            )
        if (heads["flags"] & np.uint64(1 << (REVERSED - 1))).any():
            raise InputError(
                f"{self.path} holds readouts that were acquired backwards (echo-planar): reverse them, and correct "
                "their phase, when converting the scan."
            )
        if (heads["trajectory_dimensions"] > 0).any():
            raise InputError(f"{self.path} holds readouts along trajectories, expected Cartesian ones.")
        if len(np.unique(heads["active_channels"])) > 1:
            raise InputError(f"The readouts of {self.path} differ in their number of coils; expected one number.")
        columns = self._columns()
        start, end = self._rows(heads)
        if (start >= end).any():
            n = int(np.argmax(start >= end))
            raise InputError(
                f"Readout {int(self._lines[n])} of {self.path} has {int(heads['number_of_samples'][n])} samples, and "
                "its header discards them all (discard_pre, discard_post), expected some that are left: correct it, "
                "or leave the readout out."
            )
        if columns.min() < 0 or columns.max() >= self._encoded[1] or start.min() < 0 or end.max() > self._encoded[0]:
            raise InputError(
                f"The header of {self.path} says that k-space has {self._encoded[0]} x {self._encoded[1]} samples, but "
                f"there are readouts in columns {columns.min()} to {columns.max()} with rows {start.min()} to "
                f"{end.max() - 1}: the header belongs to other data."
            )

    def _rows(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first row of each readout, and that after its last, without what is discarded."""
        start = self._encoded[0] // 2 - heads["center_sample"].astype(int)
        first, last = kept_samples(heads)
        return start + first, start + last

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.nonzero(self._heads["idx"]["slice"] == index)[0]
        num_coils, columns = self.shape[1], self._columns()
        total = np.zeros((num_coils, *self._encoded), dtype=np.complex64)
        count = np.zeros(self._encoded, dtype=int)
        top, bottom = self._rows(self._heads)
        first, last = kept_samples(self._heads)
        with open_hdf5(self.path) as file:
            stored = file[GROUP]["data"]
            for n in chosen:
                head, line = self._heads[n], columns[n]
                values = np.asarray(stored[int(self._lines[n])]["data"], dtype=np.float32).view(np.complex64)
                if values.size != num_coils * int(head["number_of_samples"]):
                    raise InputError(
                        f"Readout {int(self._lines[n])} of {self.path} has {values.size} samples, but its header says "
                        f"{num_coils} coils of {int(head['number_of_samples'])}: the file is damaged; convert it again."
                    )
                total[:, top[n] : bottom[n], line] += values.reshape(num_coils, -1)[:, first[n] : last[n]]
                count[top[n] : bottom[n], line] += 1
        return total / np.maximum(count, 1), count > 0


def kept_samples(heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first sample of each readout that counts, and that after the last: the others are to be discarded."""
    names = heads.dtype.names or ()
    zero = np.zeros(len(heads), dtype=int)
    before, after = (heads[n].astype(int) if n in names else zero for n in ("discard_pre", "discard_post"))
    return before, heads["number_of_samples"].astype(int) - after


def stated_number(header: bytes | str, counter: str) -> int:
    """Returns how many values of a counter the header's encoding limits state; 0 if they state none."""
    first, last = (header_entry(header, [*LIMITS, counter, end], default) for end, default in LIMIT_DEFAULTS)
    return int(float(last)) - int(float(first)) + 1


def is_ismrmrd(file: Any) -> bool:
    """Whether an open HDF5 file is ISMRMRD raw data."""
    group = file.get(GROUP)
    return hasattr(group, "keys") and "xml" in group and "data" in group
