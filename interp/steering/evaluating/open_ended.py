"""`open_ended`: what is generated at each dose, scored by judges; half of the prompts choose the dose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Dose, Steers
from interp.core.errors import ConfigError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.text import Tokens
from interp.core.where import Where
from interp.steering.evaluating.dose_effects import Continued, Sampling, continue_prompts, prompt_texts, read_text
from interp.steering.evaluating.dose_rows import Doses, read_doses
from interp.steering.evaluating.judges import Judge, Judged, judged
from interp.steering.evaluating.lines import UNSTEERED, Line, lines_of
from interp.steering.evaluating.open_ended_result import OpenEnded

__all__ = ["OpenEndedOptions", "open_ended"]


@dataclass(frozen=True)
class OpenEndedOptions:
    """How `open_ended` generates.

    Args:
        where: the positions it acts on; what steers decides by default.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        controls: random directions beside each direction.
        together: steer at all sites of a direction at once, instead of site by site.
        seed: of random directions, of sampling, and of which prompts choose the dose.
        batch_size: rows per forward.
        progress: show a bar on stderr when it is a terminal.

    Raises:
        ConfigError: numbers that cannot be.
    """

    where: Where | None = None
    max_new_tokens: int = 40
    temperature: float = 0.0
    controls: int = 0
    together: bool = False
    seed: int = 0
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("controls", 0), ("batch_size", 1)):
            given = getattr(self, name)
            if type(given) is not int or given < least:
                raise ConfigError(f"OpenEndedOptions({name}={given!r}): expected a whole number ≥ {least}")


def open_ended(
    hm: HookManager,
    prompts: Inputs,
    judge: Judge | Mapping[str, Judge],
    steers: Steers | Mapping[str, Steers],
    *,
    doses: Sequence[float | Dose] | Dose,
    options: OpenEndedOptions | None = None,
) -> OpenEnded:
    """Generate from prompts at every dose and have judges score the texts.

    On Ctrl-C the lines that are done are returned.

    Args:
        hm: the model.
        prompts: what to continue; half of them, drawn, choose the dose, the others score it.
        judge: a `Judge`; or several by aspect, such as concept, instruction and fluency, whose harmonic mean is the
            score.
        steers: what steers, or several by name.
        doses: numbers in units of the fitted vector, or `Dose`s of one unit.
        options: everything else.

    Returns:
        The unsteered model first, then a cell per steering, site and dose. What a judge could not score is missing.

    Raises:
        ConfigError: no judge, or nothing that steers.
        DataError: a judge that gives something else than scores.

    Source: Wu et al. (2025), "AxBench", arXiv 2501.17148, §4.2. Departure: a score that a judge does not give is
        missing, not 0.
    """
    options = options or OpenEndedOptions()
    judges = dict(judge) if isinstance(judge, Mapping) else {"score": judge}
    if not judges or not all(callable(one) for one in judges.values()):
        raise ConfigError("give a judge: a function of texts that returns a score each, or several by aspect")
    amounts = read_doses(doses)
    lines = lines_of(hm, steers, amounts, controls=options.controls, together=options.together, seed=options.seed)
    tokens = read_text(hm, prompts)
    scorer = _Scorer(hm, judges, tokens, prompt_texts(hm, prompts, tokens), options)
    found = [scorer(None, Doses(torch.zeros(1), "raw"))]
    from tqdm import tqdm

    try:
        # None: only where stderr is a terminal.
        for line in tqdm(lines, desc="generating", unit="line", disable=None if options.progress else True):
            found.append(scorer(line.steers, line.doses))
    except KeyboardInterrupt:
        if len(found) == 1:
            raise
    notes = list(hm.notes_for(tokens))
    if len(found) <= len(lines):
        notes.append(f"stopped: {len(found) - 1} of {len(lines)} lines are done, the others are left out")
    return _result(scorer, lines[: len(found) - 1], found, amounts, notes)


@dataclass(eq=False)
class _Scorer:
    """Generates and has the texts judged; counts the scores that are missing."""

    hm: HookManager
    judges: Mapping[str, Judge]
    tokens: Tokens
    prompts: list[str]
    options: OpenEndedOptions
    missing: dict[str, int] = field(default_factory=dict)

    def __call__(self, steers: Steers | None, doses: Doses) -> tuple[Float[Tensor, "aspect dose prompt"], Continued]:
        """The scores of every dose, and the texts."""
        options = self.options
        said = continue_prompts(
            self.hm,
            steers,
            self.tokens,
            doses,
            how=Sampling(options.where, options.max_new_tokens, options.temperature, options.seed, options.batch_size),
        )
        items = [Judged(prompt, text) for texts in said.texts for prompt, text in zip(self.prompts, texts, strict=True)]
        found = []
        for aspect, judge in self.judges.items():
            values, reasons = judged(judge, items)
            found.append(values.reshape(len(said.texts), len(self.prompts)))
            for reason, count in reasons.items():
                name = f"{aspect}: {reason}"
                self.missing[name] = self.missing.get(name, 0) + count
        return torch.stack(found), said


def _result(
    scorer: _Scorer, lines: list[Line], found: list[tuple[Tensor, Continued]], doses: Doses, notes: list[str]
) -> OpenEnded:
    options, tokens = scorer.options, scorer.tokens
    cells = [(line, k) for line in lines for k in range(len(line.doses.values))]
    draw = torch.Generator().manual_seed(options.seed)
    chooses = torch.zeros(len(tokens), dtype=torch.bool)
    chooses[torch.randperm(len(tokens), generator=draw)[: len(tokens) // 2]] = True
    settings: dict[str, Any] = {
        "doses": doses.values.tolist(),
        "unit": doses.unit,
        "where": repr(options.where),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "judge": list(scorer.judges),
    }
    return OpenEnded(
        provenance=Provenance.of(scorer.hm, settings=settings, data=(tokens.ids, tokens.mask), seed=options.seed),
        steers=[UNSTEERED, *(line.name for line, _ in cells)],
        sites=["", *(line.site for line, _ in cells)],
        doses=torch.tensor([0.0, *(float(line.doses.values[k]) for line, k in cells)], dtype=torch.float64),
        unit=doses.unit,
        control=torch.tensor([False, *(line.control for line, _ in cells)]),
        aspects=list(scorer.judges),
        scores=torch.cat([scores for scores, _ in found], 1),
        missing=scorer.missing,
        chooses=chooses,
        perplexity=torch.cat([said.perplexity for _, said in found]),
        prompts=scorer.prompts,
        texts=[row for _, said in found for row in said.texts],
        notes=notes,
    )
