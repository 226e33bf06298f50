"""No operator is left out of the battery: those that no other file makes by hand are made here, for 8 x 8 pixels."""

from __future__ import annotations

import inspect

import pytest

import invrecon.operators
from invrecon.operators import LinearOperator
from tests.operators import test_ct, test_image, test_mri, test_nufft
from tests.operators.battery import CHECKS

EXPORTED = {
    name: value
    for name, value in vars(invrecon.operators).items()
    if inspect.isclass(value) and issubclass(value, LinearOperator) and not inspect.isabstract(value)
}
MAKERS = (test_ct.MAKERS, test_image.MAKERS, test_mri.ONE_COIL, test_nufft.MAKERS)
BY_HAND = {type(make()).__name__ for makers in MAKERS for make in makers.values()}


def is_small(kind):
    """Says whether the size is all that it takes."""
    parameters = inspect.signature(kind).parameters
    return "size" in parameters and all(p.default is not p.empty for p in parameters.values())


BY_ITSELF = [name for name, kind in EXPORTED.items() if name not in BY_HAND and is_small(kind)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", BY_ITSELF)
def test_battery(name, check):
    check(lambda: EXPORTED[name](size=8))


def test_no_operator_is_left_out():
    left_out = sorted(set(EXPORTED) - BY_HAND - set(BY_ITSELF))
    assert not left_out, f"give {', '.join(left_out)} defaults and a size, or add them to the makers in tests/operators"
