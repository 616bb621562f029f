"""What an attribution graph explains: logits of the likeliest tokens, or differences of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.readout import Readout
from interp.core.result import token_names
from interp.patching.features.frozen import FrozenModel

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["LogitTargets", "logit_targets"]

_ENOUGH = 0.95


@dataclass(frozen=True, eq=False)
class LogitTargets:
    """Linear functions of the logits at one position, before any soft-cap.

    Attributes:
        names: of each.
        columns: tokens that each is about; short rows are filled up with token 0 at coefficient 0.
        coefficients: of those tokens' logits.
        centred: whether the mean over the vocabulary is taken off.
        prob: probability of the token of each; 0 of a difference.
        pos: position.
    """

    names: list[str]
    columns: Int[Tensor, "logit column"]
    coefficients: Float[Tensor, "logit column"]
    centred: Bool[Tensor, " logit"]
    prob: Float[Tensor, " logit"]
    pos: int

    def value(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch logit"]:
        """Return the targets' values of some logits, before any soft-cap."""
        picked = (logits[..., self.columns.to(logits.device)] * self.coefficients.to(logits)).sum(-1)
        return picked - self.centred.to(logits) * logits.mean(-1, keepdim=True)

    @property
    def weights(self) -> Float[Tensor, " logit"]:
        """How much each counts: by its probability where all have one, else alike; they sum to 1."""
        weights = self.prob if bool((self.prob > 0).all()) else torch.ones_like(self.prob)
        return weights / weights.sum()

    def reads(self, frozen: FrozenModel) -> tuple[Float[Tensor, "logit d_model"], Float[Tensor, " logit"]]:
        """Return what each reads of the last stream, and what it is of a stream of zeros."""
        readout, device = Readout.of(frozen.hm), frozen.resid.device
        weight, bias = readout.unembed.weight.detach(), readout.unembed.bias
        columns, off = self.columns.to(weight.device), self.centred.to(weight.device)
        rows = weight[columns].to(frozen.resid) * self.coefficients.to(frozen.resid)[..., None]
        vectors = (rows.sum(1) - off[:, None] * weight.mean(0).to(rows)) * readout.scale
        constant = vectors.new_zeros(len(vectors))
        if bias is not None:
            constant = self.value(bias.detach().to(vectors)) * readout.scale
        if frozen.final is not None:
            constant = constant + vectors.to(device) @ frozen.final.bias
            vectors = frozen.final.at(self.pos).back(vectors.to(device)[:, None])[:, 0]
        return vectors.to(device), constant.to(device)


def logit_targets(frozen: FrozenModel, targets: Any = 10, *, pos: int = -1) -> LogitTargets:
    """Return the targets of a graph.

    Args:
        frozen: the model.
        targets: a number: so many of the likeliest tokens at most, as many as hold a probability of 0.95; or tokens
            (ids or single-token strings); or name → token → coefficient, such as
            {"Mary − John": {" Mary": 1.0, " John": -1.0}}. Tokens' logits are taken against the vocabulary's mean.
        pos: where, from the first token or back from the last.

    Raises:
        DataError: no such position or token, or nothing to explain.
    """
    n, hm = len(frozen.ids), frozen.hm
    if not -n <= pos < n:
        raise DataError(f"pos={pos}: the prompt has positions 0 to {n - 1} (or −{n} to −1)")
    probs = frozen.logits[pos].softmax(-1)
    if isinstance(targets, Mapping):
        return _differences(hm, targets, pos % n)
    if isinstance(targets, int) and not isinstance(targets, bool):
        if targets < 1:
            raise DataError(f"targets={targets}: expected at least one token to explain")
        held, ids = probs.topk(min(targets, len(probs)))
        enough = int((held.cumsum(0) < _ENOUGH).sum()) + 1
        ids = ids[:enough]
    elif isinstance(targets, Sequence) and not isinstance(targets, str) and len(targets):
        ids = torch.tensor([_token(hm, t) for t in targets], device=probs.device)
    else:
        raise DataError(f"targets={targets!r}: expected a number, tokens, or name → token → coefficient")
    ones = torch.ones(len(ids), 1)
    return LogitTargets(
        token_names(hm, ids), ids.cpu()[:, None], ones, ones[:, 0].bool(), probs[ids].float().cpu(), pos % n
    )


def _differences(hm: "HookManager", targets: Mapping[str, Mapping[Any, float]], pos: int) -> LogitTargets:
    if not targets or not all(isinstance(held, Mapping) and held for held in targets.values()):
        raise DataError("targets: expected name → token → coefficient, such as {'a − b': {' a': 1.0, ' b': -1.0}}")
    width = max(len(held) for held in targets.values())
    columns, coefficients = torch.zeros(len(targets), width, dtype=torch.long), torch.zeros(len(targets), width)
    for row, held in enumerate(targets.values()):
        for column, (token, coefficient) in enumerate(held.items()):
            columns[row, column], coefficients[row, column] = _token(hm, token), float(coefficient)
    none = torch.zeros(len(targets))
    return LogitTargets([str(name) for name in targets], columns, coefficients, none.bool(), none, pos)


def _token(hm: "HookManager", token: Any) -> int:
    found = hm.to_single_token(token) if isinstance(token, str) else token
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < hm.d_vocab:
        raise DataError(f"target {token!r}: expected a token's text or an id from 0 to {hm.d_vocab - 1}")
    return found
