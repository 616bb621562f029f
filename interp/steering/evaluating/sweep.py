"""`steering_sweep`: every steering, site and dose in one table, with what it does and what it costs.

Several doses are rows of one forward wherever what steers takes one dose per row.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.core.direction import Dose, Steers
from interp.core.errors import ConfigError, DataError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.metrics import Metric, refuse_nan
from interp.core.result import Provenance
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.steering.evaluating.dose_effects import (
    AnswerMeasure,
    Continued,
    OnText,
    Sampling,
    TextMeasure,
    continue_prompts,
    prompt_texts,
    read_text,
)
from interp.steering.evaluating.dose_rows import Doses, of_rows, read_doses
from interp.steering.evaluating.lines import Line, lines_of
from interp.steering.evaluating.sweep_options import Limits, SweepOptions
from interp.steering.evaluating.sweep_result import SteeringSweep

__all__ = ["steering_sweep"]

_SIGNED = ("logit_diff", "prob_diff")


def steering_sweep(
    hm: HookManager,
    steers: Steers | Mapping[str, Steers],
    prompts: PromptPairs | PairTokens | Inputs,
    *,
    doses: Sequence[float | Dose] | Dose,
    options: SweepOptions | None = None,
) -> SteeringSweep:
    """Measure what every dose does to the answers, and to everything else.

    A direction with several sites is swept site by site. Beside each direction stand random ones of the same length.
    Ablations have no dose and are measured once, at dose 1. On Ctrl-C the lines that are done are returned.

    Memory: the logits of a forward of `batch_size` rows; see `AnswerMeasure` and `TextMeasure`.

    Args:
        hm: the model.
        steers: what steers, or several by name.
        prompts: pairs: the clean prompts, with answers that steering should make likelier than the foils. Give a set
            of pairs whose answers all lean the same way, or the mean effect says nothing. Or plain prompts, for
            generation alone.
        doses: numbers, in units of the fitted vector, or `Dose`s of one unit. Put 0 among them to see the base.
        options: everything else; see `SweepOptions`.

    Returns:
        A cell per steering, site and dose.

    Raises:
        ConfigError: doses of two units, nothing that steers, or a metric without pairs.
        ModelError: a direction of another model.
        DataError: prompts or questions that the model cannot be measured on.
    """
    options = options or SweepOptions()
    amounts = read_doses(doses)
    lines = lines_of(hm, steers, amounts, controls=options.controls, together=options.together, seed=options.seed)
    job = _job(hm, prompts, options)
    done: list[tuple[Line, _Found]] = []
    total = sum(len(line.doses.values) for line in lines)
    try:
        with _bar(total, options.progress) as step:
            base = job.base()
            for line in lines:
                done.append((line, job.measure(line)))
                step(len(line.doses.values))
    except KeyboardInterrupt:
        if not done:
            raise
    notes = list(job.notes)
    if len(done) < len(lines):
        notes.append(f"stopped: {len(done)} of {len(lines)} lines are done, the others are left out")
    if options.controls and not any(line.control for line in lines):
        notes.append("no random directions beside: none of these is a direction with a vector")
    settings = _settings(lines, amounts, job, options)
    data = [job.prompts.ids, job.prompts.mask] if job.prompts is not None else [job.text.ids, job.text.mask]
    provenance = Provenance.of(hm, settings=settings, data=data, seed=options.seed)
    return _result(job, base, done, provenance, amounts.unit, notes)


# -- what is measured ----------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    effect: Tensor
    text: OnText
    said: Continued
    accuracy: Tensor


@dataclass(frozen=True, eq=False)
class _Job:
    """The prompts, the text and the questions, ready to be measured on."""

    hm: HookManager
    prompts: Tokens | None
    metric: Metric | None
    text: Tokens
    text_is: str
    start: Tokens | None
    start_texts: list[str]
    start_where: Where | None
    answers: AnswerMeasure | None
    on_text: TextMeasure
    questions: AnswerMeasure | None
    options: SweepOptions
    notes: tuple[str, ...]

    def base(self) -> tuple[Tensor, Continued, float]:
        """The metric, the generations and the accuracy of the unsteered model."""
        once = Doses(torch.zeros(1, dtype=torch.float64), "raw")
        none = torch.zeros(0)
        values = none if self.answers is None else self.answers.base
        if self.metric is not None:
            refuse_nan(values, self.metric.name, "unsteered")
        right = math.nan if self.questions is None else float((self.questions.base > 0).float().mean())
        return values, self._continued(None, once), right

    def measure(self, line: Line) -> _Found:
        """Everything of one line."""
        k = len(line.doses.values)
        on_text = self.on_text(line.steers, line.doses)
        if on_text.effect is not None:
            effect = on_text.effect
        else:
            effect = torch.zeros(k, 0) if self.answers is None else self.answers(line.steers, line.doses)
        accuracy = torch.full((k,), math.nan)
        if self.questions is not None:
            accuracy = ((self.questions.base + self.questions(line.steers, line.doses)) > 0).float().mean(1)
        return _Found(effect, on_text, self._continued(line.steers, line.doses), accuracy)

    def _continued(self, steers: Steers | None, doses: Doses) -> Continued:
        k, options = len(doses.values), self.options
        if self.start is None:
            return Continued([[] for _ in range(k)], torch.zeros(k, 0), torch.zeros(k, 0, 3), torch.zeros(k, 0))
        return continue_prompts(
            self.hm,
            steers,
            self.start,
            doses,
            how=Sampling(
                self.start_where, options.max_new_tokens, options.temperature, options.seed, options.batch_size
            ),
        )


def _job(hm: HookManager, prompts: Any, options: SweepOptions) -> _Job:
    pairs = _pair_tokens(hm, prompts) if isinstance(prompts, PromptPairs | PairTokens) else None
    if pairs is None and isinstance(options.metric, Metric):
        raise ConfigError("a metric is of pairs, and these are plain prompts; give PromptPairs or PairTokens")
    tokens = read_text(hm, prompts) if pairs is None else pairs.clean
    if isinstance(options.metric, Metric):
        metric: Metric | None = options.metric
    elif options.metric == "kl":
        raise ConfigError("the KL is measured in any case; metric='kl' would be of the last token alone")
    else:
        metric = None if pairs is None else pairs.metric(options.metric)
    text = tokens if options.text is None else read_text(hm, options.text)
    start, start_texts, start_where = _start(hm, prompts if pairs is None else None, tokens, options)
    size = options.batch_size
    answers = None
    if metric is not None:
        answers = AnswerMeasure(hm, tokens, metric, where=options.where, batch_size=size)
    # Where the text is the prompts, steered at the same places, the forwards of the KL hold the answers too.
    together = metric if options.text is None and options.text_where is options.where else None
    questions = None
    if options.questions is not None:
        asked = _pair_tokens(hm, options.questions)
        questions = AnswerMeasure(hm, asked.clean, asked.metric(), where=options.text_where, batch_size=size)
    return _Job(
        hm=hm,
        prompts=tokens if pairs is not None else None,
        metric=metric,
        text=text,
        text_is="the prompts" if options.text is None else "the text given",
        start=start,
        start_texts=start_texts,
        start_where=start_where,
        answers=answers,
        on_text=TextMeasure(hm, text, where=options.text_where, batch_size=size, metric=together),
        questions=questions,
        options=options,
        notes=tuple(hm.notes_for(tokens)),
    )


def _start(
    hm: HookManager, given: Inputs | None, tokens: Tokens, options: SweepOptions
) -> tuple[Tokens | None, list[str], Where | None]:
    """The prompts that are continued, their texts, and where steering acts on them."""
    if not options.n_generated:
        return None, [], None
    whole, own = tokens, options.generate_from is None
    if not own:
        given, whole = options.generate_from, read_text(hm, options.generate_from)
    rows = torch.arange(min(options.n_generated, len(whole)))
    start = whole.take(rows)
    where = options.where
    if where is not None and own:
        where = of_rows(where, rows, len(whole))
    return start, prompt_texts(hm, given, start), where


def _pair_tokens(hm: HookManager, pairs: PromptPairs | PairTokens) -> PairTokens:
    made = pairs.tokens(hm, same_length=False) if isinstance(pairs, PromptPairs) else pairs
    if made.clean.position_ids is not None:
        raise DataError("packed documents cannot be put on rows of their own; give one prompt per row")
    return made


# -- the table -----------------------------------------------------------------------------------------------------


def _result(
    job: _Job,
    base: tuple[Tensor, Continued, float],
    done: list[tuple[Line, _Found]],
    provenance: Provenance,
    unit: str,
    notes: list[str],
) -> SteeringSweep:
    values, said, right = base
    cells = [(line, found, k) for line, found in done for k in range(len(line.doses.values))]
    metric = "none" if job.metric is None else job.metric.name
    kl = [found.text.kl[k] for _, found, k in cells]
    made = {
        "kl": torch.stack([v.double().mean().float() for v in kl]),
        "perplexity": torch.cat([found.said.perplexity for _, found in done]),
        "distinct": torch.cat([found.said.distinct for _, found in done]),
        "question_accuracy": torch.cat([found.accuracy for _, found in done]),
    }
    limits = job.options.limits
    return SteeringSweep(
        provenance=provenance,
        steers=[line.name for line, _, _ in cells],
        sites=[line.site for line, _, _ in cells],
        doses=torch.stack([line.doses.values[k] for line, _, k in cells]),
        unit=unit,
        control=torch.tensor([line.control for line, _, _ in cells]),
        metric=metric,
        base=values,
        effect=torch.cat([found.effect for _, found in done]),
        signed=metric in _SIGNED,
        kl_high=torch.stack([v.quantile(0.95) for v in kl]),
        kl_on=job.text_is,
        loss_change=torch.cat([found.text.loss_change for _, found in done]),
        base_perplexity=said.perplexity[0],
        base_distinct=said.distinct[0],
        compression=torch.cat([found.said.compression for _, found in done]),
        base_compression=said.compression[0],
        base_question_accuracy=right,
        prompts=job.start_texts,
        texts=[found.said.texts[k] for _, found, k in cells],
        base_texts=said.texts[0],
        failed=_failed(made, said, right, limits),
        limits=limits._asdict(),
        notes=notes,
        **made,
    )


def _failed(made: Mapping[str, Tensor], said: Continued, right: float, limits: Limits) -> list[str]:
    """Names of the limits that each cell breaks; what was not measured breaks none."""
    usual = said.perplexity[0].log().mean().exp()
    grams = said.distinct[0, :, 1].nanmean()
    broken = {
        # A dose so large that the predictions are NaN keeps to no limit.
        "kl": (made["kl"] > limits.kl) | made["kl"].isnan(),
        "perplexity": made["perplexity"].log().mean(1).exp() > limits.perplexity * usual,
        "repetition": made["distinct"][:, :, 1].nanmean(1) < limits.repetition * grams,
        "questions": right - made["question_accuracy"] > limits.questions,
    }
    return [", ".join(name for name, flags in broken.items() if bool(flags[i])) for i in range(len(made["kl"]))]


def _settings(lines: Sequence[Line], doses: Doses, job: _Job, options: SweepOptions) -> dict[str, Any]:
    return {
        "steers": [f"{line.name} at {line.site}" for line in lines if not line.control],
        "doses": doses.values.tolist(),
        "unit": doses.unit,
        "metric": "none" if job.metric is None else job.metric.name,
        "where": repr(options.where),
        "text": job.text_is,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "controls": options.controls,
        "limits": options.limits._asdict(),
    }


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="steering", unit="dose", disable=None if show else True) as bar:
        yield bar.update
