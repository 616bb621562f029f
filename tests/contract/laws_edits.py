"""The laws of editing, gradients and generation, as numbers: by how much one family breaks each of them."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.intervention import Ablate, Add, Intervention, Replace
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.where import Where
from tests.contract import plain
from tests.contract.laws import NOT_ROTARY, ROTATED_INSIDE, largest, reading
from tests.families import make, manager, tokens

PER_HEAD = ("q", "k", "v", "z")
RECOMPUTED = ("attn_scores", "pattern", "scale", "normalized")
"""Kinds whose edit puts a layer on another path of computation: equal to rounding, not to the bit."""


def noise(shape: tuple[int, ...] | torch.Size, seed: int = 7) -> Tensor:
    """Seeded standard normal values."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def recomputed(site: Site) -> bool:
    """Whether an edit of the site recomputes its layer by another formula."""
    return site.kind.rsplit(".", 1)[-1] in RECOMPUTED


def _replaced(value: Tensor, columns: list[int]) -> plain.EditFn:
    def edit(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, columns] = value[:, columns]
        return new

    return edit


def _added(vector: Tensor, index: tuple[slice | int, ...]) -> plain.EditFn:
    def edit(x: Tensor) -> Tensor:
        new = x.clone()
        new[index] += vector
        return new

    return edit


def _cases(kind: str, layer: int, shape: torch.Size) -> list[tuple[Intervention, plain.EditFn]]:
    """Edits of the library, each beside the same edit written by hand."""
    site, every = f"{layer}.{kind}", slice(None)
    value, vector = noise(shape), noise(shape[2:], seed=8)
    cases: list[tuple[Intervention, plain.EditFn]] = [
        (Replace(site, value, where=Where(pos=[2, -1])), _replaced(value, [2, shape[1] - 1])),
        (Add(site, vector, scale=1.5, where=Where(rows=1)), _added(1.5 * vector, (1,))),
        (Ablate(site, "zero", where=Where(pos=slice(3, 6))), _replaced(torch.zeros(shape), [3, 4, 5])),
    ]
    if kind in PER_HEAD:
        head = shape[2] - 1
        cases.append((Add(site, vector[head], where=Where(head=head)), _added(vector[head], (every, every, head))))
    return cases


def edits_against_plain(name: str, layer: int = 0) -> float:
    """Edits at every kind that hand-made hooks reach equal those hooks on the plain model, in logits and downstream."""
    hm, model, ids, worst = manager(name), make(name), tokens(), 0.0
    after = ("resid_post", hm.n_layers - 1)
    for kind in plain.kinds(name):
        for ours, theirs in _cases(kind, layer, reading(name).run[kind, layer].shape):
            got = hm.run(ids, read=[f"{after[1]}.{after[0]}"], write=[ours], logits="all")
            want = plain.run(name, model, ids, read=[after], write={(kind, layer): theirs})
            worst = max(worst, largest(got.logits, want.logits), largest(got[after], want.values[after]))
    return worst


def _random_pattern(shape: torch.Size, seed: int = 9) -> Tensor:
    causal = torch.ones(shape[-2:], dtype=torch.bool).tril()
    return (2 * noise(shape, seed)).masked_fill(~causal, -torch.inf).softmax(-1)


def pattern_edits(name: str, layer: int = 0) -> float:
    """Replacing a pattern P, or the scores log P, equals putting P @ v into z by hand."""
    hm, model, ids = manager(name), make(name), tokens()
    pattern = _random_pattern(reading(name).run["pattern", layer].shape)
    v = plain.run(name, model, ids, read=[("v", layer)]).values["v", layer]
    v = v.repeat_interleave(hm.n_heads // hm.n_kv_heads, dim=2)

    def by_hand(weights: Tensor) -> Tensor:
        z = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return plain.run(name, model, ids, write={("z", layer): lambda _: z}).logits

    got = hm.run(ids, write=[Replace(f"{layer}.pattern", pattern)]).logits
    scores = pattern.log().clamp(min=torch.finfo(torch.float32).min)
    sunk = hm.run(ids, write=[Replace(f"{layer}.attn_scores", scores)]).logits
    # GPT-OSS: exp(scores) sums to 1 per row, and the head's sink takes its share of 1 + exp(sink).
    share = 1 / (1 + model.model.layers[layer].self_attn.sinks.exp()).view(-1, 1, 1) if name == "GptOss" else 1.0
    return max(largest(got, by_hand(pattern)), largest(sunk, by_hand(pattern * share)))


def rotary_edits(name: str, layer: int = 0) -> float:
    """Adding to post-rotary queries and keys equals doing so inside the model's own eager attention."""
    hm, ids, worst = manager(name), tokens(), 0.0
    for kind, index in (("rot_q", 1), ("rot_k", 2)):
        vector = 0.5 * noise(reading(name).run[kind, layer].shape[2:])

        def edit(args: list[Tensor], index: int = index, vector: Tensor = vector) -> list[Tensor]:
            args[index] = args[index] + vector[:, None]
            return args

        got = hm.run(ids, write=[Add(f"{layer}.{kind}", vector)]).logits
        worst = max(worst, largest(got, plain.run_patched(name, ids, layer, edit)))
    return worst


@functools.cache
def writable(name: str) -> tuple[list[Site], dict[str, str]]:
    """The sites of a family that take an edit, and the typed refusals of the others."""
    hm, found, refused = manager(name), [], {}
    for site in reading(name).sites:
        try:
            hm.run(tokens(1, 3), write=[Add(site, noise(_features(name, site)))])
        except InterpError as err:
            refused[site.short] = f"{type(err).__name__}: {err}"
        else:
            found.append(site)
    return found, refused


def _features(name: str, site: Site) -> torch.Size | tuple[int, ...]:
    return () if site.axes[-1] == "src" else reading(name).run[site.name].shape[2:]


class Idle(NamedTuple):
    """What edits that should change nothing did change, and the sites where the run did not say so.

    Attributes:
        same: The largest change of logits where the path of computation stays; must be exactly 0.
        rounded: The largest where the layer is recomputed by another formula.
        silent: Sites where nothing changed and `out.notes` does not say so.
    """

    same: float
    rounded: float
    silent: list[str]


def early(name: str) -> list[Site]:
    """Writable sites of the first block and of the whole model: every kind once."""
    return [site for site in writable(name)[0] if not site.layer]


def _idle(name: str, sites: list[Site], edit: Callable[[Site], Intervention]) -> Idle:
    hm, ids, out = manager(name), tokens(), reading(name).run
    same, rounded, silent = 0.0, 0.0, []
    for site in sites:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*changed nothing")
            got = hm.run(ids, write=[edit(site)], logits="all")
        delta = largest(got.logits, out.logits)
        same, rounded = (same, max(rounded, delta)) if recomputed(site) else (max(same, delta), rounded)
        if not recomputed(site) and not any("changed nothing" in note for note in got.notes):
            silent.append(site.short)
    return Idle(same, rounded, silent)


def clean_into_clean(name: str) -> Idle:
    """Patch every writable site with its own clean value."""
    out = reading(name).run
    return _idle(name, writable(name)[0], lambda site: Replace(site, out[site.name]))


def zero_strength(name: str) -> Idle:
    """Add with scale 0 at every writable kind of site."""
    return _idle(name, early(name), lambda site: Add(site, noise(_features(name, site)), scale=0.0))


def reads_see_edits(name: str) -> float:
    """A read of an edited site gives the edited value, and two edits act in list order."""
    hm, ids, out, worst = manager(name), tokens(), reading(name).run, 0.0
    for kind in plain.kinds(name):
        site = f"{hm.n_layers - 1}.{kind}"
        vector = noise(out[site].shape[2:])
        write = [Ablate(site, "zero", where=Where(pos=0)), Add(site, vector), Add(site, vector, scale=-0.5)]
        got = hm.run(ids, read=[site], write=write)[site]
        want = out[site].clone()
        want[:, 0] = 0
        worst = max(worst, largest(got, want + 0.5 * vector))
        got = hm.run(ids, read=[site], write=[*write[1:], write[0]])[site]
        worst = max(worst, largest(got[:, 0], torch.zeros_like(got[:, 0])))
    return worst


def touches_only_where(name: str, layer: int = 0) -> tuple[float, float]:
    """An edit at one row, position and head: the smallest change there, and the largest anywhere it must not reach
    (the rest of the site; the other row and the earlier positions of the logits)."""
    hm, ids, out = manager(name), tokens(), reading(name).run
    inside, outside = float("inf"), 0.0
    for kind in plain.kinds(name):
        site, shape = f"{layer}.{kind}", reading(name).run[kind, layer].shape
        head = shape[2] - 1 if kind in PER_HEAD else None
        vector = 1.0 + noise(shape[-1:]).abs()
        got = hm.run(ids, read=[site], write=[Add(site, vector, where=Where(rows=0, pos=4, head=head))], logits="all")
        change = (got[site] - out[site]).abs()
        there = (0, 4) if head is None else (0, 4, head)
        inside = min(inside, float(change[there].min()))
        change[there] = 0
        logits = (got.logits - out.logits).abs()
        outside = max(outside, float(change.max()), float(logits[1].max()), float(logits[0, :4].max()))
    return inside, outside


def gradients(name: str) -> float:
    """Gradients of a metric at every hand-hooked site equal autograd through the plain model."""
    hm, model, ids = manager(name), make(name), tokens()
    read = [(kind, layer) for kind in plain.kinds(name) for layer in range(hm.n_layers)]
    got = hm.run(ids, read=[f"{layer}.{kind}" for kind, layer in read], grad=lambda out: _metric(out.logits))
    want = plain.run(name, model, ids, read=read, metric=lambda logits: _metric(logits).sum())
    worst = largest(got.logits, want.logits)
    for key in read:
        scale = max(1.0, float(want.grads[key].abs().max()))
        worst = max(worst, largest(got.grad[f"{key[1]}.{key[0]}"] / scale, want.grads[key] / scale))
    return worst


def pattern_gradients(name: str) -> float:
    """Gradients at the patterns equal autograd through the model's own eager attention."""
    hm, ids = manager(name), tokens()
    got = hm.run(ids, read=[f"{layer}.pattern" for layer in range(hm.n_layers)], grad=lambda out: _metric(out.logits))
    model = plain.eager_model(name)
    with torch.enable_grad():
        out = model(ids, use_cache=False, output_attentions=True)
        want = torch.autograd.grad(_metric(out.logits).sum(), out.attentions)
    return max(largest(got.grad[f"{layer}.pattern"], grad) for layer, grad in enumerate(want))


def _metric(logits: Tensor) -> Tensor:
    """A linear read-out of the last two positions, [batch]."""
    return logits[:, -1, 5] - 0.5 * logits[:, -2, 7]


def _uncached(hm: HookManager, ids: Tensor, new: int, write: Callable[[int], list[Intervention]]) -> Tensor:
    """Greedy decoding by whole forwards, the edits given anew for each length."""
    for _ in range(new):
        last = hm.run(ids, write=write(ids.shape[1]), logits="last").logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    return ids


def _answer(prompt: int, total: int, rows: int) -> Tensor:
    """The columns that `Where.last_prompt() | Where.generated()` means, as a mask [batch pos]."""
    return (torch.arange(total) >= prompt - 1).expand(rows, -1)


def _generation_cases(name: str, hm: HookManager, ids: Tensor) -> list[tuple[list[Intervention], list[Any]]]:
    """Edits of a generation, each beside the function that gives the same edits for a whole forward of some length."""
    vector, at_head = 2.0 * noise((hm.d_model,)), noise((hm.d_head,))
    answer = Where.last_prompt() | Where.generated()
    fixed: list[list[Intervention]] = [
        [Add("1.z", at_head, where=Where(head=1)), Add("0.v", at_head, where=Where(pos=2, head=0))]
    ]
    fixed.append([Ablate("0.pattern", where=Where(src=[1, 4])), Ablate("1.pattern", where=Where(head=0, src=0))])
    if name not in (*ROTATED_INSIDE, *NOT_ROTARY):
        fixed.append(
            [Add("0.rot_k", at_head, where=Where(pos=[3, 5], head=0)), Add("1.rot_q", at_head, where=Where(head=2))]
        )
    cases: list[tuple[list[Intervention], list[Any]]] = [(write, [lambda _, write=write: write]) for write in fixed]

    def masked(total: int) -> list[Intervention]:
        return [Add("0.resid_post", vector, where=Where(mask=_answer(ids.shape[1], total, len(ids))))]

    return [*cases, ([Add("0.resid_post", vector, where=answer)], [masked])]


def generation(name: str, new: int = 5) -> float:
    """Cached generation under edits equals decoding without a cache: the same tokens, and the same reads."""
    hm, ids, worst = manager(name), tokens(2, 7, seed=3), 0.0
    read = ["0.resid_post", f"{hm.n_layers - 1}.resid_post", "1.q", "1.z"]
    read += ["0.pattern", "1.pattern"]
    read += [] if name in (*ROTATED_INSIDE, *NOT_ROTARY) else ["0.rot_k", "1.rot_q"]
    for write, (write_at,) in _generation_cases(name, hm, ids):
        # The whole continuation is wanted: a random model may well emit the end token.
        out = hm.generate(ids, max_new_tokens=new, write=write, read=read, generation_kwargs={"eos_token_id": -1})
        want = _uncached(hm, ids, new, write_at)
        if out.tokens is None or not torch.equal(out.tokens, want):
            return float("inf")
        whole = hm.run(want[:, :-1], read=read, write=write_at(want.shape[1] - 1))
        worst = max([worst, *(largest(out[site], whole[site]) for site in read)])
    return worst


def ragged_generation(name: str, new: int = 4) -> float:
    """A row of a ragged batch generates and reads as the row alone, edits by position included."""
    hm, rows = manager(name), [tokens(1, 4, seed=3)[0].tolist(), tokens(1, 7, seed=4)[0].tolist()]
    read, worst = ["0.resid_post", "1.z"], 0.0
    write = [Add("0.resid_post", noise((hm.d_model,)), where=Where(pos=[1, -1])), Ablate("1.z", where=Where(head=0))]
    extra = {"eos_token_id": -1}
    both = hm.generate(rows, max_new_tokens=new, write=write, read=read, generation_kwargs=extra)
    for index, row in enumerate(rows):
        alone = hm.generate([row], max_new_tokens=new, write=write, read=read, generation_kwargs=extra)
        length = len(row) + new
        if both.tokens is None or alone.tokens is None:
            return float("inf")
        if both.tokens[index, -length:].tolist() != alone.tokens[0].tolist():
            return float("inf")
        worst = max([worst, *(largest(both[site][index, 1 - length :], alone[site][0]) for site in read)])
    return worst
