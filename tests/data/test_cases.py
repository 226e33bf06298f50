import pytest
import torch

from invrecon.data import Case, CaseBatch, collate_cases
from invrecon.errors import InputError


def case(index=0, source="a.h5", **more):
    return Case(id=f"a/{index:04d}", patient="p", source=source, index=index, voxel_mm=(3.0, 1.0, 1.0), **more)


def test_cases_are_stacked():
    x, y, std = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 3, 5), torch.tensor([0.1, 0.2])
    geometry = {"type": "parallel"}
    batch = collate_cases(
        [case(i, reference=x[i], measurement=y[i], noise_std=std[i], geometry=geometry) for i in range(2)]
    )
    assert isinstance(batch, CaseBatch) and len(batch) == 2
    assert (batch.id, batch.patient, batch.source) == (["a/0000", "a/0001"], ["p", "p"], ["a.h5", "a.h5"])
    assert (batch.index, batch.geometry, list(batch.voxel_mm)) == ([0, 1], geometry, [(3.0, 1.0, 1.0)] * 2)
    assert torch.equal(batch.reference, x) and torch.equal(batch.measurement, y)
    assert torch.equal(batch.noise_std, std)


def test_what_is_absent_stays_absent():
    batch = collate_cases([case(0, reference=torch.rand(1, 4, 4))])
    assert batch.measurement is None and batch.noise_std is None and batch.geometry is None


def test_moving_a_batch_moves_its_tensors():
    batch = collate_cases([case(0, reference=torch.rand(1, 4, 4))])
    moved = batch.to("meta")
    assert moved.reference.is_meta and not batch.reference.is_meta and moved.id == batch.id


def test_batches_never_mix_files():
    with pytest.raises(InputError, match="mixes cases of"):
        collate_cases([case(0), case(1, source="b.h5")])


def test_shapes_must_agree():
    with pytest.raises(InputError, match="shape of their reference"):
        collate_cases([case(0, reference=torch.rand(1, 4, 4)), case(1, reference=torch.rand(1, 4, 5))])
    with pytest.raises(InputError, match="shape of their reference"):
        collate_cases([case(0, reference=torch.rand(1, 4, 4)), case(1)])
    with pytest.raises(InputError, match="no cases"):
        collate_cases([])
