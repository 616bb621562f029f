"""A direction per row, and latents clamped as deltas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.conditional import KeepNorm
from interp.core.direction import Direction, Dose, SiteScale
from interp.core.errors import ConfigError, DataError, InterpError, ShapeError
from interp.core.intervention import Add
from interp.core.run import Run
from interp.core.where import Where
from interp.dictionaries.options import DictionaryOptions
from interp.steering.acting.clamp import ClampLatents, LatentClamp, clamp_latents
from interp.steering.acting.rowwise import rowwise
from tests.families import manager, tokens

SITE, D = "1.resid_post", 32
SCALE = SiteScale(rms=4.0, sigma=2.0)


def directions(name: str = "Llama") -> list[Direction]:
    """Four of them at one or two sites, adding, ablating and setting."""
    hm, draw = manager(name), torch.Generator().manual_seed(2)

    def one(*sites: str, operation: str = "add") -> Direction:
        from dataclasses import replace

        made = Direction.of(hm, {s: torch.randn(D, generator=draw) for s in sites}, operation=operation)
        return replace(made, scale=dict.fromkeys(sites, SCALE))

    return [one(SITE), one("0.mlp_out", SITE), one(SITE, operation="ablate"), one(SITE, operation="set")]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_each_row_is_steered_as_it_would_be_alone(name: str) -> None:
    hm, (a, b, gone, put), ids = manager(name), directions(name), tokens(6)
    steers: list[Any] = [a, None, b, gone, put, [a, b]]
    doses: list[Any] = [2.0, 1.0, Dose(-1.5, "sigma"), 1.0, Dose(0.5, "rms"), 3.0]
    out = hm.run(ids, write=rowwise(steers, doses))
    split = hm.run(ids, write=rowwise(steers, doses), batch_size=4)
    torch.testing.assert_close(out.logits, split.logits)
    plain = hm.run(ids).logits
    for row, (steer, dose) in enumerate(zip(steers, doses, strict=True)):
        several = [] if steer is None else steer if isinstance(steer, list) else [steer]
        alone = hm.run(ids[row : row + 1], write=[e for s in several for e in s.as_interventions(dose)]).logits[0]
        torch.testing.assert_close(out.logits[row], alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(out.logits[row], plain[row]) == (steer is None)


def _ids(out: Run) -> Tensor:
    assert out.tokens is not None
    return out.tokens


def test_rows_generate_as_they_would_alone() -> None:
    hm, (a, b, *_), ids = manager("Llama"), directions(), tokens(3, 5)
    where = Where.last_prompt() | Where.generated()
    extra: dict[str, Any] = {"max_new_tokens": 5, "read": [SITE], "generation_kwargs": {"eos_token_id": -1}}
    out = hm.generate(ids, write=rowwise([a, b, None], 3.0, where=where), **extra)
    for row, steer in enumerate((a, b, None)):
        write = [] if steer is None else steer.as_interventions(3.0, where=where)
        alone = hm.generate(ids[row : row + 1], write=write, **extra)
        assert _ids(alone)[0].tolist() == _ids(out)[row].tolist()
        torch.testing.assert_close(alone[SITE][0], out[SITE][row], atol=1e-4, rtol=1e-4)


def test_added_vectors_are_one_edit_a_site() -> None:
    a, b, *_ = directions()
    edits = rowwise([a, b, a], [1.0, 2.0, 3.0])
    assert sorted(str(e.site) for e in edits) == ["0.mlp_out", SITE]
    (one,) = [e for e in edits if e.site == SITE]
    assert isinstance(one, Add) and one.vector.shape == (3, D) and one.where == Where()


def test_vectors_on_one_position_sum_and_none_is_dropped() -> None:
    hm, (a, b, *_), ids = manager("Llama"), directions(), tokens(2)
    x = hm.run(ids, read=[SITE])[SITE]
    both = hm.run(ids, read=[SITE], write=[*a.as_interventions(2.0), *b.at(SITE).as_interventions(-1.0)])[SITE]
    torch.testing.assert_close(both, x + 2 * a[SITE] - b[SITE])
    summed = hm.run(ids, read=[SITE], write=(2 * a - b.at(SITE)).as_interventions())[SITE]
    torch.testing.assert_close(both, summed)
    rows = hm.run(ids, read=[SITE], write=rowwise([[a, a, b.at(SITE)], None]))[SITE]
    torch.testing.assert_close(rows[0], x[0] + 2 * a[SITE] + b[SITE])
    assert torch.equal(rows[1], x[1])


def test_one_row_is_one_row() -> None:
    hm, (a, *_), ids = manager("Llama"), directions(), tokens(1)
    wanted = hm.run(ids, write=a.as_interventions()).logits
    assert torch.equal(hm.run(ids, write=rowwise([a])).logits, wanted)


class _Kept:
    """Steers by a wrapped edit."""

    def as_interventions(self, dose: Any = 1.0, *, where: Where | None = None) -> list[Any]:
        return [KeepNorm(e) for e in directions()[0].as_interventions(dose, where=where)]


def test_wrapped_edits_are_made_for_their_row() -> None:
    hm, ids = manager("Llama"), tokens(2)
    out = hm.run(ids, write=rowwise([None, _Kept()], 2.0)).logits
    assert torch.equal(out[0], hm.run(ids).logits[0])
    torch.testing.assert_close(out[1], hm.run(ids, write=_Kept().as_interventions(2.0)).logits[1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: rowwise(directions()[:2], [1.0]), ConfigError),
        (lambda: rowwise([None, None]), DataError),
        (lambda: rowwise([]), DataError),
        (lambda: rowwise(directions()[:1], where=Where(rows=0)), ConfigError),
        (lambda: rowwise(directions()[:1], [Dose(torch.ones(1))]), ConfigError),
        (lambda: manager("Llama").run(tokens(3), write=rowwise(directions()[:2])), ShapeError),
    ],
)
def test_rows_that_do_not_line_up_are_refused(call: Callable[[], Any], kind: type[InterpError]) -> None:
    with pytest.raises(kind):
        call()


# -- latents --------------------------------------------------------------------------------------------------------


class Whitened:
    """A dictionary of what is left after a mean and a scale of each position, as normalised ones are."""

    d_sae = 64

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(4)
        self.w_enc, self.w_dec = (torch.randn(*shape, generator=draw) / 5 for shape in ((D, 64), (64, D)))

    def encode(self, x: Tensor) -> Tensor:
        return ((x / x.norm(dim=-1, keepdim=True)) @ self.w_enc).relu()

    def decode(self, z: Tensor) -> Tensor:
        raise AssertionError("what latents stand for depends on the activation")

    def reconstructed(self, z: Tensor, x: Tensor) -> Tensor:
        return (z @ self.w_dec) * x.norm(dim=-1, keepdim=True)


def sae() -> Any:
    """A random dictionary, far from perfect."""
    made: Any = DictionaryOptions(kind="standard", form="sae", d_sae=64).make(D, D)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 4)
    return made.requires_grad_(False)


@pytest.mark.parametrize("mode", ["set", "add", "scale", "zero"])
def test_a_clamp_adds_what_the_latents_change_stands_for_and_no_more(mode: str) -> None:
    hm, ids, dictionary = manager("Llama"), tokens(3), sae()
    x = hm.run(ids, read=[SITE])[SITE]
    values: dict[int, Any] = {5: 2.0, 9: torch.tensor([0.0, 1.0, -3.0])}
    out = hm.run(ids, read=[SITE], write=clamp_latents(dictionary, values, SITE, mode=mode))[SITE]
    with torch.no_grad():
        z = dictionary.encode(x)
        new = z.clone()
        for latent, value in ((5, torch.full((3, 1), 2.0)), (9, torch.tensor([[0.0], [1.0], [-3.0]]))):
            old = z[..., latent]
            new[..., latent] = {"set": value.expand_as(old), "add": old + value, "scale": old * value, "zero": old * 0}[
                mode
            ]
        wanted = (new - z) @ dictionary.W_dec
    torch.testing.assert_close(out - x, wanted, atol=2e-5, rtol=1e-5)
    assert wanted.abs().max() > 0.05
    parts = hm.run(ids, read=[SITE], write=clamp_latents(dictionary, values, SITE, mode=mode), batch_size=2)[SITE]
    torch.testing.assert_close(parts, out)


def test_a_latent_clamped_to_its_own_value_changes_no_bit() -> None:
    hm, ids, dictionary = manager("Llama"), tokens(2, 1), sae()
    x = hm.run(ids, read=[SITE])[SITE]
    own = dictionary.encode(x)[:, 0].detach()
    latent = int((own > 0).all(0).nonzero()[0, 0])
    for write in (
        clamp_latents(dictionary, {latent: 0.0}, SITE, mode="add"),
        clamp_latents(dictionary, {latent: 1.0}, SITE, mode="scale"),
    ):
        assert torch.equal(hm.run(ids, read=[SITE], write=write)[SITE], x)
    with pytest.warns(UserWarning, match="changed nothing"):
        same = hm.run(ids, read=[SITE], write=clamp_latents(dictionary, {latent: own[:, latent]}, SITE))[SITE]
    assert torch.equal(same, x)


def test_a_dictionary_whose_latents_depend_on_the_activation_is_asked_itself() -> None:
    hm, ids, dictionary = manager("Llama"), tokens(2), Whitened()
    x = hm.run(ids, read=[SITE])[SITE]
    out = hm.run(ids, read=[SITE], write=clamp_latents(dictionary, {7: 3.0}, SITE))[SITE]
    wanted = (3.0 - dictionary.encode(x)[..., 7:8]) * x.norm(dim=-1, keepdim=True) * dictionary.w_dec[7]
    torch.testing.assert_close(out - x, wanted, atol=1e-4, rtol=1e-4)


def test_clamped_latents_steer_by_a_dose() -> None:
    hm, ids, dictionary = manager("Llama"), tokens(2), sae()
    steer = LatentClamp(dictionary, {7: 3.0}, SITE)
    wanted = hm.run(ids, write=clamp_latents(dictionary, {7: torch.tensor([6.0, -3.0])}, SITE)).logits
    torch.testing.assert_close(hm.run(ids, write=steer.as_interventions(torch.tensor([2.0, -1.0]))).logits, wanted)
    rows = hm.run(ids, write=rowwise([steer, steer], [2.0, -1.0])).logits
    torch.testing.assert_close(rows, wanted)
    with pytest.raises(ConfigError, match="has no unit"):
        steer.as_interventions(Dose(1.0, "rms"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("latents", "mode", "kind"),
    [
        ({}, "set", ConfigError),
        ({64: 1.0}, "set", ConfigError),
        ({-1: 1.0}, "set", ConfigError),
        ({True: 1.0}, "set", ConfigError),
        ({1: float("nan")}, "set", ConfigError),
        ({1: "much"}, "set", ConfigError),
        ({1: torch.ones(2, 2)}, "set", ConfigError),
        ({1: 1.0}, "double", ConfigError),
        ([1, 2], "set", ConfigError),
    ],
)
def test_clamps_that_mean_nothing_are_refused(latents: Any, mode: str, kind: type[InterpError]) -> None:
    with pytest.raises(kind):
        clamp_latents(sae(), latents, SITE, mode=mode)


def test_a_value_per_row_is_for_each_row_of_the_batch() -> None:
    with pytest.raises(ShapeError, match="has 2 values; the batch has 3 rows"):
        manager("Llama").run(tokens(3), write=clamp_latents(sae(), {1: torch.ones(2)}, SITE))
    assert isinstance(clamp_latents(sae(), [1], SITE, mode="zero")[0], ClampLatents)
