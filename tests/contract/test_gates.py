"""Gates: the forward decides row by row whether an edit acts; decisions belong to the run, and nobody else's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.conditional import Gated, KeepNorm
from interp.core.direction import Direction
from interp.core.errors import ConfigError, HookError, InterpError, ShapeError, SiteError, WhereError
from interp.core.gate import Gate
from interp.core.intervention import Ablate, Add, Edit, Intervention, Project
from interp.core.passes import frame_of
from interp.core.place import Place
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from tests.families import manager, paddings, tokens

D = 32
DRAW = torch.Generator().manual_seed(5)
CONDITION, VECTOR = torch.randn(D, generator=DRAW), 3 * torch.randn(D, generator=DRAW)
WRONG: Any = 3
FAMILIES = ["GPT2", "Llama", "GPTNeoX", "Falcon", "Gemma2", "Qwen3"]

SOME = [n if n in ("GPT2", "Llama", "Gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
"""The same, most of them in the slow tests: what takes longer than a few forwards."""


def add(site: str = "1.resid_post", **more: Any) -> Add:
    return Add(site, VECTOR, **more)


def gate(site: str = "0.resid_post", threshold: float | None = None, **more: Any) -> Gate:
    return Gate(site, CONDITION, 0.0 if threshold is None else threshold, **more)


def _ids(out: Run) -> Tensor:
    assert out.tokens is not None
    return out.tokens


def halfway(name: str, ids: Tensor, given: Gate) -> Gate:
    """The same gate with a threshold that opens it for half of the rows, so that a test has both kinds."""
    from dataclasses import replace

    scores = manager(name).run(ids, write=[Gated(add("1.mlp_out"), given)]).gates[given].score
    return replace(given, threshold=float(scores.sort().values[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean()))


@pytest.mark.parametrize("name", FAMILIES)
def test_open_rows_are_steered_and_closed_rows_are_the_model_s_own_bits(name: str) -> None:
    hm, ids = manager(name), tokens(4)
    g = halfway(name, ids, gate())
    out = hm.run(ids, write=[Gated(add(), g)])
    opened = out.gates[g].open
    assert int(opened.sum()) == 2
    x = hm.run(ids, read=["0.resid_post"])["0.resid_post"]
    by_hand = x.mean(1) @ (CONDITION / CONDITION.norm())
    torch.testing.assert_close(out.gates[g].score, by_hand)
    assert torch.equal(opened, by_hand > g.threshold)
    plain, steered = hm.run(ids).logits, hm.run(ids, write=[add()]).logits
    assert torch.equal(out.logits[~opened], plain[~opened]) and torch.equal(out.logits[opened], steered[opened])
    assert any("open in 2 of 4 rows" in note for note in out.notes)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("once", ["prompt", "step"])
def test_a_gate_decides_the_same_with_and_without_a_cache(name: str, once: str) -> None:
    hm, ids = manager(name), tokens(4, 6)
    g = halfway(name, ids, gate(once=once))
    found = [
        hm.generate(
            ids,
            max_new_tokens=6,
            use_cache=cached,
            read=["1.resid_post"],
            write=[Gated(add(), g)],
            generation_kwargs={"eos_token_id": -1},
        )
        for cached in (True, False)
    ]
    torch.testing.assert_close(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0]["1.resid_post"], found[1]["1.resid_post"], atol=1e-4, rtol=1e-4)
    positions = [out.gates[g].positions for out in found]
    if once == "step":
        assert positions[0] is not None and positions[1] is not None
        assert positions[0].shape == (4, 11) and torch.equal(positions[0], positions[1])
        assert torch.equal(positions[0][:, :6], found[0].gates[g].open[:, None].expand(-1, 6))
        assert 0 < int(positions[0][:, 6:].sum()) < positions[0][:, 6:].numel()
    else:
        assert positions == [None, None]
        for row in range(4):  # what the prompt decided holds to the end
            is_open = bool(found[0].gates[g].open[row])
            alone = hm.generate(
                ids[row : row + 1],
                max_new_tokens=6,
                read=["1.resid_post"],
                write=[add()] if is_open else [],
                generation_kwargs={"eos_token_id": -1},
            )
            assert _ids(alone)[0].tolist() == _ids(found[0])[row].tolist()
            torch.testing.assert_close(alone["1.resid_post"][0], found[0]["1.resid_post"][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "max", "last"])
def test_a_padded_row_decides_as_the_row_alone(reduce: str) -> None:
    hm, ids = manager("Llama"), tokens(3)
    g = gate(reduce=reduce, where=Where(pos=slice(1, None)))
    alone = hm.run(ids[:1, :-4], write=[Gated(add(), g)]).gates[g].score
    for _, padded, mask in paddings(ids):
        out = hm.run(padded, mask=mask, write=[Gated(add(), g)])
        torch.testing.assert_close(out.gates[g].score[:1], alone, atol=1e-5, rtol=1e-5)
    x = hm.run(ids[:1, :-4], read=["0.resid_post"])["0.resid_post"][0, 1:] @ (CONDITION / CONDITION.norm())
    torch.testing.assert_close(alone[0], {"mean": x.mean(), "max": x.max(), "last": x[-1]}[reduce])


def test_kinds_of_score_are_their_formulas() -> None:
    h = torch.randn(5, D)
    c = CONDITION
    torch.testing.assert_close(gate().scores(h), h @ c / c.norm())
    torch.testing.assert_close(gate(kind="cosine").scores(h), torch.cosine_similarity(h, c.expand(5, -1)))
    p = torch.outer(c, c) / (c @ c)
    wanted = torch.cosine_similarity(h, torch.tanh(h @ p.T))
    torch.testing.assert_close(gate(kind="cast").scores(h), wanted)
    turned = Gate("0.resid_post", -c, kind="cast").scores(h)
    torch.testing.assert_close(turned, wanted)  # it does not tell c from −c
    d = Direction.of(manager("Llama"), {"0.resid_post": c})
    torch.testing.assert_close(Gate("0.resid_post", d).scores(h), gate().scores(h))
    torch.testing.assert_close(Gate("0.resid_post", lambda x: x[..., 3]).scores(h), h[:, 3])
    heads = torch.randn(2, 6, 4, 8)
    v = torch.randn(4, 8)
    torch.testing.assert_close(Gate("0.z", v).scores(heads), (heads * v / v.norm()).sum((-1, -2)))


def test_each_position_may_decide_for_itself() -> None:
    hm, ids = manager("Llama"), tokens(3)
    g = gate("1.resid_post", reduce="each", once="step")
    out = hm.run(ids, read=["1.resid_post"], write=[Gated(add(), g)])
    x = hm.run(ids, read=["1.resid_post"])["1.resid_post"]
    opened = (x @ CONDITION) > 0
    assert 0 < int(opened.sum()) < opened.numel() and torch.equal(out.gates[g].positions, opened)
    assert torch.equal(out["1.resid_post"], torch.where(opened[..., None], x + VECTOR, x))


def test_a_gate_below_its_threshold_opens_the_others() -> None:
    hm, ids = manager("Llama"), tokens(4)
    above = halfway("Llama", ids, gate())
    below = Gate(above.site, CONDITION, above.threshold, above=False)
    out = hm.run(ids, write=[Gated(add(), above), Gated(add("2.mlp_out"), below)])
    assert torch.equal(out.gates[above].open, ~out.gates[below].open)


def test_several_gates_are_joined_by_all_or_any() -> None:
    hm, ids = manager("Llama"), tokens(4)
    a, b = halfway("Llama", ids, gate()), halfway("Llama", ids, Gate("0.resid_pre", VECTOR))
    plain, steered = hm.run(ids).logits, hm.run(ids, write=[add()]).logits
    edits = {"all": Gated(add(), [a, b]), "any": Gated(add(), [a, b], when="any")}
    edits["nested"] = Gated(Gated(add(), a), b)
    for when, edit in edits.items():
        out = hm.run(ids, write=[edit])
        x, y = out.gates[a].open, out.gates[b].open
        on = x | y if when == "any" else x & y
        assert torch.equal(out.logits, torch.where(on[:, None, None], steered, plain)), when
    assert x.tolist() != y.tolist()


def test_a_gate_after_its_edits_is_decided_by_a_forward_of_the_prompt_without_them() -> None:
    hm, ids = manager("Llama"), tokens(4)
    late = halfway("Llama", ids, gate("2.resid_post"))
    write = [Gated(add("*.resid_post"), late)]
    x = hm.run(ids, read=["2.resid_post"])["2.resid_post"].mean(1) @ (CONDITION / CONDITION.norm())
    whole, parts = hm.run(ids, write=write), hm.run(ids, write=write, batch_size=3)
    for out in (whole, parts):
        torch.testing.assert_close(out.gates[late].score, x)
    torch.testing.assert_close(whole.logits, parts.logits)
    made = [
        hm.generate(rows, max_new_tokens=4, write=write, generation_kwargs={"eos_token_id": -1})
        for rows in (ids, [r.tolist()[k:] for k, r in enumerate(ids)])
    ]
    torch.testing.assert_close(made[0].gates[late].score, x, atol=1e-5, rtol=1e-5)
    assert _ids(made[0])[0].tolist() == _ids(made[1])[0].tolist()
    with pytest.raises(SiteError, match=r"2\.resid_post comes after the edit at 0\.resid_post"):
        hm.run(ids, write=[Gated(add("0.resid_post"), gate("2.resid_post", once="step"))])
    with pytest.raises(HookError, match=r"2\.resid_post comes after"), hm.hooked(write=write):
        hm.model(ids)


def test_a_split_batch_decides_as_the_whole() -> None:
    hm, ids = manager("Llama"), tokens(5)
    g = halfway("Llama", ids, gate())
    whole, parts = (hm.run(ids, write=[Gated(add(), g)], batch_size=n) for n in (None, 2))
    assert torch.equal(whole.gates[g].open, parts.gates[g].open) and len(parts.gates[g].open) == 5
    torch.testing.assert_close(whole.logits, parts.logits)


def test_one_gate_in_two_models_and_a_run_within_a_run_keeps_its_decisions_apart() -> None:
    here, there = manager("Llama"), manager("Qwen3")
    ids, other = tokens(2), tokens(2, seed=9)
    g = gate()
    write = [Gated(add(), g)]
    wanted = {hm.name: hm.run(ids, write=write) for hm in (here, there)}
    inner: list[Any] = []

    def meanwhile(x: Tensor) -> Tensor:
        inner.append(there.run(other, write=write).gates[g].score)
        return x + 0.01

    out = here.run(ids, write=[Edit("0.mlp_out", meanwhile), *write])
    fresh = here.run(ids, write=[Add("0.mlp_out", torch.full((D,), 0.01)), *write])
    torch.testing.assert_close(out.gates[g].score, fresh.gates[g].score)
    torch.testing.assert_close(inner[0], there.run(other, write=write).gates[g].score)
    torch.testing.assert_close(here.run(ids, write=write).gates[g].score, wanted[here.name].gates[g].score)
    assert not [k for k in vars(g) if k not in set(g.__dataclass_fields__)]


def test_hooked_decides_anew_for_every_prompt() -> None:
    hm, ids = manager("Llama"), tokens(3)
    g = gate()
    with hm.hooked(write=[Gated(add(), g)]) as out:
        hm.model(ids)
        first = out.gates[g].score
        hm.model(ids.flip(0))
        second = out.gates[g].score
    torch.testing.assert_close(first.flip(0), second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("make_edit", [add, lambda s: Project(s, VECTOR), lambda s: Add(s, VECTOR, where=Where(pos=2))])
def test_keep_norm_turns_and_does_not_stretch(name: str, make_edit: Callable[[str], Intervention]) -> None:
    hm, ids, site = manager(name), tokens(2), "1.resid_post"
    base = hm.run(ids, read=[site])[site]
    plain = hm.run(ids, read=[site], write=[make_edit(site)])[site]
    kept = hm.run(ids, read=[site], write=[KeepNorm(make_edit(site))])[site]
    torch.testing.assert_close(kept.norm(dim=-1), base.norm(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.cosine_similarity(kept, plain, dim=-1), torch.ones(2, ids.shape[1]))
    assert (kept - base).abs().max() > 0.1


def test_keep_norm_is_of_each_head_and_leaves_zeros_zero() -> None:
    hm, ids = manager("Llama"), tokens(2)
    v = torch.randn(4, 8)
    base = hm.run(ids, read=["1.z"])["1.z"]
    kept = hm.run(ids, read=["1.z"], write=[KeepNorm(Add("1.z", v, where=Where(head=2)))])["1.z"]
    torch.testing.assert_close(kept.norm(dim=-1), base.norm(dim=-1))
    assert torch.equal(kept[:, :, [0, 1, 3]], base[:, :, [0, 1, 3]]) and not torch.equal(kept[:, :, 2], base[:, :, 2])
    gone = hm.run(ids, read=["1.mlp_out"], write=[KeepNorm(Ablate("1.mlp_out"))])["1.mlp_out"]
    assert not gone.any()


def test_wrappers_stack_and_expand_globs() -> None:
    hm, ids = manager("Llama"), tokens(4)
    g = halfway("Llama", ids, gate("0.resid_pre"))
    write = [KeepNorm(Gated(add("*.mlp_out", where=Where(pos=-1)), g))]
    out = hm.run(ids, read=["*.mlp_out"], write=write)
    base = hm.run(ids, read=["*.mlp_out"])
    opened = out.gates[g].open
    moved = (out["0.mlp_out"] - base["0.mlp_out"]).abs().amax(-1) > 1e-4
    assert torch.equal(moved[:, -1], opened) and not moved[:, :-1].any()
    torch.testing.assert_close(out["0.mlp_out"].norm(dim=-1), base["0.mlp_out"].norm(dim=-1))


def test_a_dose_of_zero_warns_of_nothing_and_a_silent_edit_still_does() -> None:
    hm, ids = manager("Llama"), tokens(2)
    d = Direction.of(hm, {"1.resid_post": VECTOR})
    assert torch.equal(hm.run(ids, write=d.as_interventions(0.0)).logits, hm.run(ids).logits)  # warnings are errors
    hm.run(ids, write=[KeepNorm(e) for e in d.as_interventions(torch.zeros(2))])
    with pytest.warns(UserWarning, match="changed nothing"):
        hm.run(ids, write=[Add("1.resid_post", VECTOR * 0)])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: Gate("*.resid_post", CONDITION), SiteError),
        (lambda: Gate("0.pattern", CONDITION), SiteError),
        (lambda: Gate("logits", CONDITION), SiteError),
        (lambda: Gate("0.rot_k", CONDITION), SiteError),
        (lambda: gate(kind="sine"), ConfigError),
        (lambda: gate(reduce="median"), ConfigError),
        (lambda: gate(once="always"), ConfigError),
        (lambda: gate(reduce="each"), ConfigError),
        (lambda: gate(where=Where.generated()), WhereError),
        (lambda: Gate("0.resid_post", torch.zeros(D)), ShapeError),
        (lambda: Gate("0.resid_post", torch.ones(4, D)), ShapeError),
        (lambda: Gate("0.resid_post", "angry"), ShapeError),
        (lambda: Gated(add(), []), ConfigError),
        (lambda: Gated(add(), [WRONG]), ConfigError),
        (lambda: Gated(add(), gate(), when="most"), ConfigError),
        (lambda: Gated(WRONG, gate()), ShapeError),
        (lambda: KeepNorm(WRONG), ShapeError),
        (lambda: manager("Llama").run(tokens(), write=[Gated(add(), gate("9.resid_post"))]), SiteError),
        (lambda: manager("Llama").run(tokens(), write=[Gated(add(), Gate("0.resid_post", CONDITION[:4]))]), ShapeError),
        (lambda: manager("Llama").run(tokens(), write=[Gated(add(), Gate("0.mlp_out", lambda x: x))]), ShapeError),
        (lambda: manager("Llama").run(tokens(), write=[Gated(add(), gate(where=Where(tokens=119)))]), WhereError),
        (
            lambda: manager("Llama").generate(
                tokens(), write=[Gated(Add("1.rot_k", torch.ones(8)), gate(once="step"))], max_new_tokens=1
            ),
            SiteError,
        ),
    ],
)
def test_what_cannot_be_decided_is_refused(call: Callable[[], Any], kind: type[InterpError]) -> None:
    with pytest.raises(kind):
        call()


def test_an_edit_whose_gate_has_not_been_read_says_so() -> None:
    """In a parallel block the order of the two branches is the model's own business."""
    place = Place(Site("0.mlp_out"), frame_of(manager("Llama").to_tokens(tokens()), 0, 2), Where())
    with pytest.raises(HookError, match=r"gate at 0\.attn_out had not been read when the edit at 0\.mlp_out ran"):
        Gated(add("0.mlp_out"), gate("0.attn_out")).edit(torch.zeros(2, 12, D), place)
