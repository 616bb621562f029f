"""`interp steer`: fit a direction, with its controls; measure what doses of it do, and what they cost."""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from interp.cli.lines import read_line, refuse, tell
from interp.cli.results import LineFlags, ModelConfig, ResultFolder, open_model, say, term_interrupts, write_result
from interp.core.errors import ConfigError, InterpError
from interp.core.settings import Settings

if TYPE_CHECKING:
    from interp.core.direction import Direction
    from interp.core.manager import HookManager
    from interp.core.where import Where
    from interp.data.ab_questions import ABQuestions
    from interp.data.contrast import Contrast

__all__ = ["SteerConfig", "SteerData", "SteerLine", "main"]

_STAND_IN = {"model": "-", "out": "-"}
_STOPPED = 143

_Method = Literal["mean_difference", "pca", "pca_centred", "lat", "logistic", "mass_mean", "lda"]


class SteerData(Settings):
    """What the direction is fitted and tried on."""

    task: str | None = Field(
        default=None,
        description="a task that the model's tokenizer takes, such as sentiment; an unknown one lists them",
    )
    positive: list[str] = Field(
        default=[], description="for task: the answers that steering should make likelier, such as ' glad' ' loved'"
    )
    texts: str | None = Field(
        default=None, description="a CSV or JSON-lines file with the columns text, label[, group]"
    )
    questions: str | None = Field(
        default=None,
        description="A/B questions, a file of {question, answer_matching_behavior, answer_not_matching_behavior}",
    )
    n: int = Field(
        default=64, gt=1, description="pairs of a task; of a file, the first so many texts of either side, or questions"
    )
    held_out: float = Field(default=0.3, gt=0, lt=1, description="share of the questions that are asked, not fitted on")
    seed: int = Field(default=0, ge=0, description="of the draw and of the split")

    @model_validator(mode="after")
    def _one_source(self) -> "SteerData":
        if [self.task, self.texts, self.questions].count(None) < 2:
            raise ValueError("give one of task, texts, questions")
        if (self.task is None) == bool(self.positive):
            raise ValueError("positive goes with task: the answers that steering should make likelier")
        return self


class SteerConfig(ModelConfig):
    """Fit a direction and sweep its dose."""

    data: SteerData = SteerData()
    direction: str | None = Field(default=None, description="a direction that was saved, instead of fitting one")
    method: _Method = Field(default="mean_difference", description="how the direction is fitted")
    sites: list[str] = Field(
        default=["*.resid_post"], min_length=1, description="sites or globs, each with its direction"
    )
    doses: list[float] = Field(
        default=[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], min_length=1, description="how much of it, in the unit"
    )
    unit: Literal["raw", "rms", "sigma", "gap", "largest"] = Field(
        default="raw",
        description="what a dose of 1 is: the vector as fitted; along it the RMS norm of the activation, the standard "
        "deviation of its projection, the gap between the two classes, or the largest projection",
    )
    where: Literal["all", "prompt", "last_prompt", "generated", "answer"] = Field(
        default="all",
        description="the positions that are steered; answer is the prompt's last token and all generated ones",
    )
    controls: int = Field(default=2, ge=0, description="random directions of the same length beside each")
    prompts: list[str] = Field(default=[], description="prompts to continue; by default those that are tried on")
    n_generated: int = Field(default=8, ge=0, description="how many of them")
    max_new_tokens: int = Field(default=20, gt=0, description="tokens to generate")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    batch_size: int = Field(default=64, gt=0, description="rows per forward")


class SteerLine(SteerConfig, LineFlags):
    """Fit a direction from texts with and without a concept; measure on others what doses of it do and what they cost.

    `interp steer [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Writes the direction to
    direction.safetensors, its fit with controls, the sweep as sweep.csv and as a page, and the results themselves.
    """

    def settings(self) -> SteerConfig:
        """The configuration, without what belongs to the command line alone."""
        return SteerConfig.model_validate({name: getattr(self, name) for name in SteerConfig.model_fields})


class _Data(NamedTuple):
    """What is fitted on, what is tried on."""

    fit: "Contrast"
    prompts: Any
    questions: "ABQuestions | None"
    read_at: "Where | None" = None


def main(argv: list[str]) -> int:
    """Fit and sweep, or say what it would be.

    Args:
        argv: The arguments after `interp steer`.

    Returns:
        The exit code: 0 done, 2 bad usage, 143 stopped by a signal.

    Raises:
        InterpError: The fit or the sweep failed.
    """
    try:
        line = read_line(SteerLine, SteerConfig, argv, prog="interp steer", stand_in=_STAND_IN)
        cfg = line.settings()
        if not any((cfg.data.task, cfg.data.texts, cfg.data.questions)):
            raise ConfigError("give one of data.task (with data.positive), data.texts, data.questions")
        if cfg.where == "generated" and cfg.data.texts is None:
            raise ConfigError("where=generated leaves the answer's prompt as it is; give answer, which has both")
        if len(set(cfg.doses)) < len(cfg.doses) or not all(map(math.isfinite, cfg.doses)):
            raise ConfigError(f"doses={cfg.doses}: expected finite numbers, each once")
        folder = ResultFolder(cfg.out, force=line.force)
    except ConfigError as err:
        return refuse(str(err))
    hm = open_model(cfg)
    data = _data(hm, cfg)
    if line.dry_run:
        return _described(hm, data, cfg, as_json=line.json_output)
    folder.begin(cfg)
    try:
        with term_interrupts():
            return _steered(hm, data, cfg, folder, as_json=line.json_output)
    except KeyboardInterrupt:
        folder.give_up()
        tell("stopped before anything was measured")
        return _STOPPED
    except InterpError:
        folder.give_up()
        raise


def _data(hm: "HookManager", cfg: SteerConfig) -> _Data:
    given = cfg.data
    if given.questions is not None:
        from interp.core.where import Where
        from interp.data.ab_questions import LETTER, ABQuestions, ab_contrast

        asked = ABQuestions.from_json(given.questions)
        fit, held = asked[: given.n].split(given.held_out, seed=given.seed)
        contrast = ab_contrast(fit.balanced(seed=given.seed), hm)
        return _Data(contrast, cfg.prompts or [q.question for q in held], held, Where(name=LETTER))
    if given.texts is not None:
        from interp.data.contrast_files import contrast_from_file

        texts = contrast_from_file(given.texts).head(given.n)
        return _Data(texts, cfg.prompts or [p.text for p in texts.negative], None)
    return _task_data(hm, cfg)


def _task_data(hm: "HookManager", cfg: SteerConfig) -> _Data:
    """Directions are fitted on the words that a task gives away, and tried on those that it keeps apart."""
    from interp.data.contrast import Contrast
    from interp.testbed.model_tasks import model_pairs

    given, wanted = cfg.data, set(cfg.data.positive)
    assert given.task is not None
    fit, tried = (model_pairs(hm, given.task, given.n, seed=given.seed, held_out=out) for out in (False, True))
    prompts = tried.leaning(given.positive)
    fit = fit.filter(lambda e: bool(wanted & {*e.answers, *e.foils}))
    contrast = Contrast.of_pairs(fit, positive=lambda e: bool(wanted & set(e.answers)))
    return _Data(contrast, prompts, None)


def _direction(hm: "HookManager", data: _Data, cfg: SteerConfig, folder: ResultFolder) -> "tuple[Direction, list[str]]":
    from interp.core.direction import Direction
    from interp.steering.fitting.direction_fit import fit_with_controls

    if cfg.direction is not None:
        held = Direction.load(cfg.direction)
        held.check(hm)
        return held, [f"{held!r}"]
    fitted = fit_with_controls(hm, data.fit, cfg.sites, method=cfg.method, where=data.read_at, seed=cfg.data.seed)
    files = write_result(folder, fitted, "fit.csv", "fit.html", name="fit")
    fitted.direction.save(folder.path / "direction.safetensors", overwrite=True)
    return fitted.direction, [fitted.summary(), *map(str, files)]


def _steered(hm: "HookManager", data: _Data, cfg: SteerConfig, folder: ResultFolder, *, as_json: bool) -> int:
    from interp.core.direction import Dose
    from interp.steering.evaluating.ab import ab_evaluation
    from interp.steering.evaluating.sweep import steering_sweep
    from interp.steering.evaluating.sweep_options import SweepOptions

    direction, said = _direction(hm, data, cfg, folder)
    doses = [Dose(value, cfg.unit) for value in cfg.doses]
    options = SweepOptions(
        where=_where(cfg.where),
        generate_from=cfg.prompts or None,
        n_generated=cfg.n_generated,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        controls=cfg.controls,
        batch_size=cfg.batch_size,
        seed=cfg.data.seed,
    )
    found = steering_sweep(hm, direction, data.prompts, doses=doses, options=options)
    files = write_result(folder, found, "sweep.csv", "steering.html")
    said += [found.summary(), *map(str, files)]
    stopped = any(note.startswith("stopped") for note in found.notes)
    if data.questions is not None and not stopped:
        answered = ab_evaluation(hm, data.questions, direction, doses=doses, where=_prompt_part(cfg.where))
        files += write_result(folder, answered, "answers.csv", "answers.html", name="answers")
        said += [answered.summary(), *map(str, files[-3:])]
    record = {"out": cfg.out, "cells": len(found), "notes": found.notes, "files": [str(f) for f in files]}
    say("\n".join(said), record, as_json=as_json)
    return _STOPPED if stopped else 0


def _where(name: str) -> "Where | None":
    from interp.core.where import Where

    return {
        "all": None,
        "prompt": Where.prompt(),
        "last_prompt": Where.last_prompt(),
        "generated": Where.generated(),
        "answer": Where.last_prompt() | Where.generated(),
    }[name]


def _prompt_part(name: str) -> "Where | None":
    """Where a prompt is steered whose next token alone is looked at: what is generated is not there."""
    return _where("last_prompt" if name == "answer" else name)


def _described(hm: "HookManager", data: _Data, cfg: SteerConfig, *, as_json: bool) -> int:
    sites = [site.short for name in cfg.sites for site in hm.atlas.expand(name)]
    cells = len(sites) * len(cfg.doses) * (1 + cfg.controls)
    sizes = {"positive": len(data.fit.positive), "negative": len(data.fit.negative), "tried": len(data.prompts)}
    record = {"config": cfg.model_dump(mode="json"), "sites": sites, "cells": cells, "texts": sizes}
    shown = ", ".join(sites[:8]) + (", …" if len(sites) > 8 else "")
    text = (
        f"{cfg.to_yaml()}\n{len(sites)} sites ({shown}); fitted on {sizes['positive']} and {sizes['negative']} texts "
        f"of {data.fit.name}, tried on {sizes['tried']}; {cells} cells, controls included"
    )
    say(text, record, as_json=as_json)
    return 0
