"""Trained directions: on models whose optimum is known, on the testbed's sentiment, and what a fit leaves behind."""

import signal
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction, Dose
from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError
from interp.core.fit import auroc
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.subspace import random_basis
from interp.core.text import Tokens
from interp.core.tuning import next_token_losses
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.steering.fitting.fit import fit_direction
from interp.steering.trained.supervised import TrainedOptions, fit_reft_r1, fit_ssv, latent_activation, top_latents
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs
from interp.train.common import TrainingError

D, VOCAB, CONCEPT, LENGTH = 16, 12, 3, 8
SITE = "0.resid_post"
quick = pytest.mark.usefixtures("unchecked")


def readable(n_layers: int = 1) -> tuple[HookManager, Tensor]:
    """A model without attention or norms: tokens 0 … 2 are rare, they hold u, and u raises their logits."""
    options = NanoOptions(
        d_vocab=VOCAB, n_layers=n_layers, d_model=D, n_heads=1, d_mlp=0, norm="none", positions="none", bias=False
    )
    model, frame = nano(options), random_basis(D, D, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight.copy_(frame[1 : VOCAB + 1])
        model.model.embed_tokens.weight[:CONCEPT] += frame[0]
        model.model.embed_tokens.weight.add_(frame[VOCAB + 1])
        model.lm_head.weight.copy_(0.8 * frame[torch.arange(VOCAB).flip(0) + 1])
        model.lm_head.weight[:CONCEPT] += 2 * frame[0] - 3 * frame[VOCAB + 1]
    return HookManager.load(model), frame[0]


def texts(n: int, seed: int, length: int = LENGTH) -> ConceptTokens:
    """n texts with the concept, whose tokens are often 0 … 2, then n that never have them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(CONCEPT, VOCAB, (2 * n, length), generator=draw)
    often = torch.rand(n, length, generator=draw) < 0.6
    ids[:n] = torch.where(often, torch.randint(0, CONCEPT, (n, length), generator=draw), ids[:n])
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    label = (torch.arange(2 * n) < n).long()[:, None].expand(-1, length)
    return ConceptTokens(tokens, label.contiguous(), ("without", "with"), torch.arange(2 * n), name="concept")


def loss_of(hm: HookManager, data: ConceptTokens, directions: list[Direction], dose: float | Dose = 1.0) -> float:
    """Mean loss of the texts with the concept."""
    tokens = data.tokens.take((data.labels[:, 0] == 1).nonzero()[:, 0])
    counts = tokens.mask.clone()
    counts[:, 0] = False
    write = [e for d in directions for e in d.as_interventions(dose)]
    with torch.no_grad():
        return float(next_token_losses(hm, tokens, counts, write).mean())


def at_random(like: Direction, seed: int = 5) -> Direction:
    """A direction drawn at random, of the same length and scale."""
    (site,) = like.sites
    drawn = torch.randn(like[site].shape, generator=torch.Generator().manual_seed(seed))
    return replace(like, vectors={site: drawn * like[site].norm() / drawn.norm()}, method="random")


@quick
def test_a_steering_vector_reaches_the_optimum_of_a_convex_loss() -> None:
    hm, _ = readable()
    data = texts(24, 0)
    options = TrainedOptions(epochs=160, lr=0.5, batch_size=24, progress=False)
    found = fit_ssv(hm, data, SITE, options=options)
    ids = data.tokens.ids[:24]
    embedded, unembed = hm.weights.W_E.double(), hm.model.lm_head.weight.detach().double()
    # The numerical optimum, without hooks or model: the loss is convex in what v does to the logits.
    v = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([v], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> Tensor:
        logits = (embedded[ids[:, :-1]] + v) @ unembed.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)
    best = float(loss().detach())
    stats = found.stats[SITE]
    assert stats["loss_before"] == pytest.approx(loss_of(hm, data, []), abs=1e-5)
    assert stats["loss_after"] == pytest.approx(loss_of(hm, data, [found]), abs=1e-5)
    assert stats["loss_after"] - best < 1e-3 and stats["loss_before"] - best > 0.1
    raised, wanted = (unembed @ w.double() for w in (found[SITE], v.detach()))
    torch.testing.assert_close(raised - raised.mean(), wanted - wanted.mean(), atol=0.1, rtol=0.1)
    assert float(raised[:CONCEPT].mean() - raised[CONCEPT:].mean()) > 1
    assert loss_of(hm, data, [at_random(found)]) > stats["loss_before"]


@quick
def test_rank_one_finetuning_finds_what_both_shows_and_makes_the_concept() -> None:
    hm, u = readable()
    found = fit_reft_r1(hm, texts(24, 0), SITE, options=TrainedOptions(epochs=12, lr=0.05, progress=False), seed=1)
    assert float(found[SITE].norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(found.unit(SITE) @ u) > 0.85
    held = texts(30, 9)
    control = sum(scored(hm, held, at_random(found, seed)) for seed in range(8)) / 8
    assert scored(hm, held, found) > 0.99 and abs(control - 0.5) < 0.25
    # Factor 1 of AxBench: the largest projection over the texts of the fit.
    seen = gather(hm, texts(24, 0), SITE)[SITE].x @ found[SITE]
    assert found.scale[SITE].largest == pytest.approx(float(seen.max()), rel=1e-5)
    before, steered = loss_of(hm, held, []), loss_of(hm, held, [found], Dose(1.0, "largest"))
    assert before - steered > 0.1 > before - loss_of(hm, held, [at_random(found)], Dose(1.0, "largest"))
    # Texts without the concept, called texts with it, say nothing of u.
    data = texts(24, 0)
    nothing = data.take(torch.arange(24, 48))
    null = replace(nothing, labels=(torch.arange(24) % 2)[:, None].expand(-1, LENGTH).contiguous())
    other = fit_reft_r1(hm, null, SITE, options=TrainedOptions(epochs=12, lr=0.05, progress=False), seed=1)
    assert abs(float(other.unit(SITE) @ u)) < 0.6


def scored(hm: HookManager, data: ConceptTokens, direction: Direction) -> float:
    """AUROC of the largest latent of each text."""
    held = gather(hm, data, SITE)[SITE]
    latent = latent_activation(direction, held.x).reshape(len(data), -1)
    assert float(latent.min()) >= 0
    return float(auroc(latent.max(1).values, data.labels[:, 0] == 1))


def test_top_latents_are_those_of_a_loop() -> None:
    along = torch.randn(5, 9)
    inner = torch.rand(5, 9) < 0.6
    inner[0], inner[1] = torch.tensor([False] * 8 + [True]), True
    for k in (1, 3, 20):
        mean, idle = top_latents(along, inner, k)
        means, rest = [], []
        for row, chosen in zip(along, inner, strict=True):
            values = sorted((max(0.0, float(v)) for v in row[chosen]), reverse=True)
            means.append(sum(values[:k]) / len(values[:k]))
            rest.append(sum(values[k:]) / len(values))
        torch.testing.assert_close(mean, torch.tensor(means))
        assert float(idle) == pytest.approx(sum(rest) / 5, abs=1e-6)


def test_the_model_is_left_as_it_was_and_nothing_below_the_edit_is_on_the_graph() -> None:
    hm, _ = readable(n_layers=3)
    hm.model.lm_head.weight.requires_grad_(False)
    wanted = {name: (p.requires_grad, p.detach().clone()) for name, p in hm.model.named_parameters()}
    on_graph: dict[int, set[bool]] = {0: set(), 2: set()}
    watching = [
        hm.model.model.layers[n].register_forward_hook(
            lambda module, args, out, n=n: on_graph[n].add(torch.is_grad_enabled() and out[0].requires_grad)
        )
        for n in on_graph
    ]
    options = TrainedOptions(epochs=1, progress=False)
    for fit in (fit_ssv, fit_reft_r1):
        fit(hm, texts(6, 0), "1.resid_post", options=options)
    for handle in watching:
        handle.remove()
    assert on_graph == {0: {False}, 2: {False, True}}
    for name, p in hm.model.named_parameters():
        assert p.grad is None and p.requires_grad == wanted[name][0] and torch.equal(p, wanted[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hm.model.modules())


@quick
def test_the_rate_falls_to_nothing_in_a_line() -> None:
    hm, _ = readable()
    options = TrainedOptions(epochs=10, batch_size=12, lr=1e-4, progress=False)
    found = fit_ssv(hm, texts(12, 0), SITE, options=options)
    # With a gradient that hardly changes, each of Adam's steps is as long as its rate: 1 + 0.9 + … + 0.1 of the first.
    assert float(found[SITE].abs().max()) == pytest.approx(5.5e-4, rel=0.02)


@quick
def test_the_same_seed_gives_the_same_bytes() -> None:
    hm, _ = readable()
    options = TrainedOptions(epochs=2, progress=False)
    for fit in (fit_ssv, fit_reft_r1):
        one, same, other = (fit(hm, texts(8, 0), SITE, options=options, seed=s)[SITE] for s in (3, 3, 4))
        assert torch.equal(one, same) and not torch.equal(one, other)


@quick
@pytest.mark.parametrize("fit", [fit_ssv, fit_reft_r1])
def test_pads_and_their_side_change_nothing(fit: object) -> None:
    hm, _ = readable()
    data = texts(6, 0)
    options, found = TrainedOptions(epochs=2, topk=3, progress=False), []
    for side in ("left", "right", "none"):
        ids, mask, labels = data.tokens.ids, data.tokens.mask, data.labels
        if side != "none":
            before = side == "left"
            ids, mask, labels = (_padded(t, fill, before) for t, fill in ((ids, 1), (mask, False), (labels, -1)))
        padded = replace(data, tokens=Tokens(ids, mask), labels=labels)
        found.append(fit(hm, padded, SITE, options=options)[SITE])  # type: ignore[operator]
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=1e-4)


def _padded(rows: Tensor, fill: int | bool, before: bool) -> Tensor:
    pads = torch.full_like(rows[:, :3], fill)
    return torch.cat([pads, rows] if before else [rows, pads], 1)


@quick
def test_an_interrupt_keeps_what_was_fitted_and_says_so() -> None:
    hm, _ = readable()
    steps = []

    def interrupt(module: object, args: object, out: object) -> None:
        steps.append(torch.is_grad_enabled())
        if sum(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    handle = hm.model.register_forward_hook(interrupt)
    found = fit_ssv(hm, texts(12, 0), SITE, options=TrainedOptions(epochs=9, progress=False))
    handle.remove()
    assert found.stats[SITE]["steps"] == 5 and "loss_after" not in found.stats[SITE]
    assert "stopped by SIGINT after 5 of 18 steps" in found.notes


@quick
def test_a_loss_that_is_no_number_names_its_step() -> None:
    hm, _ = readable()
    with pytest.raises(TrainingError, match=r"at step 2; lower lr"):
        fit_ssv(hm, texts(12, 0), SITE, options=TrainedOptions(lr=3e37, progress=False))


@quick
def test_what_counts_can_be_a_part_of_each_text() -> None:
    hm, _ = readable()
    data = texts(8, 0)
    # Only the last token counts, and only the one before it is edited: what v does elsewhere has no gradient.
    options = TrainedOptions(epochs=3, loss=Where(pos=-1), where=Where(pos=-2), lr=0.1, progress=False)
    found = fit_ssv(hm, data, SITE, options=options)
    ends, free = (
        replace(data, labels=data.labels.clone()),
        fit_ssv(hm, data, SITE, options=replace(options, where=None)),
    )
    torch.testing.assert_close(found[SITE], free[SITE])  # without attention the others cannot matter
    assert found.stats[SITE]["loss_before"] != pytest.approx(loss_of(hm, ends, []), abs=1e-3)
    assert found.scale[SITE].largest <= free.scale[SITE].largest


@quick
def test_a_model_in_half_precision_is_fitted_in_single() -> None:
    hm, u = readable()
    half = HookManager.load(hm.model.to(torch.bfloat16))
    found = fit_reft_r1(half, texts(24, 0), SITE, options=TrainedOptions(epochs=6, lr=0.05, progress=False), seed=1)
    assert found[SITE].dtype == torch.float32 and float(found.unit(SITE) @ u) > 0.6


@quick
def test_what_is_wrong_is_refused() -> None:
    hm, _ = readable()
    data, options = texts(4, 0), TrainedOptions(progress=False)
    for site in ("0.pattern", "*.resid_post*e", "9.resid_post"):
        with pytest.raises(SiteError):
            fit_ssv(hm, data, site, options=options)
    for bad in ({"epochs": 0}, {"lr": -1.0}, {"topk": 2.0}, {"l1": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TrainedOptions(**bad)
    mixed = replace(data, labels=torch.where(torch.arange(LENGTH) < 3, 1, data.labels))
    with pytest.raises(DataError, match="several classes"):
        fit_ssv(hm, mixed, SITE, options=options)
    with pytest.raises(DataError, match="no token of row 0 has a loss"):
        fit_ssv(hm, data, SITE, options=replace(options, loss=Where(pos=0)))
    with pytest.raises(ShapeError, match="width 3"):
        latent_activation(fit_ssv(hm, data, SITE, options=options), torch.zeros(2, 3))
    model = Provenance.of(hm)
    with pytest.raises(ShapeError, match="start has shape"):
        start = Direction({SITE: torch.ones(3)}, "given", model)
        fit_reft_r1(hm, data, SITE, options=replace(options, start=start))
    hm.model.train()
    with pytest.raises(ModelError, match="train mode"):
        fit_ssv(hm, data, SITE, options=options)


# -- sentiment ------------------------------------------------------------------------------------------------------

GOOD = (" glad", " positive", " recommend", " success", " loved")


@pytest.fixture(scope="module")
def testbed() -> HookManager:
    return HookManager.load("testbed")


def sided(n: int, seed: int, *, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Good prompt and answer, bad prompt and answer."""
    found = []
    for e in task_pairs("sentiment", n, seed=seed, held_out=held_out):
        sides = [(e.clean.text, e.answers[0]), (e.corrupted.text, e.foils[0])]
        good, bad = sides if e.answers[0] in GOOD else reversed(sides)
        found.append((*good, *bad))
    return found


def odds(hm: HookManager, direction: Direction | None, dose: float | Dose = 1.0) -> float:
    """Mean log-odds of the good answer after held-out bad prompts."""
    rows = sided(20, 1, held_out=True)
    write = [] if direction is None else direction.as_interventions(dose)
    logits = hm.run([bad for _, _, bad, _ in rows], write=write, logits="last").logits[:, 0]
    ids = torch.tensor([[hm.to_single_token(a) for a in (good, bad)] for _, good, _, bad in rows])
    return float((logits.gather(1, ids[:, :1]) - logits.gather(1, ids[:, 1:])).mean())


@quick
def test_a_steering_vector_turns_sentiment(testbed: HookManager) -> None:
    rows = sided(24, 0, held_out=False)
    either = [p for good, _, bad, _ in rows for p in (good, bad)]
    answers = [(g, b) for _, g, _, b in rows for _ in range(2)]
    data = Contrast.make(
        [p + g for p, (g, _) in zip(either, answers, strict=True)],
        [p + b for p, (_, b) in zip(either, answers, strict=True)],
        name="good answers",
    )
    options = TrainedOptions(loss=Where(pos=-1), lr=0.05, progress=False)
    found = fit_ssv(testbed, data, "2.resid_post", options=options)
    stats = found.stats["2.resid_post"]
    assert stats["loss_after"] < 0.1 * stats["loss_before"]
    plain, steered, control = (odds(testbed, d) for d in (None, found, at_random(found)))
    assert plain < -5 < 0 < steered and abs(control - plain) < 0.3 * (steered - plain)


@quick
def test_rank_one_finetuning_on_sentiment(testbed: HookManager) -> None:
    site = "2.resid_post"
    rows = sided(36, 0, held_out=False)
    data = Contrast.make([p + a for p, a, _, _ in rows], [p + a for _, _, p, a in rows], name="sentiment")
    start = fit_direction(testbed, data, site, where=Where())
    found = fit_reft_r1(testbed, data, site, options=TrainedOptions(start=start, progress=False))
    stats = found.stats[site]
    assert stats["loss_after"] < stats["loss_before"] - 0.03
    plain, steered, control = (odds(testbed, d, Dose(1.0, "largest")) for d in (None, found, at_random(found)))
    assert steered - plain > 4 and abs(control - plain) < 0.4 * (steered - plain)
    held = sided(24, 1, held_out=True)
    text = Contrast.make([p + a for p, a, _, _ in held], [p + a for _, _, p, a in held]).tokens(testbed, where=Where())
    seen = gather(testbed, text, site)[site]
    latent = latent_activation(found, seen.x)
    best = torch.stack([latent[seen.row == row].max() for row in range(len(text))])
    assert float(auroc(best, text.labels.max(1).values == 1)) > 0.7


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [{"lr": "a"}, {"lr": 1e38}, {"l1": True}, {"start": "mean_difference"}])
def test_options_of_another_kind_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TrainedOptions(**wrong)  # type: ignore[arg-type]
