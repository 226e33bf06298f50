"""uDiG-DIP's data step: what goes to the diffusion prior explains what the fit sees, and knows nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.dip import HeldOutStop, Purification, UDiGDIP
from invrecon.methods.dip.measurement import CaseData
from invrecon.methods.dip.sequential import PurifiedInput
from tests.methods.test_dip import TINY, blob, ct, gaussian, generators, measured, mri


def make_input(operator, y: Tensor, **knobs) -> tuple[PurifiedInput, CaseData]:
    fit, draw = UDiGDIP(network=TINY, num_iterations=8, **knobs), torch.Generator().manual_seed(1)
    data = CaseData(y, operator, HeldOutStop(0.2), draw)
    return fit.input(data, gaussian(operator.image_shape[0]), draw), data


@pytest.mark.parametrize("physics", ["ct", "mri"])
def test_the_output_is_brought_to_the_rows_that_the_fit_sees(physics: str) -> None:
    operator, truth = (ct(), blob()) if physics == "ct" else (mri(), blob(1, 2))
    y, wrong = measured(operator, truth, noise=0.0), torch.zeros_like(truth)
    given, data = make_input(operator, y, cg_iterations=30)
    x = given.consistent(wrong, 0.1)
    before, after = (data.fitted_operator(image) - data.fitted_y for image in (wrong, x))
    assert float(after.norm() / before.norm()) < 0.05
    spoilt = torch.where(data.held_out, 50.0, y)
    assert torch.equal(make_input(operator, spoilt, cg_iterations=30)[0].consistent(wrong, 0.1), x)
    assert make_input(operator, y, cg_iterations=0)[0].consistent(wrong, 0.1) is wrong


def test_noisy_data_move_it_less_the_lower_the_level() -> None:
    operator, truth = ct(), blob()
    operator.noise_std = torch.tensor([5.0], dtype=torch.float64)
    given, _ = make_input(operator, measured(operator, truth, noise=5.0))
    moved = [float(given.consistent(truth, sigma).sub(truth).norm()) for sigma in (0.3, 0.03, 0.003)]
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0


def test_a_fit_with_a_data_step_sees_nothing_that_is_held_out() -> None:
    operator, prior = mri(), gaussian(2)
    y, stop = measured(operator, blob(1, 2)), HeldOutStop(0.2, patience=100)
    data = CaseData(y, operator, stop, generators(1)[0])
    images: list[list[Tensor]] = []
    for measurement in (y, torch.where(data.held_out, 50.0, y)):
        fit = UDiGDIP(Purification(), num_inner=3, network=TINY, num_iterations=9, stop=stop)
        images.append([])
        keep = images[-1].append
        fit(measurement, operator, prior, generators=generators(1), on_iterate=lambda it, keep=keep: keep(it.image))
    assert len(images[0]) == 9 and all(torch.equal(a, b) for a, b in zip(*images, strict=True))


def test_a_negative_number_of_iterations_is_refused() -> None:
    with pytest.raises(InputError, match="cg_iterations is -1"):
        UDiGDIP(cg_iterations=-1)
