"""`compare_methods`: detection and steering of many concepts by many methods, in one loop, beside their controls.

Source: Wu et al. (2025), "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", arXiv
2501.17148, §3 and §4: detection by the largest score over a text's tokens; steering by the harmonic mean of scores from
0 to 2, with the factor chosen on half of the prompts and scored on the others. Departures: factors are in units of the
activation's norm for every method, so that controls make edits of the same size; fluency is measured, not judged, and
so is the concept where no judge is given; each score stands beside that of the better control.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import UNITS, Dose
from interp.core.errors import ConfigError, DataError, InterpError
from interp.core.fit import auroc
from interp.core.manager import HookManager
from interp.core.metrics import loss_per_token
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.concept import Concept
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.same_text import row_keys
from interp.steering.concepts.contenders import CONTROLS, METHODS, Contender, Fit
from interp.steering.concepts.methods_table import MethodsTable
from interp.steering.evaluating.dose_effects import Sampling, continue_prompts
from interp.steering.evaluating.dose_rows import read_doses
from interp.steering.evaluating.judges import Judge, Judged, WordJudge, harmonic_mean, judged

__all__ = ["CompareOptions", "WordShare", "compare_methods", "detection_scores"]

ASPECTS = ("concept", "instruction", "fluency")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """How steering is tried.

    Args:
        factors: doses that are tried, in `unit`, for methods that do not bring their own.
        unit: one of `UNITS`. "rms" gives every method edits of one size; AxBench's is "largest".
        where: positions that are steered; all, prompt and generated, by default.
        max_new_tokens: generated after each prompt.
        temperature: 0 is greedy.
        batch_size: rows per forward.
        enough: so many words of a concept in a text earn the whole score, where no judge is given.
        instruction: a judge of whether a text follows its prompt; None leaves that aspect out.

    Raises:
        ConfigError: no factors, an unknown unit, or nothing to generate.
    """

    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    unit: str = "rms"
    where: Where | None = None
    max_new_tokens: int = 12
    temperature: float = 0.0
    batch_size: int = 64
    enough: int = 1
    instruction: Judge | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        counts = (self.max_new_tokens, self.enough, self.batch_size)
        if self.unit not in UNITS or not all(type(n) is int and n >= 1 for n in counts):
            raise ConfigError(
                f"unit={self.unit!r}, max_new_tokens={self.max_new_tokens}, enough={self.enough}, batch_size="
                f"{self.batch_size}: expected one of {', '.join(UNITS)}, and at least 1 token, word and row"
            )
        listed = isinstance(self.factors, tuple | list) and len(self.factors) > 0
        if not listed or not all(isinstance(f, int | float) and math.isfinite(f) for f in self.factors):
            raise ConfigError(f"factors={self.factors!r}: expected a list of finite numbers")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature!r}: expected 0 or more")

    @property
    def doses(self) -> tuple[Dose, ...]:
        """The factors as doses."""
        return tuple(Dose(float(f), self.unit) for f in self.factors)


@dataclass(frozen=True)
class WordShare:
    """Scores a text by words of a concept and of its opposite: 2 · max(0, w − o) / max(enough, w + o).

    Args:
        words: that show the concept, found whole and in any case.
        opposite: that show its opposite; may be none.
        enough: so many words earn the whole score.

    Raises:
        ConfigError: no words.
    """

    words: tuple[str, ...]
    opposite: tuple[str, ...] = ()
    enough: int = 1

    def __post_init__(self) -> None:
        WordJudge(self.words, enough=self.enough)

    def __call__(self, items: Sequence[Judged]) -> list[float]:
        """Score texts."""
        mine = WordJudge(self.words).pattern
        others = WordJudge(self.opposite).pattern if self.opposite else None
        made = []
        for item in items:
            w = len(mine.findall(item.text))
            o = 0 if others is None else len(others.findall(item.text))
            made.append(2.0 * max(0, w - o) / max(self.enough, w + o))
        return made


def compare_methods(
    hm: HookManager,
    concepts: Sequence[Concept | Contrast],
    site: Site | str,
    *,
    prompts: Sequence[str] | None = None,
    methods: Mapping[str, Fit] | None = None,
    options: CompareOptions | None = None,
    judge: Callable[[Concept], Judge] | None = None,
    seed: int = 0,
) -> MethodsTable:
    """Fit every method on every concept, and measure how well it detects held-out texts and steers new ones.

    A method that fails on a concept (its data have no pairs, say) is left empty there and named with the reason; so is
    one of yours that raises anything, so that the others are kept.
    Perplexity is under the unsteered model; a text as likely as the concept's held-out texts, in which no two tokens
    follow each other twice, has fluency 2. The largest of more scores is larger: where texts with a concept are longer
    than those without it, a control detects it too, which is one more reason to look at the lead over it. Cost: a fit,
    one pass over the held-out texts, and (doses · prompts) generations for each concept and method. Memory: 4 · tokens
    · d_model bytes of held-out activations.

    Args:
        hm: the model.
        concepts: each with its texts; a plain contrast is split by groups.
        site: where methods read and act.
        prompts: what is continued; half of them choose the factor, the others score it. None measures detection alone.
        methods: name → function; `METHODS` by default. Those in `CONTROLS` among them are what others are held to.
        options: how steering is tried.
        judge: for each concept a function that scores texts from 0 to 2; by default their words decide.
        seed: of fits, of the two halves and of sampling.

    Returns:
        The table. Ctrl-C ends with what there is.

    Raises:
        ConfigError: no concepts or methods, names that come twice, or fewer than two prompts.
        DataError: steering, and a concept that has neither words nor a judge.
    """
    options, methods, place = options or CompareOptions(), dict(METHODS if methods is None else methods), Site(site)
    known = [c if isinstance(c, Concept) else Concept.of(c, hm=hm, seed=seed) for c in concepts]
    _check(hm, known, methods, place, prompts, judge)
    table = _Table(list(methods), [c.name for c in known], prompts is not None)
    from tqdm.auto import tqdm

    with tqdm(total=len(known) * len(methods), desc="methods", unit="fit", disable=None) as bar:
        try:
            for i, concept in enumerate(known):
                stage = _Stage(hm, concept, place, prompts, options, judge, seed)
                table.unsteered[i] = stage.unsteered
                table.notes += stage.notes
                for j, (name, fit) in enumerate(methods.items()):
                    _one(stage, table, (j, i), name, fit)
                    bar.update()
        except KeyboardInterrupt:
            if not table.any:
                raise
            table.notes.append("stopped before its end: what is empty was not run")
    settings = {"site": place.short, "methods": list(methods), "factors": options.factors, "unit": options.unit}
    return table.result(Provenance.of(hm, settings=settings, seed=seed), place.short)


def _check(
    hm: HookManager,
    concepts: Sequence[Concept],
    methods: Mapping[str, Fit],
    site: Site,
    prompts: Sequence[str] | None,
    judge: Any,
) -> None:
    hm.atlas.point(site)
    if not concepts or not methods:
        raise ConfigError(f"{len(concepts)} concepts and {len(methods)} methods; give at least one of each")
    names = [c.name for c in concepts]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"two concepts are called {twice!r}; give each a name of its own")
    if prompts is None:
        return
    if isinstance(prompts, str) or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ConfigError(f"prompts={prompts!r:.60}: expected a list of texts that are not empty")
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompts: half of them choose the factor, so give at least two")
    bare = [c.name for c in concepts if not c.words]
    if bare and judge is None:
        raise DataError(f"nothing says whether a text shows {bare[0]!r}; give the concept words=…, or judge=…")


class _Stage:
    """One concept: its held-out activations and texts, shared by all methods."""

    def __init__(
        self,
        hm: HookManager,
        concept: Concept,
        site: Site,
        prompts: Sequence[str] | None,
        options: CompareOptions,
        judge: Callable[[Concept], Judge] | None,
        seed: int,
    ) -> None:
        self.hm, self.concept, self.site, self.options, self.seed = hm, concept, site, options, seed
        self.fit = concept.tokens(hm, "fit")
        held = concept.tokens(hm, "held_out")
        self.notes = _shared(concept.name, self.fit, held)
        self.held = gather(hm, held, site, batch_size=options.batch_size)[site.short]
        self.hard: Gathered | None = None
        if concept.hard:
            self.hard = gather(hm, concept.tokens(hm, "hard"), site, batch_size=options.batch_size)[site.short]
        self.prompts = None if prompts is None else list(prompts)
        self.unsteered = math.nan
        if self.prompts is None:
            return
        own = WordShare(concept.words, concept.opposite, options.enough) if judge is None else judge(concept)
        self.judge: Judge = own
        self.tokens = hm.to_tokens(self.prompts)
        self.reference = _perplexity(hm, held, options.batch_size)
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed))
        half = len(order) // 2
        self.choosing, self.scoring = order[:half].sort().values, order[half:].sort().values
        scores = self.score(Contender(None, None), (Dose(0.0),))
        self.unsteered = float(harmonic_mean(scores[:, 0][:, self.scoring]).nanmean())

    def detection(self, detect: Any) -> tuple[float, float]:
        """AUROC against the negatives, and against the hard ones."""
        hard = math.nan if self.hard is None else detection_scores(self.hard, detect)
        return detection_scores(self.held, detect), hard

    def score(self, made: Contender, doses: Sequence[Dose]) -> Float[Tensor, "aspect dose prompt"]:
        """Scores of what is generated, from 0 to 2, NaN where a judge gives none."""
        assert self.prompts is not None
        o = self.options
        said = continue_prompts(
            self.hm,
            made.steers,
            self.tokens,
            read_doses(doses),
            how=Sampling(o.where, o.max_new_tokens, o.temperature, self.seed, o.batch_size),
        )
        self.texts = said.texts
        items = [Judged(p, t) for row in said.texts for p, t in zip(self.prompts, row, strict=True)]
        shape = (len(doses), len(self.prompts))
        judges = [self.judge] + ([] if self.options.instruction is None else [self.options.instruction])
        aspects = [judged(j, items)[0].reshape(shape).double() for j in judges]
        likely = (self.reference / said.perplexity.double()).clamp(max=1.0)
        varied = said.distinct[..., 1].double().nan_to_num(1.0)
        return torch.stack([*aspects, 2.0 * likely * varied])


def _one(stage: _Stage, table: "_Table", at: tuple[int, int], name: str, fit: Fit) -> None:
    """One method on one concept, into the table."""
    try:
        made = Contender(*fit(stage.hm, stage.fit, stage.site, stage.seed))
        if made.detect is not None:
            table.detection[at], table.hard[at] = stage.detection(made.detect)
        if stage.prompts is None or made.steers is None:
            return
        doses = made.doses or stage.options.doses
        scores = stage.score(made, doses)
        overall = harmonic_mean(scores)
        best = int(overall[:, stage.choosing].nanmean(1).nan_to_num(-1.0).argmax())
        kept = scores[:, best][:, stage.scoring]
        table.steering[at] = overall[best, stage.scoring].nanmean()
        table.concept_score[at], table.fluency[at] = kept[0].nanmean(), kept[-1].nanmean()
        table.factor[at] = float(doses[best].value)
        said = stage.texts[best][int(stage.scoring[0])]
        table.examples[f"{stage.concept.name} / {name}"] = f"{stage.prompts[int(stage.scoring[0])]} |{said}"
    except Exception as err:  # noqa: BLE001, of a method that a user brings: hours of others' work stand in the table
        said = str(err) if isinstance(err, InterpError) else f"{type(err).__name__}: {err}"
        table.failed[f"{stage.concept.name} / {name}"] = said


def _shared(name: str, fit: ConceptTokens, held: ConceptTokens) -> list[str]:
    """A note where texts that judge were fitted on."""
    again = int(torch.isin(row_keys(held.tokens), row_keys(fit.tokens)).sum())
    return [f"{name}: {again} of {len(held)} held-out texts are also fitted on"] if again else []


def detection_scores(held: Gathered, detect: Callable[[Tensor], Tensor]) -> float:
    """Return the AUROC of texts, each scored by the largest score of its tokens.

    Args:
        held: activations of tokens, of texts of one class each.
        detect: activations → a score each.
    """
    scores = detect(held.x.reshape(len(held), -1)).detach().double().cpu()
    rows, at = held.row.unique(return_inverse=True)
    top = torch.full((len(rows),), -math.inf, dtype=torch.float64).scatter_reduce(0, at, scores, "amax")
    truth = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, at[held.y == 1], True)
    return float(auroc(top, truth))


def _perplexity(hm: HookManager, data: ConceptTokens, batch_size: int) -> float:
    """Of texts, under the model as it is: exp of the mean loss over all their tokens."""
    total, count = 0.0, 0.0
    for rows in torch.arange(len(data)).split(batch_size):
        part: Tokens = data.tokens.take(rows)
        losses, counts = loss_per_token(hm.run(part, logits="all").logits, part.ids, part.mask)
        total, count = total + float(losses.double().sum()), count + float(counts.sum())
    return math.exp(total / count)


class _Table:
    """What is filled in, method by concept."""

    def __init__(self, methods: list[str], concepts: list[str], steered: bool) -> None:
        self.methods, self.concepts, self.steered = methods, concepts, steered
        shape = (len(methods), len(concepts))

        def empty() -> Tensor:
            return torch.full(shape, math.nan, dtype=torch.float64)

        self.detection, self.hard, self.steering = empty(), empty(), empty()
        self.concept_score, self.fluency, self.factor = empty(), empty(), empty()
        self.unsteered = torch.full((len(concepts),), math.nan, dtype=torch.float64)
        self.failed: dict[str, str] = {}
        self.examples: dict[str, str] = {}
        self.notes: list[str] = []

    @property
    def any(self) -> bool:
        """Whether there is a number in it."""
        return not bool(self.detection.isnan().all() and self.steering.isnan().all())

    def result(self, provenance: Provenance, site: str) -> MethodsTable:
        return MethodsTable(
            provenance=provenance,
            site=site,
            methods=self.methods,
            concepts=self.concepts,
            controls=[m for m in self.methods if m in CONTROLS],
            detection=self.detection,
            hard=self.hard,
            steering=self.steering,
            concept_score=self.concept_score,
            fluency=self.fluency,
            factor=self.factor,
            unsteered=self.unsteered,
            failed=self.failed,
            examples=self.examples,
            notes=tuple(self.notes),
        )
