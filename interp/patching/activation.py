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
from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.metrics import refuse_nan
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.site import KINDS, Site
from interp.core.sweep import Sweep
from interp.core.sweep_cells import Cells
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.cells import grid_cells
from interp.patching.entries import align_keys, entry_cells, entry_labels
from interp.patching.latents import latent_cells, read_sites
from interp.patching.noise import Noise, mean_of_draws, noise_at, noisy_cells
from interp.patching.options import PatchOptions
from interp.patching.places import check_lengths, grouped, position_places, span_places
from interp.patching.result import PatchResult
from interp.patching.resume import Progress
from interp.patching.values import PatchData, replacements

__all__ = ["activation_patch"]

_HEAD_AXES = ("n_heads", "n_kv_heads")
_AXES = {
    "pos": "position",
    "pos_head": "position, head",
    "span_head": "span, head",
    "dest_src": "dest, src",
    "dest_src_head": "dest, src, head",
}


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
        pos: Positions from each row's first token, or back from its last. They are the columns of a position grid, or
            the destinations of a grid of entries (None takes all); where the columns are no positions, they are
            patched together.
        progress: Show a bar on stderr when it is a terminal.
        options: Everything else; see `PatchOptions`.

    Returns:
        The metrics per cell and example, with both baselines.

    Raises:
        ConfigError: Optimal constants at some positions alone.
        DataError: Prompts of unequal length (both tokenisations are shown), or no corrupted prompts or metric.
        SiteError: Sites with and without heads together.
        ShapeError: A metric that is not one number per example.

    Source: Vig et al. (2020); Meng et al. (2022), §2.
    """
    options = options or PatchOptions()
    chosen = _sites(hm, sites)
    job = _job(hm, clean, corrupted, metric, options)
    by = _columns(chosen, pos, options)
    reads = read_sites(hm, chosen, options)
    read = list(dict.fromkeys([*chosen, *reads.values()]))
    runs = {side: hm.run(getattr(job, side), read=read, logits="last") for side in ("clean", "corrupted")}
    metrics = _metrics(job, metric, runs["clean"])
    bases = _bases(metrics, runs)
    sweeps = [_sweep(hm, job, chosen, reads, by, mode, pos, runs, metrics, options) for mode in options.modes]
    settings = _settings(chosen, reads, by, pos, metrics, options)
    provenance = Provenance.of(hm, settings=settings, data=(job.clean.ids, job.corrupted.ids))
    values, done = _run(hm, sweeps, provenance, options, progress)
    n_sites, n_draws = len(chosen), options.draws
    values = mean_of_draws(values, sweeps[0].sweep.base, n_sites, n_draws)
    values = values.unflatten(1, (len(sweeps), n_sites, -1)).movedim(1, 0)
    halves = list(values) if (several := isinstance(metric, list | tuple)) else [half[0] for half in values]
    notes = list(dict.fromkeys(note for s in sweeps for note in s.sweep.notes))
    return PatchResult(
        provenance=provenance,
        sites=[s.short for s in chosen],
        axis=_AXES.get(by, by),
        columns=sweeps[0].labels,
        patched=halves[0],
        clean=bases["clean"] if several else bases["clean"][0],
        corrupted=bases["corrupted"] if several else bases["corrupted"][0],
        unchanged=sweeps[0].sweep.unchanged.unflatten(0, (n_sites, n_draws, -1)).all(1),
        metrics=[_name(m) for m in metrics],
        mode="both" if len(sweeps) > 1 else options.modes[0],
        ablation=options.ablation,
        noised=halves[1] if len(halves) > 1 else None,
        heads=sweeps[0].n_parts,
        keys=sweeps[0].keys,
        notes=[*notes, *_cost(sweeps, done)],
    )


@dataclass(frozen=True, eq=False)
class _Ready:
    """One direction, ready to run; labels of its columns and keys, parts of a place, a digest of the places."""

    sweep: Sweep
    labels: list[str]
    n_parts: int
    keys: list[str]
    edits: str


def _bases(metrics: Sequence[Any], runs: Mapping[str, Run]) -> dict[str, Float[Tensor, "metric batch"]]:
    """Each metric on either side; a model that gives NaN is refused."""
    measured = {side: [refuse_nan(_measure(m, run), _name(m), side) for m in metrics] for side, run in runs.items()}
    return {side: torch.stack(values) for side, values in measured.items()}


def _columns(sites: list[Site], pos: Any, options: PatchOptions) -> str:
    """What the columns are, after refusing what these sites do not have."""
    by = options.by or ("head" if _has_heads(sites[0]) else "pos")
    if by in ("head", "pos_head", "span_head") and not _has_heads(sites[0]):
        raise SiteError(f"by={by!r}: {sites[0].short} has no heads; its axes are {' '.join(sites[0].axes)}")
    unkeyed = next((s for s in sites if "src" not in s.axes), None)
    if by in ("dest_src", "dest_src_head") and unkeyed is not None:
        raise SiteError(
            f"by={by!r}: {unkeyed.short} has axes {' '.join(unkeyed.axes)}; use it at pattern or attn_scores"
        )
    if options.ablation == "optimal" and pos is not None:
        raise ConfigError("ablation='optimal': a constant is fitted for all positions at once; leave pos out")
    return by


def _job(hm: HookManager, clean: Any, corrupted: Any, metric: Any, options: PatchOptions) -> PatchData:
    if isinstance(clean, PromptPairs | PairTokens):
        if corrupted is not None:
            raise DataError("pairs hold their corrupted prompts; give activation_patch(hm, pairs, sites=…)")
        even = options.by not in ("span", "span_head")
        pairs = clean.tokens(hm, same_length=even) if isinstance(clean, PromptPairs) else clean
        job = PatchData(pairs.clean, pairs.corrupted, pairs)
    else:
        if corrupted is None or metric is None:
            lacking = "corrupted prompts" if corrupted is None else "metric"
            raise DataError(
                f"no {lacking} given: give clean and corrupted prompts and a metric=…, or PromptPairs alone"
            )
        job = PatchData(hm.to_tokens(clean), hm.to_tokens(corrupted), None)
    if len(job.clean) != len(job.corrupted):
        raise DataError(f"{len(job.clean)} clean prompts and {len(job.corrupted)} corrupted ones; give them in pairs")
    if options.by not in ("span", "span_head"):
        check_lengths(hm.tokenizer, job.clean, job.corrupted)
    return job


def _metrics(job: PatchData, metric: Any, clean: Run) -> list[Any]:
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
    job: PatchData,
    sites: list[Site],
    reads: Mapping[Site, Site],
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
        places = places if by in ("pos", "pos_head", "dest_src", "dest_src_head") else grouped(places)
    noisy = options.ablation == "gaussian"
    both, at = (runs[side], runs[source]), [reads.get(s, s) for s in sites]
    values = {} if noisy else replacements(hm, job, at, places, by, both, options)
    if options.ablation == "resample":
        values = align_keys(values, runs[side], edited, getattr(job, source))
    keys = position_places(edited, edited, None, hm.tokenizer) if by.startswith("dest_src") else None
    cells: list[Cells] = []
    for site in sites:
        base = runs[side][site]
        if noisy:
            made, parts = grid_cells(site, None, base, places, by)
            made = noisy_cells(made, _noise(hm, edited, site, base, options))
        elif keys is not None:
            made, parts = entry_cells(site, values[site], base, places, keys, by_head=by == "dest_src_head")
        elif by == "latent":
            read, which = reads[site], options.latents
            there, here, width = values[read], runs[side][read], base.shape[-1]
            made, parts = latent_cells(
                site, there, here, places, dictionary=options.dictionary, latents=which, width=width
            )
        else:
            made, parts = grid_cells(site, values[site], base, places, by)
        cells.append(made)
    labels = [" · ".join(p for p in (place, part) if p) for place in places.labels for part in parts]
    if keys is not None:
        labels = entry_labels(places, keys, parts)
    sweep = Sweep(hm, edited, cells, metrics, engine=options.engine, budget_bytes=options.budget_bytes)
    # What data and settings do not say: where the edits are, and which prompts share a mean.
    forms = "" if job.pairs is None else repr([facts.get("template") for facts in job.pairs.meta])
    edits = digest(places.columns, places.other, forms) if options.resume else ""
    return _Ready(sweep, labels or [""], len(parts), keys.labels if keys is not None else [], edits)


def _noise(hm: HookManager, edited: Tokens, site: Site, base: Tensor, options: PatchOptions) -> Noise:
    scale, draws, seed = options.sigmas, options.draws, options.seed or 0
    special = hm.special_mask(edited.ids)
    return noise_at(site, base, edited.mask, special, scale=scale, n_draws=draws, seed=seed)


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
        "given": _digest_of_given(options) if options.resume else "",
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


def _digest_of_given(options: PatchOptions) -> str:
    """What tells values and dictionaries apart that somebody gave, or "" where none are."""
    tensors = list((options.values or {}).values())
    for name in ("W_enc", "b_enc", "W_dec"):
        weight = getattr(options.dictionary, name, None)
        tensors += [weight] if isinstance(weight, Tensor) else []
    if isinstance(options.fit_on, PairTokens):
        tensors += [options.fit_on.clean.ids, options.fit_on.clean.mask]
    texts = [repr(list(options.fit_on))] if isinstance(options.fit_on, PromptPairs) else []
    return digest(*tensors, *texts) if tensors or texts else ""


def _cost(sweeps: list[_Ready], done: int) -> list[str]:
    total, still = sum(len(s.sweep) for s in sweeps), sum(int(s.sweep.unchanged.sum()) for s in sweeps)
    notes = []
    if sweeps[0].sweep.plan != "naive" and still < total:
        factor = sum(len(s.sweep) for s in sweeps) / sum(len(s.sweep) / s.sweep.flop_factor() for s in sweeps)
        notes.append(f"one forward per cell would have been {factor:.3g} times the multiplications")
    if done < total:
        notes.append(f"stopped: {done} of {total} cells are done, the others are NaN")
    return notes


def _settings(
    sites: list[Site], reads: Mapping[Site, Site], by: str, pos: Any, metrics: list[Any], options: PatchOptions
) -> dict[str, Any]:
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
        **({"reads": [s.short for s in reads.values()]} if reads else {}),
        **options.extra,
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
