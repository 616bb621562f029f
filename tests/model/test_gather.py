"""Gathered activations: those of a plain run, whatever the batches, the padding and the order."""

import pytest
import torch

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Add, Edit
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from tests.families import manager

HM = manager("Llama")


def data(where: Where | None = None, side: str = "right") -> ConceptTokens:
    positive = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9", "w2 w1"]
    negative = ["w1 w3 w3 w4", "w5 w7", "w7 w1 w9", "w2 w9"]
    return Contrast.make(positive, negative).tokens(HM, where=where, side=side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_examples_are_the_activations_of_single_texts(batch_size: int, side: str) -> None:
    held = gather(HM, data(Where(), side), ["1.resid_post", "0.z"], batch_size=batch_size)
    assert list(held) == ["1.resid_post", "0.z"]
    texts = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9", "w2 w1", "w1 w3 w3 w4", "w5 w7", "w7 w1 w9", "w2 w9"]
    for site, examples in held.items():
        alone = torch.cat([HM.run(t, read=[site])[site][0] for t in texts])
        torch.testing.assert_close(examples.x, alone, atol=1e-5, rtol=1e-5)
        lengths = [4, 2, 3, 2] * 2
        assert examples.row.tolist() == [r for r, n in enumerate(lengths) for _ in range(n)]
        assert examples.y.tolist() == [1] * 11 + [0] * 11
        assert examples.pair.tolist() == [r % 4 for r, n in enumerate(lengths) for _ in range(n)]


def test_pools_and_differences_are_those_by_hand() -> None:
    every = gather(HM, data(Where()), "1.resid_post")["1.resid_post"]
    rows = [every.x[every.row == r] for r in range(8)]
    for pool, by_hand in (
        ("mean", torch.stack([r.mean(0) for r in rows])),
        ("max", torch.stack([r.amax(0) for r in rows])),
        ("last", torch.stack([r[-1] for r in rows])),
    ):
        found = gather(HM, data(Where()), "1.resid_post", pool=pool, batch_size=3)["1.resid_post"]
        torch.testing.assert_close(found.x, by_hand, atol=1e-5, rtol=1e-5)
        assert found.y.tolist() == [1] * 4 + [0] * 4 and found.row.tolist() == list(range(8))
        torch.testing.assert_close(found.differences(), by_hand[:4] - by_hand[4:], atol=1e-5, rtol=1e-5)
    means = torch.stack([r.mean(0) for r in rows])
    torch.testing.assert_close(every.differences(), means[:4] - means[4:], atol=1e-5, rtol=1e-5)


def test_activations_are_read_under_edits() -> None:
    v = torch.randn(HM.d_model)
    plain, moved = (
        gather(HM, data(), "1.resid_post", write=w)["1.resid_post"].x for w in ([], [Add("1.resid_post", v)])
    )
    torch.testing.assert_close(moved, plain + v, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(ConfigError, match="pool='sum'"):
        gather(HM, data(), "1.resid_post", pool="sum")
    with pytest.raises(ConfigError, match="batch_size=0"):
        gather(HM, data(), "1.resid_post", batch_size=0)
    tokens = data(Where())
    mixed = tokens.labels.clone()
    mixed[0, 1] = 0
    both = ConceptTokens(tokens.tokens, mixed, tokens.classes, tokens.groups)
    with pytest.raises(DataError, match="several classes"):
        gather(HM, both, "1.resid_post", pool="mean")
    with pytest.raises(DataError, match="no pairs"):
        gather(HM, both, "1.resid_post")["1.resid_post"].differences()
    with pytest.raises(DataError, match=r"1\.resid_post hold NaN"):
        gather(HM, data(), "1.resid_post", write=[Edit("1.resid_post", lambda x: x * float("inf"))])
