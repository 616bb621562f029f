"""All evaluations that apply to some dictionaries, in one call and one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.core.errors import ConfigError, DataError, InterpError, ShapeError, nearest
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.evaluate.agreement import best_cosines, decoder_geometry, matched_cosine
from interp.evaluate.baseline import PCA, fit_pca
from interp.evaluate.dark_matter import dark_matter_of
from interp.evaluate.definitions import DEFINITIONS, PARTS
from interp.evaluate.description_length import description_length_of
from interp.evaluate.dictionary import DictionaryEvaluation, evaluate_dictionaries
from interp.evaluate.evaluations import Evaluations, Rows
from interp.evaluate.labels import LabelScores, label_scores, of_the_world
from interp.evaluate.labels_any import labels_found_by_any
from interp.evaluate.place import place_of, target_of
from interp.evaluate.planted import PlantedWorld, planted_scores
from interp.evaluate.samples import Samples
from interp.evaluate.sums import Subject
from interp.testbed.text import WORLD_TASKS, LabelledTokens, Text

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Trained", "evaluate_all", "evaluate_planted"]

_DENSE = 0.1
_KEPT = 1 << 30  # bytes of a site's activations that are kept, instead of running the model again
_PLANTED = [name.removeprefix("planted_") for name, one in DEFINITIONS.items() if one.part == "planted"]
_DARK = {
    "fvu_nonlinear": "fvu_nonlinear",
    "linear_share": "linear_share",
    "r2": "error_r2",
    "r2_pooled": "error_r2_pooled",
    "norm_r2": "error_norm_r2",
}
_LENGTH = {
    **{name: name for name in ("bits", "bits_firing", "bits_values", "bits_joint")},
    "undersampling": "bits_undersampling",
    "dense_bits": "bits_dense",
    "dense_bits_matched": "bits_dense_matched",
    "one_hot_bits": "bits_one_hot",
}


@dataclass(frozen=True)
class Trained:
    """How a dictionary was trained, as far as comparisons need it.

    Attributes:
        setting: everything but the seed; dictionaries of one setting are reseeds of one another.
        seed: its seed; −1 where it is not known.
        pca_rank: rank of the PCA that is measured beside; None for its k, 0 for none.
    """

    setting: str
    seed: int = -1
    pca_rank: int | None = None


def evaluate_all(
    hm: "HookManager",
    dictionaries: Mapping[str, Dictionary],
    tokens: TokenSource,
    *,
    fit_tokens: TokenSource | None = None,
    trained: Mapping[str, Trained] | None = None,
    only: Sequence[str] = (),
    max_tokens: int = 100_000,
) -> Evaluations:
    """Measure dictionaries in every way that applies to them, on the same text, in one tidy table.

    The parts are `interp.evaluate.definitions.PARTS`: core, geometry, seeds, dark_matter, description_length, and
    labels for models of the small world. What does not apply is left out, and a note says why. SCR and TPP are left
    out for all: a reliability audit found them unfit at canonical settings.

    Args:
        hm: the manager of the model.
        dictionaries: name → a dictionary that says where it was trained, on the model's device.
        tokens: text that none of them was trained on.
        fit_tokens: other text, to fit the PCA that stands beside each SAE; None for no PCA.
        trained: name → its setting and seed; by default each dictionary is a setting of its own.
        only: parts to measure; all by default.
        max_tokens: how many tokens to run for each part, special ones and pads included; whole blocks are run.

    Returns:
        Every figure with its interval, and the noise between seeds where there are seeds.

    Raises:
        ConfigError: no dictionary, an unknown part, or a dictionary that does not fit the model.
        DataError: the text has no token that counts.

    Source: that noise between seeds belongs beside every figure, and that SCR and TPP do not belong there: Chanin
    2026 (2605.18229); for the figures see the functions that measure them.
    """
    wanted = _parts(only)
    if not dictionaries:
        raise ConfigError("no dictionary was given; give at least one, by name")
    places = {name: place_of(hm, dictionary) for name, dictionary in dictionaries.items()}
    how = {name: (trained or {}).get(name, Trained(name)) for name in dictionaries}
    targets = {name: target_of(hm, dictionary, places[name]) for name, dictionary in dictionaries.items()}
    rows = Rows()
    if "core" in wanted:
        pcas = _pcas(hm, dictionaries, places, how, fit_tokens, max_tokens)
        subjects = [Subject(d, places[name], targets[name], pcas.get(name)) for name, d in dictionaries.items()]
        for name, found in zip(
            dictionaries, evaluate_dictionaries(hm, subjects, tokens, max_tokens=max_tokens), strict=True
        ):
            _core(rows, name, found)
    if "geometry" in wanted:
        for name, dictionary in dictionaries.items():
            _geometry(rows, name, dictionary)
    if "seeds" in wanted:
        _seeds(rows, dictionaries, how)
    at = {
        site: Samples.of_text(hm, tokens, site, max_tokens=max_tokens, doing="reading activations").remembered(_KEPT)
        for site in dict.fromkeys(places.values())
    }
    for part, measure in (("dark_matter", _dark_matter), ("description_length", _description_length)):
        for name, dictionary in dictionaries.items() if part in wanted else ():
            if targets[name] != places[name]:
                rows.notes.append(f"{name}: {part} is of what reconstructs what it reads, not of a transcoder")
            else:
                _noted(rows, name, part, measure, (at[places[name]], dictionary, places[name], max_tokens))
    if "labels" in wanted and of_the_world(hm):
        labelled = Text("evaluation", tasks=WORLD_TASKS).labelled_rows(-(-max_tokens // tokens.ctx), tokens.ctx)
        _labels(rows, hm, labelled, dictionaries, places)
    elif only and "labels" in wanted:
        rows.notes.append(f"labels are known of the small world alone, and {hm.name} is no model of it")
    settings = {"max_tokens": max_tokens, "parts": wanted, "special_tokens": "left out", "text": tokens.describe()}
    return rows.result(
        list(dictionaries),
        [one.setting for one in how.values()],
        [one.seed for one in how.values()],
        [_said(places[name], targets[name]) for name in dictionaries],
        Provenance.of(hm, settings=settings),
    )


@torch.no_grad()
def evaluate_planted(
    dictionaries: Mapping[str, Dictionary],
    world: PlantedWorld,
    *,
    trained: Mapping[str, Trained] | None = None,
    n_tokens: int = 20_000,
    seed: int = 1,
) -> Evaluations:
    """Score dictionaries against the planted atoms that their activations were made of, in one tidy table.

    Args:
        dictionaries: name → a dictionary of such activations.
        world: what they were made of.
        trained: name → its setting and seed; by default each dictionary is a setting of its own.
        n_tokens: tokens to draw.
        seed: of the draw; take another than that of the training.

    Returns:
        Scores and geometry of each, with the noise between seeds where there are seeds.

    Raises:
        ConfigError: no dictionary.
        ShapeError: a dictionary of another width.

    Source: as for `planted_scores`.
    """
    if not dictionaries:
        raise ConfigError("no dictionary was given; give at least one, by name")
    how = {name: (trained or {}).get(name, Trained(name)) for name in dictionaries}
    rows, (x, codes) = Rows(), world.sample(n_tokens, seed=seed)
    for name, dictionary in dictionaries.items():
        found = planted_scores(dictionary, world.atoms, codes, x)
        figures = {f"planted_{key}": float(getattr(found, key)) for key in _PLANTED}
        ends = {f"planted_{key}": pair for key, pair in found.intervals.items()}
        rows.add(name, figures, intervals=ends, n_tokens=n_tokens, unit="token")
        _geometry(rows, name, dictionary)
    _seeds(rows, dictionaries, how)
    settings = {"n_tokens": n_tokens, "seed": seed, "world": str(world)}
    return rows.result(
        list(dictionaries),
        [one.setting for one in how.values()],
        [one.seed for one in how.values()],
        ["planted atoms"] * len(dictionaries),
        Provenance(model="", settings=settings, seed=seed),
    )


def _parts(only: Sequence[str]) -> list[str]:
    known = [name for name in PARTS if name != "planted"]
    unknown = [name for name in only if name not in known]
    if unknown:
        hint = nearest(unknown[0], known) or f"there are {', '.join(known)}"
        raise ConfigError(f"there is no part {unknown[0]!r}; {hint}")
    return [name for name in known if not only or name in only]


def _said(reads: Site, gives: Site) -> str:
    return reads.short if reads == gives else f"{reads.short} → {gives.short}"


def _pcas(
    hm: "HookManager",
    dictionaries: Mapping[str, Dictionary],
    places: Mapping[str, Site],
    how: Mapping[str, Trained],
    tokens: TokenSource | None,
    max_tokens: int,
) -> dict[str, PCA]:
    """The PCA beside each SAE: one fit for a site, one object for a rank."""
    if tokens is None:
        return {}
    wanted: dict[str, tuple[Site, int]] = {}
    for name, dictionary in dictionaries.items():
        rank = how[name].pca_rank
        rank = getattr(dictionary.cfg, "k", 0) if rank is None else rank
        if rank and not dictionary.has_skip and "transcoder" not in dictionary.cfg.architecture:
            wanted[name] = places[name], min(rank, dictionary.cfg.d_in)
    most = {site: max(rank for other, rank in wanted.values() if other == site) for site, _ in wanted.values()}
    fitted = {site: fit_pca(hm, tokens, site, rank=rank, max_tokens=max_tokens) for site, rank in most.items()}
    known = {key: fitted[key[0]].truncated(key[1]) for key in set(wanted.values())}
    return {name: known[key] for name, key in wanted.items()}


def _core(rows: Rows, name: str, found: DictionaryEvaluation) -> None:
    of_losses = ("ce_", "kl", "pca_ce")
    density = found.density[found.firing > 0]
    held = {key: value for key, value in found.scalars().items() if key in DEFINITIONS}
    held |= {
        "dense": float((found.density > _DENSE).double().mean()),
        "density_median": float(density.median()) if len(density) else math.nan,
    }
    known = {key: math.nan if value is None else value for key, value in held.items()}
    without = {key for key in known if key.startswith("pca_") and found.pca_rank is None}
    for losses in (False, True):
        figures = {k: v for k, v in known.items() if k.startswith(of_losses) == losses and k not in without}
        n = found.n_predictions if losses else found.n_tokens
        rows.add(name, figures, intervals=found.intervals, n_tokens=n, unit="row")
    rows.firing[name], rows.fired_on[name] = found.firing, found.n_tokens
    rows.core[name] = found.scalars()


def _geometry(rows: Rows, name: str, dictionary: Dictionary) -> None:
    shape = decoder_geometry(dictionary)
    figures = {
        "effective_rank": shape.effective_rank,
        "participation": shape.participation,
        "nearest_cosine": float(shape.nearest.nanmean()),
        "encoder_cosine": float(shape.encoder_cosine.nanmean()),
        "zero_rows": float(shape.n_zero),
    }
    rows.add(name, figures)
    rows.nearest[name] = shape.nearest.float()


def _seeds(rows: Rows, dictionaries: Mapping[str, Dictionary], how: Mapping[str, Trained]) -> None:
    """How alike the seeds of each setting are: of each dictionary, the mean over the others."""
    for setting in dict.fromkeys(one.setting for one in how.values()):
        names = [name for name, one in how.items() if one.setting == setting]
        for name in names if len(names) > 1 else ():
            found: dict[str, list[float]] = {"mmcs_seeds": [], "uniqueness_seeds": [], "matched_cosine_seeds": []}
            mine = dictionaries[name]
            for other in (dictionaries[one] for one in names if one != name):
                best, at = best_cosines(mine, other)
                found["mmcs_seeds"].append(float(best.mean()))
                found["uniqueness_seeds"].append(len(at.unique()) / len(at))
                try:
                    found["matched_cosine_seeds"].append(matched_cosine(mine, other).mean)
                except ConfigError as err:
                    found["matched_cosine_seeds"].append(math.nan)
                    if (note := f"{setting}: no matched cosine between seeds: {err}") not in rows.notes:
                        rows.notes.append(note)
            rows.add(name, {key: sum(values) / len(values) for key, values in found.items()})


def _noted(rows: Rows, name: str, part: str, measure: Any, arguments: tuple[Any, ...]) -> None:
    """Measure, or note why not: one part that cannot be is no reason to lose the others."""
    try:
        measure(rows, name, *arguments)
    except (ConfigError, DataError, ShapeError) as err:
        rows.notes.append(f"{name}: {part} was not measured: {_first_line(err)}")


def _first_line(err: InterpError) -> str:
    return " ".join(str(err).split())


def _dark_matter(rows: Rows, name: str, samples: Samples, dictionary: Dictionary, place: Site, most: int) -> None:
    found = dark_matter_of(samples, dictionary, site=place, max_tokens=most)
    figures = {ours: getattr(found, theirs) for theirs, ours in _DARK.items()}
    ends = {ours: found.intervals[theirs] for theirs, ours in _DARK.items()}
    rows.add(name, figures, intervals=ends, n_tokens=found.n_tokens, unit=found.unit)
    rows.notes += [f"{name}: {note}" for note in found.notes]


def _description_length(
    rows: Rows, name: str, samples: Samples, dictionary: Dictionary, place: Site, most: int
) -> None:
    found = description_length_of(
        samples, dictionary, site=place, max_tokens=most, sample_tokens=max(2, min(4096, most // 4))
    )
    figures = {ours: getattr(found, theirs) for theirs, ours in _LENGTH.items()}
    ends = {_LENGTH[theirs]: pair for theirs, pair in found.intervals.items() if theirs in _LENGTH}
    rows.add(name, figures, intervals=ends, n_tokens=found.n_tokens, unit=found.unit)
    rows.notes += [f"{name}: {note}" for note in found.notes]


def _labels(
    rows: Rows,
    hm: "HookManager",
    labelled: LabelledTokens,
    dictionaries: Mapping[str, Dictionary],
    places: Mapping[str, Site],
) -> None:
    """The labels that each finds, and those that any of them does."""
    scored = dict[str, LabelScores]()
    for name, dictionary in dictionaries.items():
        # Random directions at one site are not to be those of another dictionary there.
        seed = sum(places[one] == places[name] for one in scored)
        _noted(rows, name, "labels", _labels_of, (hm, labelled, dictionary, places[name], seed, scored))
    if len(scored) > 1:
        rows.of_any(f"any of {len(scored)} of {hm.name}", labels_found_by_any(scored))


def _labels_of(
    rows: Rows,
    name: str,
    hm: "HookManager",
    labelled: LabelledTokens,
    dictionary: Dictionary,
    place: Site,
    seed: int,
    scored: dict[str, LabelScores],
) -> None:
    found = scored[name] = label_scores(hm, dictionary, labelled, place, seed=seed)
    ends = {"labels_found": found.found_interval}
    rows.add(name, found.figures(), intervals=ends, n_tokens=found.n_tokens, unit="row")
    rows.labels[name] = {str(k): v for k, v in found.to_frame().to_dict("list").items()}
