"""Transport on models: site after site on a chain whose moments are known, and sentiment on the testbed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.direction import Dose, Steers
from interp.core.errors import ConfigError, DataError, ModelError, SiteError
from interp.core.manager import HookManager
from interp.core.metrics import loss_per_token
from interp.core.result import Result
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.steering.evaluating.sweep import steering_sweep
from interp.steering.evaluating.sweep_options import SweepOptions
from interp.steering.trained.transport import Transport, fit_transport
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs
from interp.testbed.text import Text
from tests.families import manager

N, D = 40, 6
CHAIN = ["0.resid_post", "1.resid_post"]


def chain() -> tuple[HookManager, ConceptTokens]:
    """Two blocks that add nothing: what the first map did arrives at the second. Texts of one token, N a side."""
    options = NanoOptions(d_vocab=2 * N, n_layers=2, d_model=D, n_heads=1, d_mlp=0, norm="none", positions="none")
    model = nano(options)
    draw = torch.Generator().manual_seed(0)
    scale, mean = 0.5 + torch.rand(2, D, generator=draw), 3 * torch.randn(2, D, generator=draw)
    drawn = torch.randn(2, N, D, generator=draw) * scale[:, None] + mean[:, None]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight.copy_(drawn.flatten(0, 1))
    ids, label = torch.arange(2 * N)[:, None], (torch.arange(2 * N) >= N).long()
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return HookManager.load(model), ConceptTokens(tokens, label[:, None], ("source", "target"), torch.arange(2 * N))


def ends(hm: HookManager, data: ConceptTokens, maps: Transport | None, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Source activations at the end of the chain under the maps, and the target's as they are."""
    write = [] if maps is None else maps.as_interventions(strength)
    source = gather(hm, data.take(torch.arange(N)), CHAIN[1], write=write)[CHAIN[1]].x
    return source, gather(hm, data.take(torch.arange(N, 2 * N)), CHAIN[1])[CHAIN[1]].x


def test_only_fits_one_after_the_other_bring_the_end_of_a_chain_to_the_target() -> None:
    hm, data = chain()
    moved, target = ends(hm, data, fit_transport(hm, data, CHAIN, kind="gaussian"))
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.std(0), target.std(0), atol=1e-4, rtol=1e-4)
    once = fit_transport(hm, data, CHAIN, kind="gaussian", incremental=False)
    twice, _ = ends(hm, data, once)
    # Each of the two maps goes the whole way.
    f, b = once.factor[CHAIN[0]], once.shift[CHAIN[0]]
    plain, _ = ends(hm, data, None)
    torch.testing.assert_close(twice, f * (f * plain + b) + b, atol=1e-3, rtol=1e-4)
    assert float((twice.mean(0) - target.mean(0)).abs().max()) > 1


def test_the_second_map_of_a_chain_is_the_identity_when_the_first_did_its_work() -> None:
    hm, data = chain()
    maps = fit_transport(hm, data, list(reversed(CHAIN)))
    assert maps.sites == CHAIN and maps.examples == (N, N)
    torch.testing.assert_close(maps.factor[CHAIN[1]], torch.ones(D), atol=1e-5, rtol=0)
    assert float(maps.shift[CHAIN[1]].abs().max()) < 1e-4
    assert maps.after[CHAIN[0]] < 0.5 < maps.before[CHAIN[0]]
    assert maps.before[CHAIN[1]] == pytest.approx(maps.after[CHAIN[0]], abs=1e-5)
    moved, target = ends(hm, data, maps)
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-4, rtol=1e-4)


def test_a_share_of_the_map_goes_a_share_of_the_way() -> None:
    hm, data = chain()
    maps = fit_transport(hm, data, CHAIN[0])
    start, target = ends(hm, data, None)
    none, _ = ends(hm, data, maps, 0.0)
    third, _ = ends(hm, data, maps, 1 / 3)
    assert torch.equal(none, start)
    torch.testing.assert_close(third.mean(0), (2 * start.mean(0) + target.mean(0)) / 3, atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="extrapolated"):
        edits = maps.as_interventions(2.0)
    beyond = gather(hm, data.take(torch.arange(N)), CHAIN[1], write=edits)[CHAIN[1]].x
    torch.testing.assert_close(beyond.mean(0), 2 * target.mean(0) - start.mean(0), atol=1e-3, rtol=1e-4)


def test_sides_of_different_size_and_labels_that_say_nothing() -> None:
    hm, data = chain()
    few = data.take(torch.cat([torch.arange(N), torch.arange(N, N + 7)]))
    maps = fit_transport(hm, few, CHAIN[0])
    assert maps.examples == (N, 7)
    moved, target = ends(hm, data, maps)
    torch.testing.assert_close(moved.mean(0), target[:7].mean(0), atol=1e-4, rtol=1e-4)
    null = fit_transport(hm, data.shuffled(seed=1), CHAIN[0])
    assert null.before[CHAIN[0]] < 0.4 < 1.5 < fit_transport(hm, data, CHAIN[0]).before[CHAIN[0]]


def test_maps_are_saved_with_all_they_need_and_know_their_model(tmp_path: Path) -> None:
    hm, data = chain()
    maps = fit_transport(hm, data, CHAIN)
    back = Result.load(maps.save(tmp_path / "maps"))
    assert isinstance(back, Transport) and back.sites == maps.sites and back.after == maps.after
    for one, other in zip(maps.as_interventions(0.5), back.as_interventions(0.5), strict=True):
        assert torch.equal(one.factor, other.factor) and torch.equal(one.low, other.low)  # type: ignore[attr-defined]
    back.check(hm)
    with pytest.raises(ModelError, match="fitted on"):
        back.check(HookManager.load(nano(NanoOptions(d_vocab=9, n_layers=2, d_model=D, n_heads=1))))
    assert list(maps.to_frame()["site"]) == CHAIN and len(maps.plot().data) == 2
    assert "one after" not in maps.summary() and "under the maps before it" in maps.summary()
    assert maps.at("1.resid_post").sites == ["1.resid_post"]


@pytest.mark.usefixtures("unchecked")
def test_an_interrupted_fit_gives_the_sites_it_had_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.steering.trained.transport as module

    hm, data = chain()
    calls = []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:  # the target's, the first site's, then the second's
            raise KeyboardInterrupt
        return gather(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "gather", interrupted)
    maps = fit_transport(hm, data, CHAIN)
    assert maps.sites == CHAIN[:1] and "1 of 2 sites" in maps.notes[-1]


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_refused() -> None:
    hm, data = chain()
    for sites, what in (("0.pattern", "no vector of its own"), ([], "no site"), ("7.resid_post", "7")):
        with pytest.raises(SiteError, match=what):
            fit_transport(hm, data, sites)
    with pytest.raises(ConfigError, match="did you mean"):
        fit_transport(hm, data, CHAIN, kind="means")
    with pytest.raises(ConfigError, match="pool"):
        fit_transport(hm, data, CHAIN, pool="median")
    with pytest.raises(DataError, match="1 source"):
        fit_transport(hm, data.take(torch.arange(N - 1, 2 * N)), CHAIN)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        fit_transport(hm, data, CHAIN).as_interventions(Dose(1.0, "sigma"))
    with pytest.raises(SiteError, match=r"no map at 1\.resid_post"):
        fit_transport(hm, data, CHAIN[0]).at("1.resid_post")


# -- sentiment ------------------------------------------------------------------------------------------------------

GOOD = (" glad", " positive", " recommend", " success", " loved")
MLP = ["*.mlp_out", "*.attn_out"]


@pytest.fixture(scope="module")
def testbed() -> HookManager:
    return HookManager.load("testbed")


@pytest.fixture(scope="module")
def contrast() -> Contrast:
    pairs = task_pairs("sentiment", 48, seed=0, held_out=False)
    return Contrast.of_pairs(pairs, positive=lambda e: e.answers[0] in GOOD)


def log_odds(hm: HookManager, steers: Steers, doses: list[float]) -> list[float]:
    """Mean logit of the positive answer over the negative one, after held-out negative prompts."""
    pairs = task_pairs("sentiment", 24, seed=1)
    bad = [e.corrupted.text if e.answers[0] in GOOD else e.clean.text for e in pairs]
    sides = [(e.answers[0], e.foils[0]) if e.answers[0] in GOOD else (e.foils[0], e.answers[0]) for e in pairs]
    good, other = torch.tensor([[hm.to_single_token(a) for a in side] for side in sides]).T
    found = []
    for dose in doses:
        logits = hm.run(bad, write=steers.as_interventions(dose), logits="last").logits[:, 0]
        found.append(float((logits.gather(1, good[:, None]) - logits.gather(1, other[:, None])).mean()))
    return found


@pytest.mark.usefixtures("unchecked")
def test_sentiment_moves_with_the_share(testbed: HookManager, contrast: Contrast) -> None:
    maps = fit_transport(testbed, contrast.tokens(testbed), MLP)
    odds = log_odds(testbed, maps, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert odds == sorted(odds) and odds[0] < -4 and odds[-1] > 0.5
    assert all(maps.after[s] <= maps.before[s] for s in maps.sites)
    # Other text is said as before.
    rows, _, _ = Text(5).rows(4, 64)
    losses = [
        loss_per_token(testbed.run(rows, write=write, logits="all").logits, rows)[0].mean()
        for write in ([], maps.as_interventions())
    ]
    assert float(losses[1] - losses[0]) < 0.2
    # Labels that say nothing move nothing, and the other way round the prompts become what they are already.
    null = fit_transport(testbed, contrast.tokens(testbed).shuffled(seed=0), MLP)
    assert abs(log_odds(testbed, null, [1.0])[0] - odds[0]) < 0.25 * (odds[-1] - odds[0])


@pytest.mark.usefixtures("unchecked")
def test_generation_is_steered_the_same_with_and_without_a_cache(testbed: HookManager, contrast: Contrast) -> None:
    maps = fit_transport(testbed, contrast, "*.mlp_out", pool="each")
    prompts = ["The film was", "Because the story was dull, Sam felt"]
    texts = [
        testbed.generate(prompts, max_new_tokens=6, write=maps.as_interventions(), use_cache=c).tokens
        for c in (True, False)
    ]
    assert texts[0] is not None and texts[1] is not None and torch.equal(texts[0], texts[1])
    where = Where.last_prompt() | Where.generated()
    only = testbed.generate(prompts, max_new_tokens=6, write=maps.as_interventions(where=where)).tokens
    assert only is not None and torch.equal(only[:, :3], texts[0][:, :3])


def test_several_strengths_are_rows_of_one_forward() -> None:
    hm = manager("Llama")
    data = Contrast.make(["w1 w5 w2", "w3 w5 w4"], ["w1 w6 w2", "w3 w6 w4"]).tokens(hm, where=Where())
    maps, prompts = fit_transport(hm, data, "1.resid_post"), ["w1 w6 w2 w7", "w3 w6"]
    options = SweepOptions(n_generated=0, progress=False)
    together = steering_sweep(hm, maps, prompts, doses=[0.0, 0.5, 1.0], options=options)
    for i, dose in enumerate((0.0, 0.5, 1.0)):
        alone = steering_sweep(hm, maps, prompts, doses=[dose], options=options)
        torch.testing.assert_close(together.kl[i : i + 1], alone.kl, atol=1e-6, rtol=1e-5)
    assert float(together.kl[0]) == 0 and 0 < float(together.kl[1]) < float(together.kl[2])
