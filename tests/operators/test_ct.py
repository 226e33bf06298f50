"""CT projectors: exactness of the pair, accuracy against formulas and ASTRA, geometry, errors."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators import CT, FanBeamCT, LimitedAngleCT, ParallelBeamCT, ct_from_geometry
from invrecon.operators.joseph import MatrixCache
from tests.operators.battery import CHECKS, dot_product_mismatch, images, measurements, relative_error

MAKERS = {
    "parallel": lambda: ParallelBeamCT(size=12, num_views=6, num_bins=20),
    "parallel-odd": lambda: ParallelBeamCT(size=(9, 14), num_views=5, num_bins=17),
    "parallel-row": lambda: ParallelBeamCT(size=(1, 8), num_views=3, num_bins=15),
    "parallel-pixel": lambda: ParallelBeamCT(size=1, num_views=3, num_bins=5),
    "parallel-angles": lambda: ParallelBeamCT(size=7, num_bins=15, angles=[0.0, 1.2, 2.0, math.pi / 2]),
    "limited": lambda: LimitedAngleCT(size=10, num_views=5, num_bins=16),
    "fan": lambda: FanBeamCT(size=10, num_views=7, num_bins=20),
    "fan-odd": lambda: FanBeamCT(size=(13, 8), num_views=5, num_bins=21, arc=2 * math.pi),
    "fan-pixel": lambda: FanBeamCT(size=1, num_views=3, num_bins=5),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_battery(make, check):
    check(make)


@given(
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.integers(1, 6),
    st.integers(1, 20),
    st.floats(0.1, 2 * math.pi),
    st.sampled_from([ParallelBeamCT, FanBeamCT]),
)
def test_the_pair_is_exact_for_any_size(size, num_views, num_bins, arc, beam):
    operator = beam(size=size, num_views=num_views, num_bins=num_bins, arc=arc)
    assert dot_product_mismatch(operator) < 1e-5
    assert dot_product_mismatch(operator.double()) < 1e-12


# Accuracy ---------------------------------------------------------------------------------------------------

ELLIPSES = [  # value, centre (x, y), half-axes, rotation; in the units of a field of view of 40
    (0.5, (1.0, -2.0), (11.0, 8.0), 0.3),
    (0.3, (-4.0, 1.5), (3.0, 5.0), -0.7),
    (-0.2, (5.0, 3.0), (2.0, 2.5), 1.1),
]


def ellipse_image(size: int, supersampling: int = 8) -> Tensor:
    fine = size * supersampling
    axis = ((torch.arange(fine, dtype=torch.float64) + 0.5) / fine - 0.5) * 40
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    image = torch.zeros(fine, fine, dtype=torch.float64)
    for value, (cx, cy), (a, b), phi in ELLIPSES:
        u = (x - cx) * math.cos(phi) + (y - cy) * math.sin(phi)
        v = -(x - cx) * math.sin(phi) + (y - cy) * math.cos(phi)
        image += value * ((u / a) ** 2 + (v / b) ** 2 <= 1)
    return torch.nn.functional.avg_pool2d(image[None, None], supersampling).float()


def ellipse_line_integral(theta: Tensor, s: Tensor) -> Tensor:
    """Integral along the line `x cos(theta) + y sin(theta) = s` (Kak and Slaney, 1988, Eqs. 3.5-3.9)."""
    total = torch.zeros(torch.broadcast_shapes(theta.shape, s.shape), dtype=torch.float64)
    for value, (cx, cy), (a, b), phi in ELLIPSES:
        offset = s - cx * torch.cos(theta) - cy * torch.sin(theta)
        width = a**2 * torch.cos(theta - phi) ** 2 + b**2 * torch.sin(theta - phi) ** 2
        total += 2 * value * a * b * (width - offset**2).clamp(min=0).sqrt() / width
    return total


def analytic_sinogram(operator: CT) -> Tensor:
    theta = torch.tensor(operator.angles, dtype=torch.float64)[:, None]
    s = (torch.arange(operator.num_bins, dtype=torch.float64) - (operator.num_bins - 1) / 2) * operator.bin_width
    if isinstance(operator, FanBeamCT):  # the parallel ray that coincides with each fan ray
        gamma = torch.atan(s / (operator.source_distance + operator.detector_distance))
        theta, s = theta - gamma, operator.source_distance * torch.sin(gamma)
    return ellipse_line_integral(theta, s)[None, None].float()


@pytest.mark.parametrize("beam", [ParallelBeamCT, FanBeamCT])
def test_ellipse_sinogram_and_its_order(beam):
    errors = {}
    for size in (32, 64, 128, 256):
        operator = beam(size=size, num_views=9, num_bins=512)
        errors[size] = relative_error(operator(ellipse_image(size)), analytic_sinogram(operator))
    assert errors[256] < 7e-3
    order = math.log2(errors[32] / errors[256]) / 3
    assert 0.8 < order < 2.1, f"order {order:.2f} from {errors}"


@pytest.mark.parametrize("num_views", [8, 20, 60])
def test_norm_of_the_padis_geometry(num_views):
    assert ParallelBeamCT.padis(num_views).norm() ** 2 / num_views == pytest.approx(6.03, rel=0.02)


def test_rays_hit_what_the_coordinates_say():
    """x along columns, y up: at angle 0 the detector sees columns, at pi/2 rows from the bottom up."""
    operator = ParallelBeamCT(size=8, num_bins=8, detector_length=40.0, angles=[0.0, math.pi / 2])
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 1, 6] = 1.0
    y = operator(x)[0, 0]
    expected = torch.zeros(2, 8)
    expected[0, 6] = expected[1, 6] = operator.pixel  # row 1 from the top is bin 6 from the bottom
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_fan_far_away_is_parallel():
    fan = FanBeamCT(size=32, num_views=6, num_bins=40, source_distance=1e7, detector_distance=0.0)
    parallel = ParallelBeamCT(size=32, num_views=6, num_bins=40)
    x = ellipse_image(32)
    assert relative_error(fan(x), parallel(x)) < 1e-4


def test_units_scale_the_sinogram():
    small, large = (ParallelBeamCT(16, 5, 24, field_of_view=f, detector_length=2 * f) for f in (40.0, 400.0))
    x = images(small)
    assert relative_error(large(x), 10 * small(x)) < 1e-6


@pytest.mark.parametrize("num_views, arc", [(12, math.pi), (9, 2 * math.pi / 3)])
def test_astra_agrees(num_views, arc):
    astra = pytest.importorskip("astra")
    size, bins = 64, 96
    operator = ParallelBeamCT(size, num_views, bins, arc)
    x = ellipse_image(size)
    volume = astra.create_vol_geom(size, size, -20, 20, -20, 20)
    rays = astra.create_proj_geom("parallel", operator.bin_width, bins, list(operator.angles))
    for kernel, tolerance in (("linear", 1e-4), ("line", 3e-2)):
        projector = astra.create_projector(kernel, rays, volume)
        number, sinogram = astra.create_sino(x[0, 0].numpy(), projector)
        astra.data2d.delete(number)
        astra.projector.delete(projector)
        assert relative_error(operator(x)[0, 0], torch.from_numpy(sinogram)) < tolerance, kernel


def test_astra_agrees_on_fans():
    astra = pytest.importorskip("astra")
    size, bins = 64, 96
    operator = FanBeamCT(size, 11, bins)
    x = ellipse_image(size)
    volume = astra.create_vol_geom(size, size, -20, 20, -20, 20)
    rays = astra.create_proj_geom("fanflat", operator.bin_width, bins, list(operator.angles), 40.0, 40.0)
    projector = astra.create_projector("line_fanflat", rays, volume)
    number, sinogram = astra.create_sino(x[0, 0].numpy(), projector)
    astra.data2d.delete(number)
    astra.projector.delete(projector)
    assert relative_error(operator(x)[0, 0], torch.from_numpy(sinogram)) < 3e-2


# Machinery --------------------------------------------------------------------------------------------------


def test_batches_are_bit_identical_to_singles():
    """So that photon noise, drawn from the clean sinogram, is the same alone and in a batch of any size."""
    operator = ParallelBeamCT(size=40, num_views=7, num_bins=64)
    x, y = images(operator, 19), measurements(operator, 19)
    for function, batch in ((operator, x), (operator.adjoint, y)):
        together = function(batch)
        for i in (0, 7, 18):
            assert torch.equal(function(batch[i : i + 1])[0], together[i])
    assert operator(x[:0]).shape == (0, 1, 7, 64)


def test_matrices_are_lazy_and_shared():
    first, second = (ParallelBeamCT(size=11, num_views=4, num_bins=13) for _ in range(2))
    assert first.matrix is None
    first(images(first))
    second.adjoint(measurements(second))
    assert first.matrix is second.matrix
    twin = copy.deepcopy(first)
    assert twin.matrix is None
    twin(images(twin))
    assert twin.matrix is first.matrix
    other = ParallelBeamCT(size=11, num_views=4, num_bins=13, field_of_view=41.0)
    other(images(other))
    assert other.matrix is not first.matrix


def test_cache_lets_old_matrices_go():
    operators = [ParallelBeamCT(size=8, num_views=views, num_bins=9) for views in (2, 3, 4)]
    cache = MatrixCache(max_bytes=1)
    for operator in operators:
        matrix = cache.get(operator.num_views, operator._build)
        assert cache.get(operator.num_views, operator._build) is matrix
    assert list(cache._matrices) == [4]


def test_double_is_built_in_double():
    operator = ParallelBeamCT(size=10, num_views=4, num_bins=16)
    operator(images(operator))
    single = operator.matrix.values
    operator.double()(images(operator).double())
    assert operator.matrix.values.dtype == torch.float64
    assert (operator.matrix.values != single.double()).any()
    assert single.dtype == torch.float32
    assert operator.float()(images(operator).float()).dtype == torch.float32


def test_precision_mismatch_is_named():
    operator = ParallelBeamCT(size=10, num_views=4, num_bins=16)
    with pytest.raises(InputError, match="float64"):
        operator(images(operator).double())


def test_half_precision_and_autocast_keep_the_matrix_exact():
    operator = ParallelBeamCT(size=10, num_views=4, num_bins=16)
    x = images(operator).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator(x)
    assert torch.equal(y, operator(x.float()))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == torch.bfloat16


def test_inference_mode_first_then_gradients():
    operator = ParallelBeamCT(size=9, num_views=4, num_bins=21)
    with torch.inference_mode():
        operator(images(operator))
    x = images(operator).requires_grad_()
    operator(x).square().sum().backward()
    assert relative_error(x.grad, 2 * operator.normal(x.detach())) < 1e-6


def test_functional_transforms():
    operator = ParallelBeamCT(size=9, num_views=4, num_bins=16).double()
    x, v = images(operator), images(operator, seed=4)
    _, tangent = torch.func.jvp(operator, (x,), (v,))
    assert relative_error(tangent, operator(v)) < 1e-13
    mapped = torch.func.vmap(operator)(torch.stack((x, v)))
    assert relative_error(mapped, torch.stack((operator(x), operator(v)))) < 1e-13


def test_distributed_data_parallel():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operator = ParallelBeamCT(size=8, num_views=3, num_bins=11)
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.operator(self.gain * x)

    net = Net()
    x = images(net.operator)
    net(x)  # the matrix exists when the net is wrapped
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(net)
        for _ in range(2):
            wrapped(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert float(net.gain.grad) == pytest.approx(2 * float(net.operator(x).sum()), rel=1e-4)


def test_meta_tensors_give_shapes():
    operator = FanBeamCT(size=512, num_views=60).to("meta")
    y = operator(torch.empty(2, 1, 512, 512, device="meta"))
    assert y.shape == (2, 1, 60, 512)
    assert operator.adjoint(y).shape == (2, 1, 512, 512)
    assert operator.matrix is None


# Geometry and errors ----------------------------------------------------------------------------------------


def test_presets():
    assert ParallelBeamCT().geometry == ParallelBeamCT.padis(20).geometry
    assert ParallelBeamCT().angles[0] == pytest.approx(math.pi / 40)  # cell centres
    assert LimitedAngleCT(num_views=10).angles[-1] == pytest.approx(9.5 * 2 * math.pi / 30)
    fan = FanBeamCT.padis()
    assert (fan.num_views, fan.source_distance, fan.detector_distance) == (180, 40.0, 40.0)
    assert fan.pixel == 0.15625 == fan.bin_width
    assert "180 views" in repr(fan)


@pytest.mark.parametrize("operator", [ParallelBeamCT(9, 4, 12), FanBeamCT(9, 4, 12, source_distance=50.0)])
def test_geometry_round_trip(operator):
    twin = ct_from_geometry(operator.geometry, operator.size)
    assert type(twin) is type(operator)
    assert torch.equal(twin(images(operator)), operator(images(operator)))


def case(operator: CT, **changes: object) -> SimpleNamespace:
    fields = {
        "id": "scan/0003",
        "noise_std": torch.tensor([0.1]),
        "geometry": operator.geometry,
        "measurement": torch.zeros(1, *operator.measurement_shape),
    }
    return SimpleNamespace(**{**fields, **changes})


def test_bind_takes_the_geometry_of_a_measurement():
    mine = ParallelBeamCT(16, num_views=4, num_bins=20)
    scan = FanBeamCT(16, 6, 24, field_of_view=360.0, detector_length=800.0, source_distance=600.0)
    bound = mine.bind(case(scan))
    assert isinstance(bound, FanBeamCT)
    assert bound.size == (16, 16)
    assert float(bound.noise_std) == pytest.approx(0.1)
    assert torch.equal(bound(images(mine)), scan(images(mine)))
    assert mine.bind(case(mine, geometry=None)).num_views == 4


def test_bind_refuses_a_sinogram_that_does_not_fit():
    operator = ParallelBeamCT(16, num_views=4, num_bins=20)
    with pytest.raises(InputError, match=r"scan/0003 does not fit .*\(1, 4, 20\).*\(1, 5, 20\)"):
        operator.bind(case(operator, measurement=torch.zeros(2, 1, 5, 20)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "helix"}, "type must be one of"),
        ({"num_bins": "many"}, "not a number"),
        ({"angles": []}, "number of views must be at least 1"),
        ({"angles": [0.0, math.nan]}, "finite"),
        ({"num_bins": 0}, "num_bins"),
        ({"field_of_view": -1.0}, "positive length"),
        ({"source_distance": 10.0}, "unknown: source_distance"),
    ],
)
def test_bad_geometry(change, message):
    geometry = {**ParallelBeamCT(8, 3, 10).geometry, **change}
    with pytest.raises(InputError, match=message):
        ct_from_geometry(geometry, 8)


def test_bad_arguments():
    with pytest.raises(InputError, match="missing: num_bins"):
        ct_from_geometry({k: v for k, v in ParallelBeamCT(8).geometry.items() if k != "num_bins"}, 8)
    with pytest.raises(InputError, match="corners"):
        FanBeamCT(source_distance=20.0)
    with pytest.raises(InputError, match="arc"):
        ParallelBeamCT(arc=7.0)
    with pytest.raises(InputError, match="size"):
        ParallelBeamCT(size=0)
    with pytest.raises(InputError, match="views"):
        ParallelBeamCT(num_views=0)
