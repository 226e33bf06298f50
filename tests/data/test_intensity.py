import pytest
import torch

from invrecon.data import Intensity
from invrecon.errors import InputError


def test_the_ct_scale_maps_air_water_and_bone():
    x = Intensity().encode(torch.tensor([-2000.0, -1000.0, 0.0, 2000.0, 3071.0]))
    torch.testing.assert_close(x, torch.tensor([0.0, 0.0, 1 / 3, 1.0, 1.0]))


def test_decode_inverts_encode_within_the_range():
    hu = torch.linspace(-1000, 2000, 3001)
    torch.testing.assert_close(Intensity().decode(Intensity().encode(hu)), hu, atol=5e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(InputError, match="positive"):
        Intensity(scale=scale)
