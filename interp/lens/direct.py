"""Direct logit attribution: the final logits as a sum over what wrote the residual stream.

Source: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Wang et al. (2022), arXiv 2211.00593,
§3.1. Departures: the terms sum to the model's own logit: biases, norms on a sublayer's output (at their own σ), logit
scale and the final soft-cap are in, and what rounding leaves is a term too.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direct import DirectPath
from interp.core.errors import ConfigError, DataError, ModelError, nearest
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.readout import Readout
from interp.core.result import Provenance, token_names
from interp.core.run import Run
from interp.core.text import Tokens
from interp.core.where import Where
from interp.lens.attribution import DirectAttribution
from interp.lens.capture import checked_readout, last_stream
from interp.lens.direct_terms import Slice, Terms, add_terms, reads_for
from interp.lens.target import Target, pairs_of, read_target

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = ["direct_logit_attribution", "position_of"]

_WAYS = ("component", "head", "neuron", "latent", "token")
# Rounding of fp32 leaves less, as a share of the logits; of half precision less than the second.
_EXACT, _HALF = 1e-4, 5e-2


def direct_logit_attribution(
    hm: HookManager,
    data: Any,
    target: "Metric | int | str | Int[Tensor, ' example'] | tuple[Any, Any] | None" = None,
    *,
    by: str = "component",
    pos: "int | Int[Tensor, ' example']" = -1,
    top_k: int = 50,
    dictionary: "Dictionary | None" = None,
    per_head: bool = False,
) -> DirectAttribution:
    """Say what each part of the model adds directly to a logit, or to a difference of logits; the sum is the model's.

    σ of the final norm, and of norms on a sublayer's output, is held as it was in the run: what a part does through
    other parts, or by changing σ, is not counted. A soft-cap (Gemma 2) comes last, as the term "soft_cap": what it
    takes off the sum before it. The term "residue" is what rounding leaves; it is checked against 1e-4 · max(1,
    largest logit).

    Memory: (number of reads) · examples · d_model, whatever the length of the text; by "head" n_heads · d_head in
    place of d_model for attention, by "neuron" d_mlp for the MLPs, by "token" also the values of every position and
    layers · examples · n_heads · length of pattern. Logits [example d_vocab] of one position.

    Args:
        hm: The model.
        data: Whatever `hm.run` takes, or `PromptPairs` (or `PairTokens`), whose clean side is run.
        target: What is asked about: a token (id, or text that is one token), ids [example], a pair (token, other) for
            their difference, or a `Metric` with `weights`. With pairs, None is answers − foils, a name one of their
            metrics.
        by: The parts: "component" (embedding, each attention and MLP), "head", "neuron" (of the whole model, the
            `top_k` largest by mean size, and each layer's others together), "latent" (of a dictionary, with its bias
            and its error), "token" (each layer's attention by source position: pattern × values).
        pos: The position whose logits are read, in each row's own tokens: one for all, or one each.
        top_k: Neurons or latents with a term of their own.
        dictionary: For "latent", of `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`, or a transcoder of
            the latter; its terms stand in place of the component, or of all before that place of the stream.
        per_head: By "token", each head apart.

    Returns:
        The terms per example, on the host.

    Raises:
        DataError: No target, or one that is not linear in the logits.
        ConfigError: An unknown `by`, or a dictionary where none belongs.
        SiteError: The model has no such parts (neurons of a mixture of experts, patterns that it does not show).
        ModelError: The terms do not sum to the model's logits, so the model does more than is known here.

    Source: see the module's text.
    """
    _check(by, top_k, dictionary, per_head)
    pairs = pairs_of(hm, data)
    tokens = pairs.clean if pairs is not None else hm.to_tokens(data)
    asked = read_target(hm, tokens, target, pairs)
    where = position_of(tokens, pos)
    last = last_stream(hm).at(pos=-1)
    reads = reads_for(hm, by, where, dictionary)
    out = hm.run(tokens, read=list(dict.fromkeys([*reads, last])), logits="last")
    readout, part = checked_readout(hm, out, last), Slice(out, where)
    final = part[last_stream(hm).short]
    path = DirectPath.of(hm, final, asked.columns, asked.weights)
    with torch.no_grad():
        terms = Terms()
        terms.add("norm_bias", "bias", path.norm_bias)
        terms.add("unembed_bias", "bias", path.unembed_bias)
        add_terms(terms, part, path, by, top_k=top_k, dictionary=dictionary, per_head=per_head)
        total, size = _finish(terms, readout, final, asked)
    values = torch.cat([value.to(total).cpu() for value in terms.values])
    _check_residue(hm, values, size)
    settings = {"target": asked.name, "by": by, "pos": pos if isinstance(pos, int) else pos.tolist(), "top_k": top_k}
    made = {"total": total.cpu(), "sigma": path.sigma.cpu(), "values": values}
    return _result(out, tokens, terms, made, settings)


def _result(
    out: Run, tokens: Tokens, terms: Terms, made: dict[str, Tensor], settings: dict[str, Any]
) -> DirectAttribution:
    hm, by = out.hm, settings["by"]
    return DirectAttribution(
        provenance=Provenance.of(hm, settings=settings, data=(tokens.ids, tokens.mask)),
        by=by,
        target=settings["target"],
        labels=terms.labels,
        kinds=terms.kinds,
        layers=torch.tensor(terms.layers),
        heads=torch.tensor(terms.heads),
        sources=torch.tensor(terms.sources),
        lengths=tokens.lengths.cpu(),
        source_names=_names(hm, tokens) if by == "token" else [],
        notes=list(out.notes),
        **made,
    )


def position_of(tokens: Tokens, pos: "int | Int[Tensor, ' example']") -> Where:
    """Return one position of every row as a `Where`.

    Args:
        tokens: the batch.
        pos: counted in each row's own tokens: one for all rows, or one each.

    Raises:
        DataError: something else, or a position that a row does not have.
    """
    if isinstance(pos, Tensor):
        if pos.shape != (len(tokens),) or pos.is_floating_point() or pos.dtype == torch.bool:
            raise DataError(f"pos is {pos.dtype} {tuple(pos.shape)}; expected one position, or whole numbers [example]")
        given = pos.detach().cpu()
    elif isinstance(pos, bool) or not isinstance(pos, int):
        raise DataError(f"pos={pos!r}: expected one position, or a tensor of whole numbers [example]")
    else:
        given = torch.full((len(tokens),), pos)
    lengths = tokens.lengths.cpu()
    bad = ((given < -lengths) | (given >= lengths)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(f"row {row} has {int(lengths[row])} tokens, so there is no position {int(given[row])}")
    return Where(pos=pos if isinstance(pos, int) else given)


def _check(by: str, top_k: int, dictionary: Any, per_head: bool) -> None:
    if by not in _WAYS:
        raise ConfigError(f"by={by!r}: {nearest(str(by), _WAYS) or 'expected one of ' + ', '.join(_WAYS)}")
    if (by == "latent") != (dictionary is not None):
        raise ConfigError(f"by={by!r} {'needs' if by == 'latent' else 'takes no'} dictionary=…")
    if per_head and by != "token":
        raise ConfigError(f"per_head=True is for by='token'; by={by!r} has no source tokens")
    if type(top_k) is not int or top_k < 1:
        raise ConfigError(f"top_k={top_k!r}: expected a whole number ≥ 1")


def _finish(
    terms: Terms, readout: Readout, final: Float[Tensor, "row d_model"], asked: Target
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Add the soft-cap and the residue; returns the model's own number and the size of its logits."""
    logits = readout.logits(final.to(readout.unembed.weight), asked.columns).float().to(terms.values[0])
    total, size = asked.of(logits), logits.abs().amax(1)
    if readout.cap is not None:
        before = replace(readout, cap=None).logits(final.to(readout.unembed.weight), asked.columns)
        before = before.to(logits)
        terms.add("soft_cap", "cap", total - asked.of(before))
        size = torch.maximum(size, before.abs().amax(1))
    terms.add("residue", "residue", total - sum(value.to(total).sum(0) for value in terms.values))
    return total, size


def _check_residue(hm: HookManager, values: Float[Tensor, "term row"], size: Float[Tensor, " row"]) -> None:
    half = hm.dtype not in (torch.float32, torch.float64)
    largest = torch.maximum(size.cpu(), values.abs().amax(0)) if half else size.cpu()
    left = values[-1].abs() / largest.clamp(min=1.0)
    if not bool((left <= (_HALF if half else _EXACT)).all()):
        row = int(left.nan_to_num(nan=torch.inf).argmax())
        raise ModelError(
            f"{hm.map.family}: the terms leave {float(values[-1, row]):.1e} of the logit of row {row} over (logits are "
            f"about {float(size[row]):.2g}), more than rounding: something between writes to its stream"
        )


def _names(hm: HookManager, tokens: Tokens) -> list[list[str]]:
    return [token_names(hm, ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
