"""Direct attribution beside TransformerLens' `logit_attrs`, on a model folded as TransformerLens folds its own."""

import pytest
import torch

from interp.lens.direct import direct_logit_attribution
from tests.contract.test_weights import quiet_bridge
from tests.families import manager, tokens

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("unchecked")]

ANSWER, OTHER = torch.tensor([7, 31]), torch.tensor([52, 7])


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_components_and_heads_are_those_of_logit_attrs(name: str) -> None:
    hm = manager(name).folded()
    with torch.no_grad():
        _, cache = quiet_bridge(hm).run_with_cache(tokens())
        sums, labels = cache.decompose_resid(layer=-1, apply_ln=False, pos_slice=-1, return_labels=True)
        theirs = cache.logit_attrs(sums, tokens=ANSWER, incorrect_tokens=OTHER, pos_slice=-1)
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
        heads = cache.logit_attrs(stack, tokens=ANSWER, incorrect_tokens=OTHER, pos_slice=-1)
    ours = direct_logit_attribution(hm, tokens(), (ANSWER, OTHER))
    for label, value in zip(labels, theirs, strict=True):
        torch.testing.assert_close(ours[label], value, atol=1e-4, rtol=1e-4)
    by_head = direct_logit_attribution(hm, tokens(), (ANSWER, OTHER), by="head")
    own = [i for i, kind in enumerate(by_head.kinds) if kind == "head"]
    torch.testing.assert_close(by_head.values[own], heads, atol=1e-4, rtol=1e-4)
    # Theirs leave the unembedding's bias out; with it, and the projections' own, ours is the whole difference.
    told = torch.tensor([kind != "residue" for kind in ours.kinds])
    torch.testing.assert_close(ours.values[told].sum(0), ours.total, atol=1e-4, rtol=1e-4)
