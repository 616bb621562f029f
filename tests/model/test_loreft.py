"""LoReFT: what it does to a loss, as the affine map that it is, and on disk."""

from pathlib import Path

import pytest
import torch

from interp.core.errors import ConfigError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.steering.trained.loreft import LoReFT, fit_loreft
from interp.steering.trained.supervised import TrainedOptions
from tests.families import manager, tokens

SITE = "1.resid_pre"


def concept() -> ConceptTokens:
    """Eight rows of which half have the concept; the first of those is shorter."""
    ids = tokens(8, seed=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[4, 8:] = False
    label = (torch.arange(8) >= 4).long()[:, None].expand_as(ids)
    return ConceptTokens(Tokens(ids, mask), torch.where(mask, label, -1), ("without", "with"), torch.arange(8))


@pytest.fixture(scope="module")
def hm() -> HookManager:
    return manager("Llama")


@pytest.fixture(scope="module")
def fitted(hm: HookManager) -> LoReFT:
    options = TrainedOptions(epochs=12, batch_size=4, lr=0.05, progress=False)
    return fit_loreft(hm, concept(), SITE, rank=3, options=options)


def test_it_lowers_the_loss_and_changes_only_its_subspace(hm: HookManager, fitted: LoReFT) -> None:
    assert fitted.stats["loss_after"] < fitted.stats["loss_before"] - 0.3
    torch.testing.assert_close(fitted.basis @ fitted.basis.T, torch.eye(3), atol=1e-5, rtol=0)
    rows = concept().tokens
    x = hm.run(rows, read=[SITE])[SITE]
    y = hm.run(rows, read=[SITE], write=fitted.as_interventions())[SITE]
    r, w = fitted.basis, fitted.weight
    wanted = x + (x @ w.T + fitted.bias - x @ r.T) @ r
    torch.testing.assert_close(y[rows.mask], wanted[rows.mask], atol=1e-4, rtol=1e-4)
    outside = (y - x) - (y - x) @ r.T @ r
    assert float((y - x)[rows.mask].abs().max()) > 0.1 > 1e-3 > float(outside[rows.mask].abs().max())
    half = hm.run(rows, read=[SITE], write=fitted.as_interventions(0.5))[SITE]
    torch.testing.assert_close(half[rows.mask], ((x + y) / 2)[rows.mask], atol=1e-4, rtol=1e-4)


def test_the_loss_it_reports_is_the_model_s_under_its_edit(hm: HookManager, fitted: LoReFT) -> None:
    rows = concept().tokens.take(torch.arange(4, 8))
    logits = hm.run(rows, write=fitted.as_interventions(), logits="all").logits
    counts = rows.mask[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][counts], rows.ids[:, 1:][counts])
    assert float(losses) == pytest.approx(fitted.stats["loss_after"], abs=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_the_disk_keeps_them(
    hm: HookManager, fitted: LoReFT, tmp_path: Path
) -> None:
    options = TrainedOptions(epochs=1, batch_size=4, progress=False, where=Where(pos=[0, -1]))
    one, same, other = (fit_loreft(hm, concept(), SITE, rank=2, options=options, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    back = Result.load(fitted.save(tmp_path / "edit"))
    assert isinstance(back, LoReFT) and torch.equal(back.basis, fitted.basis) and back.stats == fitted.stats
    back.check(hm)
    assert len(back.to_frame()) == 12 == len(back.plot().data[0].y) and "rank 3 of 32" in back.summary()


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_refused(hm: HookManager, fitted: LoReFT) -> None:
    with pytest.raises(ShapeError, match="1 to 32"):
        fit_loreft(hm, concept(), SITE, rank=33)
    with pytest.raises(SiteError, match="one vector a token"):
        fit_loreft(hm, concept(), "1.z")
    with pytest.raises(ConfigError, match="one plain number"):
        fitted.as_interventions(torch.ones(2))
