"""Interchange of a subspace on every family: what it should be at the positions meant, and nothing elsewhere."""

import pytest
import torch

from interp.core.subspace import ReplaceSubspace, random_basis
from interp.core.where import Where
from tests.families import FAMILIES, manager, tokens

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_takes_the_edit(name: str) -> None:
    hm, ids = manager(name), tokens()
    source = hm.run(tokens(seed=5), read=["1.resid_pre"])
    basis, where = random_basis(5, hm.d_model), Where(pos=[3, -1])
    out = hm.run(ids, read=["1.resid_pre"], write=[ReplaceSubspace("1.resid_pre", source, basis, where=where)])
    x, s = hm.run(ids, read=["1.resid_pre"])["1.resid_pre"], source["1.resid_pre"]
    expected = x.clone()
    expected[:, [3, 11]] += ((s - x) @ basis.T @ basis)[:, [3, 11]]
    torch.testing.assert_close(out["1.resid_pre"], expected, atol=1e-5, rtol=1e-5)
