"""Activation patching: one run with one activation of another, everywhere in turn.

Source: Vig et al. (2020), arXiv 2004.12265, and Meng et al. (2022), arXiv 2202.05262 §2, in the form of Heimersheim and
Nanda (2024), arXiv 2404.15255 (denoising with a corrupted prompt instead of noise). The cells are exact; they run on
the sweep engine (`interp.core.sweep`) instead of one forward each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.disk import digest, weights_digest
from interp.core.errors import DataError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.metrics import refuse_nan
from interp.core.result import Provenance
from interp.core.run import BySite, Run
from interp.core.site import KINDS, Site
from interp.core.sweep import Sweep
from interp.core.sweep_cells import Cells
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.ablation import mean_values
from interp.patching.cells import grid_cells, latent_cells
from interp.patching.options import PatchOptions
from interp.patching.places import Places, check_lengths, grouped, position_places, span_places
from interp.patching.result import PatchResult
from interp.patching.resume import Progress

__all__ = ["activation_patch"]

_HEAD_AXES = ("n_heads", "n_kv_heads")
_AXES = {"pos": "position", "pos_head": "position, head", "span_head": "span, head"}


def activation_patch(
    hm: HookManager,
    clean: Any,
    corrupted: Any = None,
    *,
    sites: str | Sequence[Site | str],
    metric: Any = None,
    pos: int | Sequence[int] | None = None,
    progress: bool = True,
    options: PatchOptions | None = None,
) -> PatchResult:
    """Put each clean activation into the corrupted run, one cell at a time (denoising: is it enough?).

    Sites with a head axis are patched head by head, others position by position; `options` say otherwise, and whether
    activations of the clean run are replaced instead (noising: is it needed?), by what, and how it runs. Patches that
    change nothing are not run, and their effect is exactly 0. Memory: the activations of all sites in both runs, and
    what the sweep takes (`interp.core.sweep_schedule`). On Ctrl-C what is done is returned, the rest NaN; with
    `resume=…` it is kept in that file, and the interrupt goes on.

    Args:
        hm: The model.
        clean: Prompts whose answer is right; whatever `hm.run` takes. Or `PromptPairs` (or `PairTokens`), which hold
            both sides.
        corrupted: As many prompts, each as long as its partner; left out with pairs.
        sites: A kind such as "resid_pre" (every layer), a glob, or sites; all with a head axis or all without.
        metric: Maps a run to one number per example; it sees the logits of the last token, [batch 1 d_vocab]. With
            pairs also a name that `PairTokens.metric` takes ("kl" is from the clean run), their logit difference by
            default. A list measures several in one sweep.
        pos: Positions from each row's first token, or back from its last. They are the columns of a position grid
            (None takes all); where the columns are no positions, they are patched together.
        progress: Show a bar on stderr when it is a terminal.
        options: Everything else; see `PatchOptions`.

    Returns:
        The metrics per cell and example, with both baselines.

    Raises:
        DataError: Prompts of unequal length (both tokenisations are shown), or no corrupted prompts or metric.
        SiteError: Sites with and without heads together.
        ShapeError: A metric that is not one number per example.

    Source: Vig et al. (2020); Meng et al. (2022), §2.
    """
    options = options or PatchOptions()
    chosen = _sites(hm, sites)
    job = _job(hm, clean, corrupted, metric, options)
    by = options.by or ("head" if _has_heads(chosen[0]) else "pos")
    if by in ("head", "pos_head", "span_head") and not _has_heads(chosen[0]):
        raise SiteError(f"by={by!r}: {chosen[0].short} has no heads; its axes are {' '.join(chosen[0].axes)}")
    runs = {side: hm.run(getattr(job, side), read=chosen, logits="last") for side in ("clean", "corrupted")}
    metrics = _metrics(job, metric, runs["clean"])
    measured = {side: [refuse_nan(_measure(m, runs[side]), _name(m), side) for m in metrics] for side in runs}
    bases = {side: torch.stack(values) for side, values in measured.items()}
    sweeps = [_sweep(hm, job, chosen, by, mode, pos, runs, metrics, options) for mode in options.modes]
    settings = _settings(chosen, by, pos, metrics, options)
    provenance = Provenance.of(hm, settings=settings, data=(job.clean.ids, job.corrupted.ids))
    values, done = _run(hm, sweeps, provenance, options, progress)
    n_sites, (labels, heads) = len(chosen), sweeps[0].labels
    values = values.unflatten(1, (len(sweeps), n_sites, -1)).movedim(1, 0)
    several = isinstance(metric, list | tuple)
    first, noised = (values[0] if several else values[0, 0]), None
    if len(sweeps) > 1:
        noised = values[1] if several else values[1, 0]
    notes = list(dict.fromkeys(note for s in sweeps for note in s.sweep.notes))
    return PatchResult(
        provenance=provenance,
        sites=[s.short for s in chosen],
        axis=_AXES.get(by, by),
        columns=labels,
        patched=first,
        clean=bases["clean"] if several else bases["clean"][0],
        corrupted=bases["corrupted"] if several else bases["corrupted"][0],
        unchanged=sweeps[0].sweep.unchanged.unflatten(0, (n_sites, -1)),
        metrics=[_name(m) for m in metrics],
        mode="both" if len(sweeps) > 1 else options.modes[0],
        ablation=options.ablation,
        noised=noised,
        heads=heads,
        notes=[*notes, *_cost(sweeps, done)],
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """Both sides of the pairs, and the pairs themselves where they were given."""

    clean: Tokens
    corrupted: Tokens
    pairs: PairTokens | None


@dataclass(frozen=True, eq=False)
class _Ready:
    """One direction, ready to run, the labels of its columns with each place's heads, and a digest of its edits."""

    sweep: Sweep
    labels: tuple[list[str], int]
    edits: str = ""


def _job(hm: HookManager, clean: Any, corrupted: Any, metric: Any, options: PatchOptions) -> _Job:
    if isinstance(clean, PromptPairs | PairTokens):
        if corrupted is not None:
            raise DataError("pairs hold their corrupted prompts; give activation_patch(hm, pairs, sites=…)")
        even = options.by not in ("span", "span_head")
        pairs = clean.tokens(hm, same_length=even) if isinstance(clean, PromptPairs) else clean
        job = _Job(pairs.clean, pairs.corrupted, pairs)
    else:
        if corrupted is None or metric is None:
            lacking = "corrupted prompts" if corrupted is None else "metric"
            raise DataError(
                f"no {lacking} given: give clean and corrupted prompts and a metric=…, or PromptPairs alone"
            )
        job = _Job(hm.to_tokens(clean), hm.to_tokens(corrupted), None)
    if len(job.clean) != len(job.corrupted):
        raise DataError(f"{len(job.clean)} clean prompts and {len(job.corrupted)} corrupted ones; give them in pairs")
    if options.by not in ("span", "span_head"):
        check_lengths(hm.tokenizer, job.clean, job.corrupted)
    return job


def _metrics(job: _Job, metric: Any, clean: Run) -> list[Any]:
    given = list(metric) if isinstance(metric, list | tuple) else [metric]
    found: list[Any] = []
    for one in given or [None]:
        if one is None or isinstance(one, str):
            if job.pairs is None:
                raise DataError(f"metric={one!r}: names are for PromptPairs, which know their answers; give a function")
            reference = clean.logits[:, 0] if one == "kl" else None
            one = job.pairs.metric(one or "logit_diff", reference=reference)
        elif not callable(one):
            raise ShapeError(f"metric={one!r}: expected a name or a function of a run")
        found.append(one)
    names = [_name(m) for m in found]
    double = next((n for n in names if names.count(n) > 1), None)
    if double is not None:
        raise DataError(f"two metrics are named {double!r}; name functions apart, for results are found by name")
    return found


def _name(metric: Any) -> str:
    return str(getattr(metric, "__name__", metric))


def _measure(metric: Callable[[Run], Tensor], out: Run) -> Float[Tensor, " batch"]:
    value = metric(out)
    batch = len(out.logits)
    if not isinstance(value, Tensor) or value.shape != (batch,):
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"the metric returned {what}; expected one number per example [batch] = [{batch}], such as logit_diff gives"
        )
    return value.detach().float().cpu()


# -- one direction -----------------------------------------------------------------------------------------------


def _sweep(
    hm: HookManager,
    job: _Job,
    sites: list[Site],
    by: str,
    mode: str,
    pos: Any,
    runs: Mapping[str, Run],
    metrics: list[Any],
    options: PatchOptions,
) -> _Ready:
    """The cells of one direction, and the sweep over them."""
    side, source = ("corrupted", "clean") if mode == "denoise" else ("clean", "corrupted")
    edited: Tokens = getattr(job, side)
    if by in ("span", "span_head"):
        places = span_places(edited, getattr(job, source), options.spans)
    else:
        places = position_places(edited, getattr(job, source), pos, hm.tokenizer)
        places = places if by in ("pos", "pos_head") else grouped(places)
    values = _values(hm, job, sites, places, by, (runs[side], runs[source]), options)
    cells: list[Cells] = []
    for site in sites:
        base = runs[side][site]
        if by == "latent":
            made, parts = latent_cells(site, values[site], base, places, options.dictionary, options.latents)
        else:
            made, parts = grid_cells(site, values[site], base, places, by)
        cells.append(made)
    labels = [" · ".join(p for p in (place, part) if p) for place in places.labels for part in parts]
    sweep = Sweep(hm, edited, cells, metrics, engine=options.engine, budget_bytes=options.budget_bytes)
    edits = _edits_digest(job, places, options) if options.resume else ""
    return _Ready(sweep, (labels or [""], len(parts)), edits)


def _edits_digest(job: _Job, places: Places, options: PatchOptions) -> str:
    """A digest of what data and settings do not say of a direction's edits: where they are, what is put in."""
    parts: list[Tensor | str] = [places.columns, places.other]
    if options.values is not None:
        named = {str(site): value for site, value in options.values.items()}
        parts += [part for name in sorted(named) for part in (name, torch.as_tensor(named[name]))]
    if options.ablation == "mean" and job.pairs is not None:
        parts.append(repr([facts.get("template") for facts in job.pairs.meta]))
    if isinstance(options.dictionary, torch.nn.Module):
        parts.append(weights_digest(options.dictionary))
    elif options.dictionary is not None:
        parts.append(options.dictionary.W_dec)
    return digest(*parts)


def _values(
    hm: HookManager,
    job: _Job,
    sites: list[Site],
    places: Places,
    by: str,
    both: tuple[Run, Run],
    options: PatchOptions,
) -> Mapping[Site, Tensor]:
    """What is put in the activations' place, in the columns of the edited run; `both` are that and the source run."""
    base, source = both
    if options.ablation == "resample":
        return {s: places.from_other(source[s], s.axes.index("pos")) for s in sites}
    if options.ablation == "zero":
        return {s: torch.zeros_like(source[s][:1, :1]) if s.axes[1] == "pos" else source[s][:1] * 0 for s in sites}
    if options.ablation == "mean":
        if job.pairs is None:
            raise DataError("ablation='mean' is over the pairs of a template; give PromptPairs")
        spans = places.labels if by in ("span", "span_head") else None
        return mean_values(hm, job.pairs, sites, spans=spans)
    given = options.values
    assert given is not None
    by_site = BySite({Site(k): v for k, v in given.items()}) if not isinstance(given, BySite) else given
    return {s: _fitted(by_site[s], s, base[s].shape) for s in sites}


def _fitted(value: Any, site: Site, shape: Sequence[int]) -> Tensor:
    """A given value with as many axes as its site: leading ones are added."""
    found = torch.as_tensor(value)
    found = found[(None,) * max(0, len(shape) - found.ndim)]
    if found.ndim > len(shape) or any(n not in (1, want) for n, want in zip(found.shape, shape, strict=True)):
        raise ShapeError(
            f"the value given for {site.short} has shape {tuple(torch.as_tensor(value).shape)}; expected one that fits "
            f"[{' '.join(site.axes)}] = {tuple(shape)}, each axis whole or 1"
        )
    return found


# -- all of it ---------------------------------------------------------------------------------------------------


def _run(
    hm: HookManager, sweeps: list[_Ready], provenance: Provenance, options: PatchOptions, show: bool
) -> tuple[Float[Tensor, "metric cell batch"], int]:
    """Run the sweeps one after another into one table of cells; on Ctrl-C keep what is done."""
    sizes = [len(s.sweep) for s in sweeps]
    first = sweeps[0].sweep
    identity = {
        "model": provenance.config_hash,
        "data": provenance.data_hash,
        "settings": provenance.settings,
        "weights": weights_digest(hm.model) if options.resume else "",
        "bases": digest(*(s.sweep.base for s in sweeps)) if options.resume else "",
        "edits": [s.edits for s in sweeps],
    }
    table = Progress(
        (len(first.metrics), sum(sizes), first.batch),
        identity=identity,
        path=options.resume,
        save_every=options.save_every,
    )
    low = 0
    try:
        with _bar(sum(sizes), int(table.done.sum()), show) as step:
            for ready, size in zip(sweeps, sizes, strict=True):
                for done in ready.sweep.finished(skip=table.done[low : low + size]):
                    table.add(done.cells + low, done.values)
                    step(len(done.cells))
                low += size
    except KeyboardInterrupt:
        if options.resume is not None:
            raise
    finally:
        table.save()
    return table.values, int(table.done.sum())


def _cost(sweeps: list[_Ready], done: int) -> list[str]:
    total, still = sum(len(s.sweep) for s in sweeps), sum(int(s.sweep.unchanged.sum()) for s in sweeps)
    notes = []
    if sweeps[0].sweep.plan != "naive" and still < total:
        factor = sum(len(s.sweep) for s in sweeps) / sum(len(s.sweep) / s.sweep.flop_factor() for s in sweeps)
        notes.append(f"one forward per cell would have been {factor:.3g} times the multiplications")
    if done < total:
        notes.append(f"stopped: {done} of {total} cells are done, the others are NaN")
    return notes


def _settings(sites: list[Site], by: str, pos: Any, metrics: list[Any], options: PatchOptions) -> dict[str, Any]:
    names = [_name(m) for m in metrics]
    return {
        "sites": [s.short for s in sites],
        "by": by,
        "pos": pos,
        "metric": names[0] if len(names) == 1 else names,
        "mode": "both" if len(options.modes) > 1 else options.modes[0],
        "ablation": options.ablation,
        "spans": options.spans,
        "latents": options.latents,
    }


def _sites(hm: HookManager, sites: str | Sequence[Site | str]) -> list[Site]:
    names: Sequence[Site | str] = [sites] if isinstance(sites, str) else list(sites)
    names = [f"*.{n}" if isinstance(n, str) and n in KINDS and KINDS[n].in_block else n for n in names]
    chosen = list(dict.fromkeys(site for name in names for site in hm.atlas.expand(name)))
    if not chosen:
        raise SiteError("no sites were given; give a kind such as 'resid_pre', or sites")
    sliced = next((s for s in chosen if s.where is not None), None)
    if sliced is not None:
        raise SiteError(f"{sliced!r}: a sweep edits whole sites; say where with pos=…, by='pos_head' or by='span'")
    if len({_has_heads(s) for s in chosen}) > 1:
        raise SiteError("some of these sites have a head axis and some do not; patch them in two calls")
    if len({KINDS[s.kind].axes for s in chosen}) > 1 and _has_heads(chosen[0]):
        raise SiteError(
            "these sites have different head axes (query heads, key/value heads); patch them in separate calls"
        )
    return chosen


def _has_heads(site: Site) -> bool:
    return any(axis in _HEAD_AXES for axis in KINDS[site.kind].axes)


@contextmanager
def _bar(total: int, initial: int, show: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, initial=initial, desc="patching", unit="cell", disable=None if show else True) as bar:
        yield bar.update
