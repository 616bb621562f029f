"""The residual streams that a lens reads, at all positions or some, from a new forward or from a run that is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, SiteError
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where

__all__ = ["RESIDUALS", "Streams", "capture_streams", "checked_readout", "last_stream", "residual_sites"]

RESIDUALS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, eq=False)
class Streams:
    """Residual streams with the model's own logits beside them.

    Args:
        sites: the sites.
        streams: their activations.
        final: the model's logits at the same places.
        readout: the way from the last stream to them, checked.
        tokens: ids at the positions read, on the host.
        mask: True where one is real.
        columns: the positions read, as columns of the padded batch.
        all_tokens, all_mask: those of the whole batch.
    """

    sites: list[Site]
    streams: list[Float[Tensor, "batch pos d_model"]]
    final: Float[Tensor, "batch pos d_vocab"]
    readout: Readout
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    columns: Int[Tensor, "batch pos"]
    all_tokens: Int[Tensor, "batch width"]
    all_mask: Bool[Tensor, "batch width"]


def last_stream(hm: HookManager) -> Site:
    """Return the stream that leaves the last block."""
    return Site(f"{hm.n_layers - 1}.resid_post")


def checked_readout(hm: HookManager, out: Run, last: Site) -> Readout:
    """Return the model's readout, held against the last logits of a run.

    Args:
        hm: the model.
        out: a run with logits="last".
        last: its read of the final stream at each row's last token.

    Raises:
        ModelError: the model makes its logits in another way.
    """
    readout = Readout.of(hm)
    readout.check(out[last], out.logits[:, 0])
    return readout


def residual_sites(hm: HookManager, sites: Sequence[Site | str] | None) -> list[Site]:
    """Return the residual sites that names and globs stand for; `0.resid_pre` and every `resid_post` for None.

    Raises:
        SiteError: none, or one that is no whole residual stream.
    """
    wanted: Sequence[Site | str] = ["0.resid_pre", "*.resid_post"] if sites is None else sites
    chosen = [site for name in wanted for site in hm.atlas.expand(name)]
    wrong = next((s for s in chosen if s.kind not in RESIDUALS or s.where is not None), None)
    if wrong is not None or not chosen:
        what = f"{wrong!r} is not a whole residual stream" if wrong is not None else "no sites were given"
        raise SiteError(
            f"the logit lens reads {', '.join(RESIDUALS)}: {what}; for what a part writes, see direction_logits"
        )
    return list(dict.fromkeys(chosen))


def capture_streams(hm: HookManager, text: Any, sites: Sequence[Site | str] | None, pos: Any) -> Streams:
    """Return the residual streams of a text, or of a run.

    Args:
        hm: the model.
        text: whatever `hm.run` takes, or a `Run`.
        sites: as for `residual_sites`; of a run, None takes all residual sites it has.
        pos: positions in each row's own tokens, or None for all.

    Raises:
        SiteError: a site that is no residual stream, or one that the run lacks.
        DataError: positions asked of a run, which has its own.
        WhereError: a position that a row does not have.
        ModelError: the model makes its logits in another way than the readout knows.
    """
    if isinstance(text, Run):
        if pos is not None:
            raise DataError("a Run was read where it was read: leave pos=… out, and slice its reads with Site(…).at")
        return _of_run(hm, text, sites)
    chosen, last = residual_sites(hm, sites), last_stream(hm)
    if pos is None:
        out = hm.run(text, read=list(dict.fromkeys([*chosen, last])), logits="all")
        readout = Readout.of(hm)
        readout.check(out[last], out.logits)
        return _streams(out, chosen, None, out.logits, readout)
    tokens = hm.to_tokens(text)
    where = Where(pos=pos[:, None] if isinstance(pos, Tensor) and pos.ndim == 1 else [pos] if _is_one(pos) else pos)
    end = last.at(pos=-1)
    reads = [Site(site, where=where) for site in dict.fromkeys([*chosen, last])]
    out = hm.run(tokens, read=[*reads, *([] if end in reads else [end])], logits="last")
    readout = checked_readout(hm, out, end)
    with torch.no_grad():
        final = readout.logits(out[Site(last, where=where)])
    return _streams(out, chosen, where, final, readout)


def _is_one(pos: Any) -> bool:
    return hasattr(pos, "__index__") and not isinstance(pos, Tensor)


def _of_run(hm: HookManager, run: Run, sites: Sequence[Site | str] | None) -> Streams:
    if run.tokens is None or run.mask is None:
        raise DataError("this run was given embeddings, so there are no tokens to show; run tokens")
    last = last_stream(hm)
    here = [site for site in hm.atlas.sites() if site.kind in RESIDUALS and site in run]
    chosen = residual_sites(hm, [s for s in here if s.kind != "resid_mid"] if sites is None and here else sites)
    lacking = [site.short for site in (*chosen, last) if site not in run]
    if lacking:
        raise SiteError(f"this run lacks streams that the lens reads; add to read=[…]: {', '.join(map(repr, lacking))}")
    wheres = {run.find(site).where for site in (*chosen, last)}
    where = wheres.pop()
    others = None if where is None else Where(pos=where.pos)
    if wheres or where != others or isinstance(getattr(where, "pos", None), slice):
        raise SiteError("the lens reads streams that are whole, or all sliced by one pos=…; read them so")
    tokens = Tokens(run.tokens.cpu(), run.mask.cpu())
    if where is None and run.has_logits and run.logits.shape[1] == tokens.ids.shape[1]:
        readout = Readout.of(hm)
        readout.check(run[last], run.logits)
        return _streams(run, chosen, None, run.logits, readout)
    row = Tokens(tokens.ids[:1], tokens.mask[:1])
    readout = checked_readout(hm, hm.run(row, read=[last.at(pos=-1)], logits="last"), last.at(pos=-1))
    with torch.no_grad():
        final = readout.logits(_with_positions(run[last]))
    return _streams(run, chosen, where, final, readout)


def _with_positions(x: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """A stream read at one position has no axis for it."""
    return x[:, None] if x.ndim == 2 else x


def _streams(
    out: Run, chosen: list[Site], where: Where | None, final: Float[Tensor, "batch pos d_vocab"], readout: Readout
) -> Streams:
    assert out.tokens is not None and out.mask is not None
    tokens, mask = out.tokens.cpu(), out.mask.cpu()
    columns = torch.arange(tokens.shape[1]).expand_as(tokens) if where is None else _columns(where.pos, mask)
    return Streams(
        sites=chosen,
        streams=[_with_positions(out[site if where is None else Site(site, where=where)]) for site in chosen],
        final=final,
        readout=readout,
        tokens=tokens.gather(1, columns),
        mask=mask.gather(1, columns),
        columns=columns,
        all_tokens=tokens,
        all_mask=mask,
    )


def _columns(pos: Any, mask: Bool[Tensor, "batch width"]) -> Int[Tensor, "batch n"]:
    """Columns of positions that are counted in each row's own tokens; a run has been made of them, so they exist."""
    given = pos if isinstance(pos, Tensor) else torch.tensor([pos] if isinstance(pos, int) else list(pos))
    given = given.reshape(len(mask), -1) if isinstance(pos, Tensor) else given.expand(len(mask), -1)
    places = torch.where(given >= 0, given, mask.sum(1, keepdim=True) + given)
    return (~mask).long().argsort(dim=1, stable=True).gather(1, places)
