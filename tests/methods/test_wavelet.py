import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.errors import InputError
from invrecon.methods import WaveletL1
from invrecon.methods.wavelet import Wavelets, daubechies, filter_bank
from invrecon.operators import Identity
from tests.methods.toy import DenseOperator

F64 = torch.empty(0, dtype=torch.float64)


def test_the_filter_with_two_moments_is_the_published_one():
    root = 3**0.5
    published = torch.tensor([1 + root, 3 + root, 3 - root, 1 - root], dtype=torch.float64) / (4 * 2**0.5)
    torch.testing.assert_close(daubechies(2), published, atol=1e-12, rtol=0)
    torch.testing.assert_close(daubechies(1), torch.full((2,), 0.5**0.5, dtype=torch.float64))


@pytest.mark.parametrize("num_moments", range(1, 11))
def test_details_of_polynomials_vanish(num_moments):
    low = daubechies(num_moments)
    assert len(low) == 2 * num_moments
    high = filter_bank(64, low)[32, : len(low)]
    ramp = torch.arange(len(low), dtype=torch.float64) / len(low)
    moments = torch.stack([(high * ramp**k).sum() for k in range(num_moments)])
    assert moments.abs().max() < 1e-6
    assert abs(float((high * ramp**num_moments).sum())) > 10 * float(moments.abs().max())


@given(num_moments=st.integers(1, 10), half=st.integers(1, 20))
def test_one_scale_is_an_orthogonal_matrix(num_moments, half):
    bank = filter_bank(2 * half, daubechies(num_moments))  # also where the filter is longer than the signal
    torch.testing.assert_close(bank @ bank.mT, torch.eye(2 * half, dtype=torch.float64), atol=1e-7, rtol=0)
    if num_moments <= 5:
        torch.testing.assert_close(bank @ bank.mT, torch.eye(2 * half, dtype=torch.float64), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("shape", "num_scales"), [((8, 12), 2), ((16, 16), 4), ((32, 4), 1), ((4, 8, 12), 2)])
def test_the_transform_is_orthonormal(shape, num_scales):
    wavelets = Wavelets(shape, num_scales, 4, F64)
    x, c = (torch.randn(2, 3, *shape, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(wavelets.inverse(wavelets(x)), x, atol=1e-11, rtol=0)
    torch.testing.assert_close(wavelets(wavelets.inverse(c)), c, atol=1e-11, rtol=0)
    assert float((wavelets(x) * c).sum()) == pytest.approx(float((x * wavelets.inverse(c)).sum()), abs=1e-10)
    assert float(wavelets(x).norm()) == pytest.approx(float(x.norm()))


def test_two_scales_of_haar_by_hand():
    x = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4)
    c = Wavelets((4, 4), 2, 1, F64)(x)[0, 0]
    assert float(c[0, 0]) == pytest.approx(30.0)  # the sum over 16 pixels, divided by 4
    assert c[2:, :2].abs().tolist() == [[pytest.approx(4.0)] * 2] * 2  # steps of 4 from row to row
    assert c[:2, 2:].abs().tolist() == [[pytest.approx(1.0)] * 2] * 2  # of 1 from column to column
    assert float(c[2:, 2:].abs().max()) < 1e-12
    assert (abs(float(c[1, 0])), abs(float(c[0, 1]))) == (pytest.approx(16.0), pytest.approx(4.0))


def test_denoising_is_soft_thresholding():
    y = torch.randn(2, 1, 16, 8, dtype=torch.float64)
    operator, wavelets = Identity((16, 8)), Wavelets((16, 8), 2, 4, F64)
    x = WaveletL1(weight=0.3, num_scales=2, clip=None)(y, operator).mean
    c, got = wavelets(y), wavelets(x)
    expected = torch.where(c.abs() > 0.3, c - 0.3 * c.sign(), torch.zeros_like(c))
    expected[..., :4, :2] = c[..., :4, :2]  # the coarsest scale bears no penalty
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    assert (got == 0).sum() + (got.abs() < 1e-12).sum() > 20


def underdetermined(noise_std=None):
    operator = DenseOperator(torch.randn(40, 64, dtype=torch.float64), (1, 8, 8), noise_std)
    return operator, torch.randn(3, 1, 1, 40, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])[:, None, None, None]


def test_the_optimum_satisfies_its_conditions():
    """`g = Psi A^T (y - A x) / ||A||^2` is `w sign(c)` on the support, at most `w` off it, 0 on the coarsest scale."""
    operator, y = underdetermined()
    w, method = 0.02, WaveletL1(0.02, num_scales=2, num_iterations=20000, tol=1e-12, clip=None)
    estimate = method(y, operator)
    wavelets = Wavelets((8, 8), 2, 4, F64)
    c = wavelets(estimate.mean)
    g = wavelets(operator.adjoint(y - operator(estimate.mean))) / operator.norm() ** 2
    support = c.abs() > 1e-6
    support[..., :2, :2] = False
    off = ~support
    off[..., :2, :2] = False
    assert support.sum() > 20 and off.sum() > 20
    torch.testing.assert_close(g[support], w * c[support].sign(), atol=1e-7, rtol=0)
    assert g[off].abs().max() <= w + 1e-7
    assert g[..., :2, :2].abs().max() < 1e-7
    assert max(estimate.stats["num_iterations"]) < 20000


def test_the_objective_beats_every_neighbour():
    operator, y = underdetermined()
    wavelets = Wavelets((8, 8), 2, 4, F64)

    def objective(x):
        misfit = (operator(x) - y).flatten(1).square().sum(dim=1) / (2 * operator.norm() ** 2)
        return misfit + 0.02 * wavelets.detail_norm(x)

    x = WaveletL1(0.02, num_scales=2, num_iterations=5000, tol=1e-10, clip=None)(y, operator).mean
    best = objective(x)
    for size in (1e-3, 1e-1):
        assert (objective(x + size * torch.randn_like(x)) > best).all()


@pytest.mark.parametrize("noise_std", [None, torch.tensor([0.1], dtype=torch.float64)])
def test_the_scale_of_the_operator_does_not_matter(noise_std):
    operator, y = underdetermined(noise_std)
    scaled = DenseOperator(37 * operator.matrix, (1, 8, 8), None if noise_std is None else 37 * noise_std)
    method = WaveletL1(num_scales=2, num_iterations=50, tol=0)
    torch.testing.assert_close(method(y, operator).mean, method(37 * y, scaled).mean, atol=1e-9, rtol=0)


def test_noise_raises_the_weight():
    operator, y = underdetermined()
    bound = DenseOperator(operator.matrix, (1, 8, 8), torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64))
    knobs = dict(num_scales=2, num_iterations=100, tol=0)
    aware = WaveletL1(1e-6, 0.3, **knobs)(y, bound).mean
    for k, std in enumerate((2.0, 1.0, 2.0)):
        expected = WaveletL1(0.3 * std / operator.norm(), **knobs)(y[k : k + 1], operator).mean
        torch.testing.assert_close(aware[k : k + 1], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_shifts", [1, 3])
def test_a_sample_does_not_depend_on_its_batch(num_shifts):
    operator, y = underdetermined()
    method = WaveletL1(0.02, num_scales=2, num_shifts=num_shifts, num_iterations=400, tol=1e-4)

    def run(index):
        return method(y[index], operator)

    together = run([0, 1, 2])
    assert len(set(together.stats["num_iterations"])) > 1  # they really stop one by one
    torch.testing.assert_close(run([2, 0, 1]).mean, together.mean[[2, 0, 1]], atol=1e-9, rtol=0)
    for k in range(3):
        torch.testing.assert_close(run([k]).mean, together.mean[[k]], atol=1e-9, rtol=0)


def test_shifts_average_the_shrinkage():
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    operator = Identity(8)
    knobs = dict(num_scales=2, num_iterations=1, clip=None)
    x = WaveletL1(0.4, num_shifts=3, **knobs)(y, operator).mean
    single = WaveletL1(0.4, **knobs)
    parts = [single(y.roll((k, k), (2, 3)), operator).mean.roll((-k, -k), (2, 3)) for k in range(3)]
    torch.testing.assert_close(x, torch.stack(parts).mean(dim=0), atol=1e-12, rtol=0)


def test_all_shifts_of_one_scale_leave_no_grid():
    """In 1-D, Haar with both shifts commutes with a shift of the image; with one it does not."""
    y = torch.randn(1, 1, 1, 2, 16, dtype=torch.float64)[..., :1, :].expand(-1, -1, -1, 16, -1)[0]
    operator, defects = Identity(16), []
    for num_shifts in (1, 2):
        method = WaveletL1(0.5, num_scales=1, num_moments=1, num_shifts=num_shifts, num_iterations=1, clip=None)
        defect = method(y.roll(1, -1), operator).mean - method(y, operator).mean.roll(1, -1)
        defects.append(float(defect.abs().max()))
    assert defects[1] < 1e-12 < 0.1 < defects[0]


def test_costs_are_counted():
    operator, y = underdetermined()
    stats = WaveletL1(num_scales=2, num_iterations=7, tol=0)(y, operator).stats
    assert (stats["num_operator_calls"], stats["num_evaluations"], stats["num_iterations"]) == (14, 0, [7] * 3)


@pytest.mark.parametrize("shape", [(9, 8), (7, 5), (12, 10)])
def test_any_side_is_extended_at_the_least_cost(shape):
    """`x` is cut from the optimum `u` of extended images whose operator sees nothing of what is beyond `x`."""
    num, extended, w = shape[0] * shape[1], [-(-n // 4) * 4 for n in shape], 0.01
    operator = DenseOperator(torch.randn(num // 2, num, dtype=torch.float64), (1, *shape))
    y = torch.randn(2, 1, 1, num // 2, dtype=torch.float64)
    matrix = torch.zeros(num // 2, *extended, dtype=torch.float64)
    matrix[:, : shape[0], : shape[1]] = operator.matrix.unflatten(1, shape)
    blind = DenseOperator(matrix.flatten(1), (1, *extended))
    for num_shifts in (1, 3):
        method = WaveletL1(w, num_scales=2, num_moments=2, num_shifts=num_shifts, num_iterations=100, tol=0, clip=None)
        x, u = method(y, operator).mean, method(y, blind).mean
        assert x.shape == (2, 1, *shape)
        torch.testing.assert_close(x, u[..., : shape[0], : shape[1]], atol=1e-5, rtol=0)

    u = WaveletL1(w, num_scales=2, num_moments=2, num_iterations=1000, tol=1e-12, clip=None)(y, blind).mean
    wavelets = Wavelets(extended, 2, 2, F64)
    c, g = wavelets(u), wavelets(blind.adjoint(y - blind(u))) / blind.norm() ** 2
    support = c.abs() > 1e-5
    support[..., : extended[0] // 4, : extended[1] // 4] = False
    torch.testing.assert_close(g[support], w * c[support].sign(), atol=1e-5, rtol=0)
    assert g.abs().max() <= w + 1e-5 and support.sum() > 10


def test_an_extended_image_is_fitted_as_well():
    """A flat image of odd sides costs nothing, whatever lies beyond."""
    x = torch.full((1, 1, 9, 7), 0.6, dtype=torch.float64)
    operator = Identity((9, 7))
    estimate = WaveletL1(0.1, num_scales=3, num_iterations=1000, tol=0)(x, operator).mean
    torch.testing.assert_close(estimate, x, atol=1e-3, rtol=0)


def test_what_cannot_work_is_refused():
    for shape, pattern in (((9, 8), r"\(9, 8\) has an odd"), ((12, 8), r"halved 2 times.*divisible by 16")):
        with pytest.raises(InputError, match=pattern):
            Wavelets(shape, 4, 4, F64)
    for knobs in (
        dict(weight=-1.0),
        dict(noise_weight=-1.0),
        dict(tol=-1.0),
        dict(num_iterations=0),
        dict(num_scales=0),
        dict(num_moments=0),
        dict(num_moments=11),
        dict(num_shifts=0),
        dict(clip=(1.0, 0.0)),
    ):
        with pytest.raises(InputError):
            WaveletL1(**knobs)
