"""Which kinds find planted atoms that come in pairs, in noise, or in families: all of them, but for families."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from interp.data.store import Batch
from interp.evaluate.planted import PlantedWorld
from tests.dictionaries import ATOMS, BATCH, KINDS, D, fitted, mmcs

pytestmark = pytest.mark.slow


def batches(world: PlantedWorld) -> Iterator[Batch]:
    for number in count(1):
        x, _ = world.sample(BATCH, seed=number)
        grad = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(number)) @ world.atoms[:8]
        yield Batch(x=7 * x + 0.5, grad=grad)


@pytest.mark.parametrize("change", [{"structure": "pairs", "coupling": 0.5}, {"noise": 0.1}], ids=["pairs", "noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_atoms_are_recovered_when_they_come_in_pairs_and_when_there_is_noise(kind: str, change: dict[str, Any]) -> None:
    """Where k is every token's own it must be larger: a token with more atoms puts two of them into one latent."""
    world = PlantedWorld(ATOMS, D, density=4 / ATOMS, seed=3, **change)
    k = 8 if kind in ("topk", "gradient_topk") and "structure" in change else 4
    assert mmcs(world.atoms, fitted(batches(world), kind, k=k)) >= 0.95


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "standard"])
def test_where_one_atom_needs_another_the_two_become_one_latent(kind: str) -> None:
    """Absorption: parent and child together, and the parent alone, are fewer active latents than parent and child."""
    world = PlantedWorld(ATOMS, ATOMS, density=4 / 48, structure="hierarchy", coupling=0.5, seed=3)
    made = fitted(batches(world), kind, d_in=ATOMS, k=3, tokens=600_000)
    parents, children = world.atoms[::2], world.atoms[1::2]
    assert mmcs(parents, made) > 0.9
    assert mmcs(normalize(parents + children, dim=1), made) > 0.95 > 0.8 > mmcs(children, made)
