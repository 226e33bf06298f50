"""What the claims are tested on: sparse-view, few-view and fan-beam CT, deblurring, super-resolution."""

from __future__ import annotations

from benchmarks._common import SETTINGS, Setting
from benchmarks._methods import find_problems
from invrecon.operators import GaussianNoise, NoNoise

# The noise of deblurring and super-resolution is not stated where the claims are; 0.01 of the intensity scale goes with
# the baselines printed there.
PROBLEMS: dict[str, Setting] = {
    **{name: setting for name, setting in SETTINGS.items() if not setting.native},
    "8-clean": Setting("8-clean", "8 views", 8, NoNoise()),
    "fan": Setting("fan", "Fan beam, 180 views over 180°", 180, NoNoise(), physics={"class": "FanBeamCT"}),
    "deblur": Setting(
        "deblur",
        "Deblurring 9 x 9, noise 0.01",
        0,
        GaussianNoise(0.01),
        physics={"class": "UniformBlur", "kernel_size": 9},
    ),
    "deblur-heavy": Setting(
        "deblur-heavy",
        "Deblurring 17 x 17, noise 0.01",
        0,
        GaussianNoise(0.01),
        physics={"class": "UniformBlur", "kernel_size": 17},
    ),
    "sr": Setting(
        "sr",
        "Super-resolution 4 x, noise 0.01",
        0,
        GaussianNoise(0.01),
        physics={"class": "BlockDownsample", "factor": 4},
    ),
}
FOUND = find_problems(PROBLEMS.values())  # operators that have a config and none of the names above
PROBLEMS |= FOUND
