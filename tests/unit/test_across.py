"""Dictionaries that several processes train: shares of one loss, choices among all, and what each one holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError
from interp.data.store import Batch
from interp.dictionaries.across import ALONE, Across, latent_axis
from interp.dictionaries.base import Losses
from interp.dictionaries.initial import _DRAWN, first_directions
from interp.dictionaries.objective import Objective
from tests.dictionaries import CASES, D_SAE, TOKENS, batch_for, make, off, with_aux
from tests.threads import together

SPLIT = [(kind, form) for kind, form in CASES if kind != "feature_choice"]
WAYS = [(3, 1), (1, 4), (2, 2)]


def share_of(batch: Batch, across: Across) -> Batch:
    """The rows of one process, of which each has as many."""
    each = len(batch.x) // across.tokens.size
    place = slice(across.tokens.rank * each, (across.tokens.rank + 1) * each)
    parts: dict[str, Any] = {name: part if part is None else part[place] for name, part in vars(batch).items()}
    return Batch(**parts)


def stepped(made: Any, batch: Batch, dead: Tensor | None, across: Across) -> tuple[Losses, dict[str, Tensor]]:
    """A loss of its share, the gradients of the whole loss, and what the dictionary remembers of the step."""
    made.join(across)
    made.warm = 0.6
    if dead is not None and across.latents.size > 1:
        dead = dead[across.place(D_SAE)]
    losses = made.loss(share_of(batch, across), dead=dead)
    losses.total.backward()
    across.sum_gradients(made)
    found = {f"grad.{name}": p.grad for name, p in made.named_parameters() if p.grad is not None}
    made.after_step()
    return losses, found | {f"buffer.{name}": value for name, value in made.named_buffers()}


def dead_of(n: int | None) -> Tensor | None:
    """So many dead latents, not the same number in each half."""
    if n is None:
        return None
    order = torch.arange(D_SAE) * 7 % D_SAE
    return torch.zeros(D_SAE, dtype=torch.bool).index_fill(0, order[:n], True)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize(("kind", "form"), SPLIT)
def test_shares_of_the_loss_and_gradients_add_up_to_those_of_one_process(
    kind: str, form: str, ways: tuple[int, int]
) -> None:
    for n_dead, masked, prefixes, loss in ((None, False, (), "fvu"), (3, True, (5, 23), "mse"), (30, True, (), "fvu")):
        dead = dead_of(n_dead)
        settings: dict[str, Any] = {"prefixes": prefixes, "loss": loss}
        batch = batch_for(make(kind, form), masked=masked)
        whole, expected = stepped(with_aux(make(kind, form, **settings)), batch, dead, ALONE)

        def work(
            across: Across, batch: Batch = batch, dead: Tensor | None = dead, settings: Any = settings
        ) -> tuple[Across, Losses, dict[str, Tensor]]:
            losses, found = stepped(with_aux(make(kind, form, **settings)), batch, dead, across)
            return across, losses, found

        parts = together(*ways, work)
        share = sum(losses.total.detach() for across, losses, _ in parts if across.latents.rank == 0)
        assert off(torch.as_tensor(share), whole.total) <= 1e-10
        for across, losses, found in parts:
            for name in ("fvu", "aux", "penalty", "l0"):
                assert off(getattr(losses, name), getattr(whole, name)) <= 1e-10, name
            assert torch.equal(losses.fired, across.part(0, whole.fired))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                mine = across.part(latent_axis(name.partition(".")[2]), value)
                assert off(found[name], mine) <= 1e-10, (name, across.every.rank, n_dead)


def test_a_share_is_not_what_a_process_would_find_alone() -> None:
    # The control of the test above: a quotient of its own sums, and a choice of its own, are other ones.
    batch = batch_for(make("batchtopk"))
    _, expected = stepped(make("batchtopk"), batch, None, ALONE)
    half = Batch(x=batch.x[: TOKENS // 2])
    _, found = stepped(make("batchtopk"), half, None, ALONE)
    assert off(2 * found["grad.W_dec"], expected["grad.W_dec"]) > 1e-2
    assert off(found["buffer.least"], expected["buffer.least"]) > 1e-4


@pytest.mark.parametrize(("kind", "form"), [pair for pair in SPLIT if pair[1] != "skip_transcoder"])
def test_first_weights_and_clipped_gradients_are_those_of_one_process(kind: str, form: str) -> None:
    batch = batch_for(make(kind, form))
    target = batch.target if form != "sae" else None

    def work(across: Across) -> tuple[Across, dict[str, Tensor]]:
        made = make(kind, form)
        made.join(across.of_latents())
        made.init_from(batch.x, seed=3, target=target)
        losses = made.loss(batch)
        losses.total.backward()
        made.across.sum_gradients(made)
        made.across.clip(made, 1e-3)
        tensors = dict(made.state_dict()) | {f"g.{n}": p.grad for n, p in made.named_parameters() if p.grad is not None}
        whole = made.across.whole({key: (latent_axis(key.removeprefix("g.")), value) for key, value in tensors.items()})
        return across, whole or {}

    _, expected = work(ALONE)
    norm = sum(value.square().sum() for name, value in expected.items() if name.startswith("g."))
    assert float(torch.as_tensor(norm).sqrt()) == pytest.approx(1e-3, rel=1e-3)
    for across, found in together(1, 4, work):
        assert found.keys() == (expected.keys() if across.latents.rank == 0 else set())
        assert all(off(value, expected[name]) <= 1e-9 for name, value in found.items())


def test_random_rows_are_the_same_whichever_are_wanted() -> None:
    for n, d in ((2 * _DRAWN + 3, 5), (3 * _DRAWN, 1), (_DRAWN - 1, 3), (2 * _DRAWN - 2, 1)):
        drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(4))
        expected = drawn / drawn.norm(dim=-1, keepdim=True)
        for low, high in ((0, n), (n // 3, n // 2), (n - 7, n)):
            draw = torch.Generator().manual_seed(4)
            found = first_directions(torch.zeros(1, d), n, Objective(), draw, place=slice(low, high))
            assert torch.equal(found, expected[low:high])


def test_ties_and_missing_candidates_are_chosen_alike_everywhere() -> None:
    # The first process has too few, the second ties with the third: of equal ones the first by process count.
    scores = [torch.tensor([5.0]), torch.tensor([3.0, 3.0, 1.0]), torch.tensor([3.0, 4.0]), torch.empty(0)]

    def work(across: Across) -> tuple[list[bool], list[bool]]:
        mine = scores[across.every.rank]
        return across.largest(mine, 4).tolist(), across.best(mine[None], 3)[0].tolist()

    found = together(1, 4, work)
    assert [chosen for chosen, _ in found] == [[True], [True, True, False], [False, True], []]
    assert [chosen for _, chosen in found] == [[True], [True, False, False], [False, True], []]
    assert together(2, 1, lambda a: a.largest(torch.zeros(2), 0).tolist()) == [[False, False]] * 2
    assert together(2, 1, lambda a: a.largest(torch.zeros(2), 9).tolist()) == [[True, True]] * 2


def test_what_cannot_be_split_is_refused_with_the_reason() -> None:
    refused: list[tuple[str, dict[str, Any], tuple[int, int], str]] = [
        ("feature_choice", {}, (2, 1), "all tokens of a batch"),
        ("batchtopk", {"aux": "zipf"}, (1, 2), "usage"),
        ("topk", {}, (1, 3), "multiple of"),
    ]
    for kind, settings, ways, reason in refused:
        with pytest.raises(ConfigError, match=reason):
            make(kind, **settings).check_split(*ways)
        make(kind, **settings).check_split(1, 1)
    make("batchtopk", aux="zipf").check_split(2, 1)


def test_every_tensor_of_a_dictionary_has_its_latents_where_it_is_said() -> None:
    for kind, form in SPLIT:
        made = make(kind, form, d_sae=36)
        for name, value in made.state_dict().items():
            axis = latent_axis(name)
            assert [n == 36 for n in value.shape] == [i == axis for i in range(value.ndim)], (kind, name)


def test_a_process_alone_calls_nobody() -> None:
    x = torch.ones(3)
    assert ALONE.over_latents(x) is x and ALONE.alike(x) is x and ALONE.tokens.sum(x) is x
    assert ALONE.part(0, x) is x
    assert replace(ALONE).alone
