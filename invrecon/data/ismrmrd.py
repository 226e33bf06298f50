"""ISMRMRD raw data: readouts with a header each, sorted into the k-space of slices; read by h5py alone.

Source: Inati et al., "ISMRM Raw data format", MRM 77 (2017); the format's documentation, ismrmrd.github.io.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.fastmri_files import check_cartesian, header_entry, header_values
from invrecon.data.hdf5 import brief, open_hdf5
from invrecon.data.kspace import KSpace
from invrecon.errors import InputError
from invrecon.operators.coils import noise_covariance

GROUP = "dataset"
# Numbers (from 1) of the flags of readouts that are no part of k-space: noise, navigation, phase correction, dummies,
# feedback, coil correction and phase stabilisation.
CENTRE = ["encoding", "encodingLimits", "kspace_encoding_step_1", "center"]
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
        columns = np.unique(self._columns())
        first, last = int(columns[0]), int(columns[-1])
        # What is missing at both ends alike only pads k-space: such a scan is complete.
        gaps, centred = len(columns) < last - first + 1, abs(first - (self._encoded[1] - 1 - last)) <= 1
        self.states_mask = gaps or not centred

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
                readouts = [np.asarray(file[GROUP]["data"][int(n)]["data"], dtype=np.float32) for n in chosen]
        except Exception as error:  # every decoder has exceptions of its own
            raise InputError(
                f"The noise readouts of {self.path} cannot be read ({brief(error)}): the file is damaged or truncated; "
                "copy it again from its source, or set data.prewhiten to false."
            ) from error
        whole = [values for values in readouts if values.size % (2 * self.shape[1]) == 0]
        samples = [values.reshape(self.shape[1], -1, 2) for values in whole]
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
        start = self._encoded[0] // 2 - heads["center_sample"].astype(int)
        end = start + heads["number_of_samples"].astype(int)
        if columns.min() < 0 or columns.max() >= self._encoded[1] or start.min() < 0 or end.max() > self._encoded[0]:
            raise InputError(
                f"The header of {self.path} says that k-space has {self._encoded[0]} x {self._encoded[1]} samples, but "
                f"there are readouts in columns {columns.min()} to {columns.max()} with rows {start.min()} to "
                f"{end.max() - 1}: the header belongs to other data."
            )

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.nonzero(self._heads["idx"]["slice"] == index)[0]
        num_coils, columns = self.shape[1], self._columns()
        total = np.zeros((num_coils, *self._encoded), dtype=np.complex64)
        count = np.zeros(self._encoded, dtype=int)
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
                values = values.reshape(num_coils, -1)
                top = self._encoded[0] // 2 - int(head["center_sample"])
                total[:, top : top + values.shape[1], line] += values
                count[top : top + values.shape[1], line] += 1
        return total / np.maximum(count, 1), count > 0


def is_ismrmrd(file: Any) -> bool:
    """Whether an open HDF5 file is ISMRMRD raw data."""
    group = file.get(GROUP)
    return hasattr(group, "keys") and "xml" in group and "data" in group
