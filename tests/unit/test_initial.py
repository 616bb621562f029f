"""First directions of latents: where they lie, that random ones are as ever, and that fewer latents die."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from interp.core.errors import ConfigError
from interp.data.store import Batch
from interp.dictionaries.initial import active_subspace, first_directions
from interp.dictionaries.objective import Objective
from interp.dictionaries.options import DictionaryOptions
from interp.train.config import TrainOptions
from interp.train.trainer import DictionaryFit, train_dictionary

D, RANK, TOKENS = 24, 5, 400
INITS: tuple[Any, ...] = ("random", "data", "subspace")


def low_rank(noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations [TOKENS D] about a mean that is not 0, and the orthonormal basis [RANK D] of where they lie."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, RANK, generator=generator))[0].T
    x = torch.randn(TOKENS, RANK, generator=generator) * torch.tensor([3.0, 2.0, 2.0, 1.0, 1.0]) @ basis
    return x + noise * torch.randn(TOKENS, D, generator=generator) + 5 * torch.ones(D), basis


def drawn(x: Tensor, n: int = 60, *, seed: int = 1, **settings: Any) -> Tensor:
    return first_directions(x, n, Objective(**settings), torch.Generator().manual_seed(seed))


def outside(rows: Tensor, basis: Tensor) -> float:
    """The largest part of a row that is not in the span of an orthonormal basis."""
    rows, basis = rows.double(), basis.double()
    return float((rows - rows @ basis.T @ basis).norm(dim=1).max())


# -- where they lie ---------------------------------------------------------------------------------------------------


def test_random_directions_are_as_they_ever_were_to_the_bit() -> None:
    x, basis = low_rank()
    plain = torch.randn(60, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(x), plain / plain.norm(dim=-1, keepdim=True))
    made = DictionaryOptions(d_sae=60, k=4).make(D)
    made.init_from(x, seed=1)
    assert torch.equal(made.W_dec, plain / plain.norm(dim=-1, keepdim=True))
    assert outside(drawn(x), basis) > 0.5  # they know nothing of where the activations lie


@pytest.mark.parametrize("init", ["data", "subspace"])
def test_directions_lie_where_activations_do(init: str) -> None:
    x, basis = low_rank()
    rows = drawn(x, init=init)
    torch.testing.assert_close(rows.norm(dim=1).float(), torch.ones(60))
    assert outside(rows, basis) < 1e-5
    assert torch.linalg.matrix_rank(rows.float(), rtol=1e-3) == RANK
    assert torch.equal(rows, drawn(x, init=init)) and not torch.equal(rows, drawn(x, init=init, seed=2))


def test_the_subspace_is_of_the_top_components() -> None:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    sizes = torch.linspace(4.0, 1.0, D)
    x = torch.linalg.qr(torch.randn(TOKENS, D, generator=generator) - 0.0)[0]
    x = torch.linalg.qr(x - x.mean(0))[0] * sizes @ turn  # components are turn's rows, to rounding
    found = active_subspace(x, 7)
    torch.testing.assert_close(found @ found.T, torch.eye(7, dtype=torch.float64))
    assert outside(turn[:7], found) < 1e-3 and outside(turn[7:8], found) > 0.99
    # Another basis of the space turns the subspace alike, and a shift changes nothing.
    other = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    again = active_subspace(x @ other + 9, 7)
    assert outside(found @ other.double(), again) < 1e-4
    assert outside(drawn(x, init="subspace", init_rank=7), found) < 1e-5


def test_the_rank_is_found() -> None:
    assert len(active_subspace(low_rank()[0])) == RANK
    # Noise that holds less than a hundredth of the variance counts for nothing, and more of it for something.
    assert len(active_subspace(low_rank(noise=0.05)[0])) == RANK
    assert len(active_subspace(low_rank(noise=0.5)[0])) > RANK + 5
    # Null control: activations of every direction.
    everywhere = torch.randn(4000, D, generator=torch.Generator().manual_seed(0))
    assert len(active_subspace(everywhere)) == D
    # Dimensions with nearly all of the variance do not hide the rest, as they would from a plain 99 %.
    everywhere[:, 3] *= 1000
    assert len(active_subspace(everywhere)) == D
    everywhere[:, 7] *= 30
    assert len(active_subspace(everywhere)) == D
    # Constant activations have no direction; one is given, and rows have norm 1 all the same.
    constant = torch.ones(10, D)
    for init in INITS:
        torch.testing.assert_close(drawn(constant, init=init).norm(dim=1).float(), torch.ones(60))


def test_directions_of_data_are_those_of_tokens_each_once() -> None:
    x, _ = low_rank()
    rows, tokens = drawn(x, n=TOKENS, init="data"), normalize(x - x.mean(0), dim=1)
    cosine = rows.float() @ tokens.T
    assert float(cosine.max(dim=1).values.min()) > 1 - 1e-5
    assert sorted(cosine.argmax(dim=1).tolist()) == list(range(TOKENS))
    # A token that comes often comes once: latents that begin alike would stay alike.
    often = torch.cat([x[:20], x[:1].expand(500, D)])
    rows = drawn(often, n=20, init="data").float()
    assert float((rows @ rows.T - torch.eye(20)).max()) < 1 - 1e-4
    # More latents than tokens: differences of two, which lie where tokens do.
    rows = drawn(x[:30], n=200, init="data")
    assert outside(rows, low_rank()[1]) < 1e-5 and len(rows.float().unique(dim=0)) > 150
    torch.testing.assert_close(rows.norm(dim=1).float(), torch.ones(200))


# -- in dictionaries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("kind", "form"), [("topk", "sae"), ("gated", "sae"), ("batchtopk", "transcoder"), ("jumprelu", "skip_transcoder")]
)
def test_every_dictionary_begins_there_and_above_no_fit(kind: Any, form: Any, init: Any) -> None:
    x, basis = low_rank()
    target = None if form == "sae" else (x - 5) @ torch.randn(D, 10, generator=torch.Generator().manual_seed(4)) + 1
    made = DictionaryOptions(kind=kind, form=form, d_sae=60, k=4, init=init).make(D, 10)
    made.init_from(x, seed=1, target=target)
    read = made.W_enc.detach().T
    assert (outside(normalize(read, dim=1), basis) < 1e-4) == (init != "random")
    if target is None:
        torch.testing.assert_close(normalize(read, dim=1), made.W_dec.detach())
    torch.testing.assert_close(made.W_dec.detach().norm(dim=1), torch.ones(60))
    losses = made.loss(Batch(x=x, target=target))
    assert float(losses.fvu) <= 1.001 and float(losses.l0) > 0


def test_fewer_latents_die_of_those_that_begin_where_activations_lie() -> None:
    generator = torch.Generator().manual_seed(5)
    width, rank, n, tokens = 96, 8, 384, 256
    inside = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T
    atoms = normalize(torch.randn(256, rank, generator=generator), dim=1) @ inside

    def batches(where: Tensor) -> Any:
        draws = torch.Generator().manual_seed(6)
        while True:
            index = torch.rand(tokens, 256, generator=draws).topk(3).indices
            noise = 0.01 * torch.randn(tokens, width, generator=draws)
            yield Batch(x=torch.zeros(tokens, 256).scatter(1, index, 1.0) @ where + noise)

    def dead(init: Any, where: Tensor = atoms) -> float:
        made = DictionaryOptions(d_sae=n, k=4, init=init, aux_coef=0.0).make(width)
        options = TrainOptions(
            tokens=120 * tokens, batch_size=tokens, buffer_tokens=1024, dead_after=60 * tokens, lr=1e-3
        )
        fit = DictionaryFit(made, options)
        fit.run(batches(where), progress=False)
        fit.finish()
        return float(fit.last["dead"])

    found = {init: dead(init) for init in INITS}
    assert found["subspace"] < 0.5 * found["random"] and found["data"] < 0.5 * found["random"], found
    assert found["random"] > 0.2, found
    # Null control: of activations of every direction the subspace is all there is, and nothing is won.
    everywhere = normalize(torch.randn(256, width, generator=generator), dim=1)
    assert dead("subspace", everywhere) == pytest.approx(dead("random", everywhere), abs=0.1)


@pytest.mark.usefixtures("unchecked")
def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="init_rank is of init subspace"):
        Objective(init="data", init_rank=3)
    with pytest.raises(ValidationError):
        Objective(init="subspace", init_rank=0)
    options = DictionaryOptions(init="subspace", init_rank=D + 1)
    with pytest.raises(ConfigError, match=f"init_rank is {D + 1}, more than the {D}"):
        options.make(D)
    with pytest.raises(ConfigError, match=f"init_rank is {D + 1}, more than the {D}"):
        active_subspace(low_rank()[0], D + 1)


def test_the_trainer_takes_them_from_the_first_batches() -> None:
    x, basis = low_rank()
    made = DictionaryOptions(d_sae=60, k=4, init="subspace").make(D)
    options = TrainOptions(tokens=TOKENS, batch_size=200, buffer_tokens=1024, lr=1e-9)
    train_dictionary(itertools.cycle([Batch(x=x[:200]), Batch(x=x[200:])]), made, options, progress=False)
    assert outside(made.W_dec, basis) < 1e-4
