"""Steering acts the same however it is run: cached or not, batched or alone, padded or not, saved and loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction, Dose, SiteScale
from interp.core.errors import ModelError
from interp.core.intervention import Edit, Intervention
from interp.core.place import Place
from interp.core.where import Where
from tests.contract import plain
from tests.families import make, manager, paddings, tokens

FAMILIES = ["GPT2", "Llama", "GPTNeoX", "Falcon", "Gemma2", "Qwen3", "Olmo2", "Phi"]
"""Blocks that return tuples and ones that return tensors, parallel ones, post-norms, GQA, left and right."""

SOME = [n if n in ("GPT2", "Llama", "Gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
"""The same, most of them in the slow tests: what takes longer than a few forwards."""

SITE, D = "1.resid_post", 32
END = {"eos_token_id": -1}
"""The whole continuation is wanted: a random model may well emit the end token."""


def direction(name: str, *sites: str, seed: int = 1) -> Direction:
    """A random one, with a scale."""
    draw = torch.Generator().manual_seed(seed)
    made = Direction.of(manager(name), {s: torch.randn(D, generator=draw) for s in sites or (SITE,)})
    return replace(made, scale=dict.fromkeys(made.sites, SiteScale(rms=5.0, sigma=2.0)))


def by_hook(name: str, layer: int, edit: Callable[[Tensor], Tensor], ids: Tensor, **inputs: Any) -> Tensor:
    """The plain model's logits with one block's output changed by a hook of torch."""
    model = make(name)
    block = model.get_submodule(f"{plain.LAYOUTS[name].blocks}.{layer}")

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = block.register_forward_hook(hook)
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False, **inputs).logits
    handle.remove()
    return logits


def test_the_families_hold_blocks_of_both_kinds() -> None:
    found = {}
    for name in FAMILIES:
        model = make(name)
        kinds: list[bool] = []
        block = model.get_submodule(f"{plain.LAYOUTS[name].blocks}.1")
        block.register_forward_hook(lambda m, a, out, kinds=kinds: kinds.append(isinstance(out, tuple)))
        with torch.no_grad():
            model(tokens(1, 2))
        found[name] = kinds[0]
    assert set(found.values()) == {True, False}, found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("operation", ["add", "ablate", "set"])
def test_logits_equal_a_manual_edit(name: str, operation: str) -> None:
    hm, ids, d = manager(name), tokens(3), direction(name)
    v, u = d[SITE], d[SITE] / d[SITE].norm()
    dose: Any = 1.0 if operation == "ablate" else Dose(1.5, "sigma")
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "add": lambda x: x + 3.0 * v / v.norm(),
        "ablate": lambda x: x - (x @ u)[..., None] * u,
        "set": lambda x: x - (x @ u)[..., None] * u + 3.0 * u,
    }
    wanted = by_hook(name, 1, formulas[operation], ids)
    got = hm.run(ids, write=d.as_interventions(dose, operation=operation)).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - hm.run(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", SOME)
def test_padding_on_either_side_and_company_change_nothing(name: str) -> None:
    hm, ids = manager(name), tokens(3)
    where = Where(pos=slice(2, -1))
    write = direction(name, "0.resid_post", SITE).as_interventions(
        Dose(torch.tensor([1.0, -2.0, 0.5]), "rms"), where=where
    )
    for side, padded, mask in paddings(ids):
        out = hm.run(padded, mask=mask, write=write).logits
        for row in range(3):
            one = direction(name, "0.resid_post", SITE).as_interventions(
                Dose((1.0, -2.0, 0.5)[row], "rms"), where=where
            )
            alone = hm.run(padded[row : row + 1][:, mask[row]], write=one).logits[0]
            torch.testing.assert_close(out[row][mask[row]], alone, atol=1e-4, rtol=1e-4, msg=f"{side} row {row}")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_and_its_opposite_a_zero_and_a_second_ablation_change_nothing(name: str) -> None:
    hm, ids, d = manager(name), tokens(2), direction(name, "0.resid_post", SITE)
    base = hm.run(ids).logits
    assert torch.equal(hm.run(ids, write=d.as_interventions(0.0)).logits, base)
    both = hm.run(ids, write=[*d.as_interventions(2.0), *(-d).as_interventions(2.0)]).logits
    torch.testing.assert_close(both, base, atol=1e-4, rtol=1e-4)
    gone = d.as_interventions(operation="ablate")
    once, twice = (hm.run(ids, read=[SITE], logits="all", write=[*gone, *more]) for more in ([], _quiet(gone)))
    torch.testing.assert_close(twice.logits, once.logits, atol=1e-4, rtol=1e-4)
    u = d.unit(SITE)
    assert float((once[SITE] @ u).abs().max()) < 1e-4
    assert (once.logits - base).abs().max() > 1e-2


@dataclass(frozen=True, eq=False)
class Quiet(Intervention):
    """An edit that may do nothing."""

    inner: Any = None

    @property
    def may_do_nothing(self) -> bool:
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        out: Tensor = self.inner.edit(x, place)
        return out


def _quiet(edits: list[Intervention]) -> list[Intervention]:
    return [Quiet(e.site, e) for e in edits]


@dataclass(frozen=True, eq=False)
class Counter(Intervention):
    """Adds a vector, and notes by its selection which (row, column) it was made at."""

    vector: Any = None
    where: Where = field(default_factory=Where)
    seen: list[Any] = field(default_factory=list)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        chosen = place.select(x)
        first = place.frame.offset
        grid = torch.ones(x.shape[:2], dtype=torch.bool) if chosen is None else chosen[..., 0].expand(x.shape[:2])
        self.seen.extend((r, c + first) for r, c in grid.nonzero().tolist())
        return x + self.vector


ROW = tokens(2, 6, seed=8)
WHERES: dict[str, tuple[Where, Callable[[list[int]], set[int]]]] = {
    "all": (Where(), lambda ids: set(range(17))),
    "generated": (Where.generated(), lambda ids: set(range(6, 17))),
    "answer": (Where.last_prompt() | Where.generated(), lambda ids: set(range(5, 17))),
    "prompt": (Where.prompt(), lambda ids: set(range(6))),
    "negative": (Where(pos=[-1, -3]), lambda ids: {5, 3}),
    "window": (Where(pos=slice(4, 9)), lambda ids: set(range(4, 9))),
    "far": (Where(pos=[2, 8, 11]), lambda ids: {2, 8, 11}),
    "token": (Where(tokens=int(ROW[0, 2])), lambda ids: {c for c, i in enumerate(ids[:17]) if i == int(ROW[0, 2])}),
    "token in the answer": (
        Where(tokens=list(range(60)), phase="generated"),
        lambda ids: {c for c, i in enumerate(ids[:17]) if i < 60 and c >= 6},
    ),
}


@pytest.mark.parametrize("name", SOME)
def test_exactly_the_named_positions_are_edited_with_and_without_a_cache(name: str) -> None:
    hm, runs = manager(name), []
    for cached in (True, False):
        counters = {case: Counter(SITE, direction(name)[SITE], where) for case, (where, _) in WHERES.items()}
        write = list(counters.values())
        out = hm.generate(
            ROW, max_new_tokens=12, use_cache=cached, read=["0.resid_post", SITE], write=write, generation_kwargs=END
        )
        assert out.tokens is not None
        for case, (_, columns) in WHERES.items():
            wanted = {(r, c) for r in range(2) for c in columns(out.tokens[r].tolist())}
            assert set(counters[case].seen) == wanted and wanted, case
            # With a cache each place is visited once.
            assert len(counters[case].seen) == len(wanted) or not cached, case
        runs.append(out)
    assert runs[0].tokens is not None and runs[1].tokens is not None
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    torch.testing.assert_close(runs[0][SITE], runs[1][SITE], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_batch_generates_as_its_rows(name: str) -> None:
    hm, d = manager(name), direction(name, "0.resid_post", SITE)
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (4, 7, 5)]
    doses = [1.0, -1.0, 2.0]
    where = Where.last_prompt() | Where.generated()
    extra: dict[str, Any] = {"max_new_tokens": 5, "read": [SITE], "generation_kwargs": END}
    both = hm.generate(rows, write=d.as_interventions(torch.tensor(doses), where=where), **extra)
    for i, (row, dose) in enumerate(zip(rows, doses, strict=True)):
        alone = hm.generate([row], write=d.as_interventions(dose, where=where), **extra)
        assert both.tokens is not None and alone.tokens is not None
        n = len(row) + 5
        assert both.tokens[i, -n:].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(both[SITE][i, 1 - n :], alone[SITE][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_on_the_model(name: str, tmp_path: Path) -> None:
    hm, ids, d = manager(name), tokens(2), direction(name)
    base = hm.run(ids).logits
    loaded = Direction.load(d.save(tmp_path / "d.safetensors"))
    steered = [hm.run(ids, write=one.as_interventions(Dose(1.0, "rms"))).logits for one in (d, loaded)]
    assert torch.equal(*steered) and not torch.equal(steered[0], base)

    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError("in the middle")

    for call in (hm.run, hm.generate):
        with pytest.raises(ArithmeticError):
            call(ids, write=[*d.as_interventions(), Edit("1.mlp_out", fails)])
    assert not [m for m in hm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(hm.run(ids).logits, base)


def test_two_models_do_not_interfere() -> None:
    one, two, ids = manager("Llama"), manager("GPT2"), tokens(2)
    a, b = direction("Llama").as_interventions(2.0), direction("GPT2").as_interventions(2.0)
    alone = one.run(ids, write=a).logits, two.run(ids, write=b).logits
    inner: list[Tensor] = []

    def meanwhile(x: Tensor) -> Tensor:
        inner.append(two.run(ids, write=b).logits)
        return x * 1.0

    with pytest.warns(UserWarning, match="Edit at 0.mlp_out changed nothing"):
        together = one.run(ids, write=[Edit("0.mlp_out", meanwhile), *a]).logits
    assert torch.equal(together, alone[0]) and torch.equal(inner[0], alone[1])
    with one.hooked(write=a):
        torch.testing.assert_close(two.run(ids, write=b).logits, alone[1])
        with torch.no_grad():
            torch.testing.assert_close(one.model(ids).logits, alone[0])


def test_a_direction_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="fit one on it"):
        direction("Llama").check(manager("Qwen3"))
    direction("Llama").check(manager("Llama"))
