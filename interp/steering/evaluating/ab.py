"""`ab_evaluation`: which of two lettered options a model prefers, with the preference for letters taken out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.direction import Dose, Steers
from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.metrics import answer_logits
from interp.core.result import Provenance, Result
from interp.core.stats import Estimate, bootstrap, bootstrap_bounds
from interp.core.text import Tokens, chat_tokens, pad_id_of, pad_rows
from interp.core.where import Where
from interp.data.ab_questions import ABQuestion, ABQuestions
from interp.data.pairs import PromptPairs
from interp.steering.evaluating.dose_effects import blocks_for
from interp.steering.evaluating.dose_rows import Block, Doses, edits_of, quiet_at_zero, read_doses
from interp.steering.evaluating.lines import UNSTEERED, Line, lines_of

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["ABResult", "ab_evaluation"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ABResult(Result):
    """How a model answers lettered questions, both ways round; a cell is one steering with one dose.

    Attributes:
        steers: name of what steers, by cell; the first is "unsteered".
        sites: where it acts.
        doses: how much; 0 for the first.
        unit: of the doses.
        control: whether the cell is of a random direction.
        log_odds: logit(matching letter) − logit(other letter), for either order of the options.
        mass: probability of the two letters together; where it is small the model answers something else.
        first: 1 where the first order has the matching option under the first letter, else −1.
        name: of the behaviour.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "A/B questions"
    steers: list[str]
    sites: list[str]
    doses: Float[Tensor, " cell"]
    unit: str
    control: Bool[Tensor, " cell"]
    log_odds: Float[Tensor, "cell order question"]
    mass: Float[Tensor, "cell order question"]
    first: Float[Tensor, " question"]
    name: str = "behaviour"
    notes: list[str] = field(default_factory=list)

    @property
    def preference(self) -> Float[Tensor, "cell question"]:
        """Log-odds of the matching option, averaged over both orders: what a letter alone adds cancels."""
        return self.log_odds.mean(1)

    @property
    def letter_bias(self) -> Float[Tensor, "cell question"]:
        """Log-odds that the first letter has beyond its option, in whichever order; letter and place are not told
        apart."""
        return self.first * (self.log_odds[:, 0] - self.log_odds[:, 1]) / 2

    @property
    def right(self) -> Float[Tensor, "cell question"]:
        """Share of the two orders in which the matching letter is ahead; a tie counts a half."""
        return ((self.log_odds > 0).float() + 0.5 * (self.log_odds == 0).float()).mean(1)

    @property
    def accuracy(self) -> Float[Tensor, " cell"]:
        """Mean of `right`: exactly a half for a model that looks at the letter alone."""
        return self.right.mean(1)

    def records(self) -> list[dict[str, Any]]:
        """Return one record per cell, with 95 % intervals over questions."""
        found = []
        for i, (name, site, dose) in enumerate(zip(self.steers, self.sites, self.doses.tolist(), strict=True)):
            figures = {
                "log_odds": self.preference[i],
                "change": self.preference[i] - self.preference[0],
                "accuracy": self.right[i],
                "letter_bias": self.letter_bias[i],
            }
            record: dict[str, Any] = {"steers": name, "site": site, "dose": dose, "unit": self.unit}
            for what, values in figures.items():
                estimate = bootstrap(values)
                record |= {what: estimate.mean, f"{what}_low": estimate.low, f"{what}_high": estimate.high}
            record["mass"] = float(self.mass[i].mean())
            record["same_both_ways"] = float(((self.log_odds[i, 0] > 0) == (self.log_odds[i, 1] > 0)).float().mean())
            found.append(record)
        return found

    def estimate(self, cell: int) -> Estimate:
        """Return the mean preference of a cell with its interval over questions."""
        return bootstrap(self.preference[cell])

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per cell."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the change of the preference against dose, with 95 % intervals."""
        from interp.report.steering import DoseLine, dose_response

        lines = []
        for name, site in dict.fromkeys(zip(self.steers[1:], self.sites[1:], strict=True)):
            cells = [i for i in range(1, len(self.steers)) if (self.steers[i], self.sites[i]) == (name, site)]
            cells.sort(key=lambda i: float(self.doses[i]))
            change = self.preference[cells] - self.preference[0]
            low, high = bootstrap_bounds(change)
            lines.append(
                DoseLine(
                    name=f"{name} at {site}",
                    doses=self.doses[cells],
                    mean=change.mean(1),
                    low=low.float(),
                    high=high.float(),
                    control=bool(self.control[cells[0]]),
                    flagged=torch.zeros(len(cells), dtype=torch.bool),
                    cost=torch.zeros(0),
                    samples=change[:, :0],
                )
            )
        if not lines:
            raise DataError("nothing steers in this evaluation; give steers=… and doses=… to draw their effect")
        return dose_response(lines, unit=self.unit, value="change of log-odds, both orders", title=self.title)

    def summary(self) -> str:
        """Give preference, accuracy, letter bias and mass of each cell."""
        lines = [f"{self.name}: {self.log_odds.shape[2]} questions, each in both orders"]
        for record in self.records()[:12]:
            where = "" if record["steers"] == UNSTEERED else f" at {record['site']}, {record['dose']:g} {self.unit}"
            lines.append(
                f"{record['steers']}{where}: log-odds {record['log_odds']:.4g} [{record['log_odds_low']:.4g}, "
                f"{record['log_odds_high']:.4g}], accuracy {record['accuracy']:.0%}, first letter "
                f"{record['letter_bias']:+.3g}, mass {record['mass']:.2g}"
            )
        if len(self.steers) > 12:
            lines.append(f"… and {len(self.steers) - 12} more cells; see to_frame()")
        return "\n".join([*lines, *self.notes])


def ab_evaluation(
    hm: HookManager,
    questions: ABQuestions | PromptPairs,
    steers: Steers | Mapping[str, Steers] | None = None,
    *,
    doses: Sequence[float | Dose] | Dose = (1.0,),
    where: Where | None = None,
    answer: str = "({letter})",
    controls: int = 0,
    batch_size: int = 64,
) -> ABResult:
    """Measure which of two lettered options a model prefers, in both orders of the options.

    On Ctrl-C the lines that are done are returned. Memory: the last logits of a forward, 4 · batch_size · d_vocab
    bytes.

    Args:
        hm: the model; with a chat template each question is the user's turn.
        questions: questions; or pairs whose corrupted prompts are the clean ones with the options exchanged, so that
            each foil is the matching letter there.
        steers: what steers, or several by name; None measures the model alone.
        doses: numbers in units of the fitted vector, or `Dose`s of one unit.
        where: the positions it acts on; what steers decides by default.
        answer: how an answer is written, for `ABQuestions`; the model is asked for the token of "{letter}".
        controls: random directions beside each direction.
        batch_size: rows per forward.

    Returns:
        The unsteered model first, then a cell per steering, site and dose.

    Raises:
        DataError: options that cannot be exchanged, pairs with several answers, or letters that a tokenizer does not
            tell apart.

    Source: Rimsky et al. (2023), arXiv 2312.06681, §4, who average over questions whose letters are balanced. Here
        every question is asked both ways, so that a preference for a letter cancels in each.
    """
    asked = _of_pairs(hm, questions) if isinstance(questions, PromptPairs) else _of_questions(hm, questions, answer)
    amounts = read_doses(doses)
    lines = [] if steers is None else lines_of(hm, steers, amounts, controls=controls)
    base = [_measure(hm, order, None, Doses(torch.zeros(1), "raw"), where, batch_size) for order in asked.orders]
    found: list[list[_Answers]] = []
    notes = list(hm.notes_for(asked.orders[0].tokens))
    try:
        for one in lines:
            found.append([_measure(hm, order, one, one.doses, where, batch_size) for order in asked.orders])
    except KeyboardInterrupt:
        if not found:
            raise
        notes.append(f"stopped: {len(found)} of {len(lines)} lines are done, the others are left out")
        lines = lines[: len(found)]
    cells = [(line, k) for line in lines for k in range(len(line.doses.values))]
    tokens = [t for order in asked.orders for t in (order.tokens.ids, order.tokens.mask)]
    settings = {"doses": amounts.values.tolist(), "unit": amounts.unit, "where": repr(where), "answer": answer}
    return ABResult(
        provenance=Provenance.of(hm, settings=settings, data=tokens),
        steers=[UNSTEERED, *(line.name for line, _ in cells)],
        sites=["", *(line.site for line, _ in cells)],
        doses=torch.tensor([0.0, *(float(line.doses.values[k]) for line, k in cells)], dtype=torch.float64),
        unit=amounts.unit,
        control=torch.tensor([False, *(line.control for line, _ in cells)]),
        log_odds=torch.cat([torch.stack([o.log_odds for o in both], 1) for both in [base, *found]]),
        mass=torch.cat([torch.stack([o.mass for o in both], 1) for both in [base, *found]]),
        first=asked.first,
        name=questions.name,
        notes=notes,
    )


# -- questions as tokens -------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    """One order of the options: prompts up to the letter, and the tokens of the two letters."""

    tokens: Tokens
    matching: Int[Tensor, " question"]
    other: Int[Tensor, " question"]


class _Asked(NamedTuple):
    orders: tuple[_Order, _Order]
    first: Float[Tensor, " question"]


def _of_pairs(hm: HookManager, pairs: PromptPairs) -> _Asked:
    made = pairs.tokens(hm, same_length=False)
    made.check_foils()
    made.check_first_tokens()
    wrong = next((i for i in range(len(made)) if made.answer_mask[i].sum() != 1 or made.foil_mask[i].sum() != 1), None)
    if wrong is not None:
        raise DataError(f"pair {wrong} has several answers or foils; an A/B question has one letter of each")
    right, foil = made.answer_ids[:, 0], made.foil_ids[:, 0]
    # By the letters themselves: a vocabulary may hold " C" before " A".
    said = [[hm.tokenizer.decode([i]).strip() for i in ids.tolist()] if hm.tokenizer else ids for ids in (right, foil)]
    first = torch.tensor([1.0 if a < b else -1.0 for a, b in zip(*said, strict=True)])
    return _Asked((_Order(made.clean, right, foil), _Order(made.corrupted, foil, right)), first)


def _of_questions(hm: HookManager, questions: ABQuestions, answer: str) -> _Asked:
    if answer.count("{letter}") != 1:
        raise DataError(f"answer={answer!r}: expected '{{letter}}' in it once")
    if not getattr(hm.tokenizer, "is_fast", False):
        raise DataError("A/B questions need a fast tokenizer, which says where each letter's token stands; give pairs")
    orders = (_order(hm, questions, answer), _order(hm, questions.swapped(), answer))
    first = torch.tensor([1.0 if q.matching < q.other else -1.0 for q in questions])
    return _Asked(orders, first)


def _order(hm: HookManager, questions: ABQuestions, answer: str) -> _Order:
    rows, matching, other = [], [], []
    for number, question in enumerate(questions):
        sides = [_up_to(hm, question, answer, letter) for letter in (question.matching, question.other)]
        (row, right), (twin, wrong) = sides
        if row != twin or right == wrong:
            raise DataError(
                f"question {number}: this tokenizer does not write ({question.matching}) and ({question.other}) with "
                f"one token after the same ones; give another answer=…, such as ' {{letter}}'"
            )
        rows.append(row)
        matching.append(right)
        other.append(wrong)
    ids, mask = pad_rows(rows, pad_id_of(hm.tokenizer))
    tokens = hm.to_tokens(Tokens(ids, mask, tokenizer=hm.tokenizer))
    return _Order(tokens, torch.tensor(matching), torch.tensor(other))


def _up_to(hm: HookManager, question: ABQuestion, answer: str, letter: str) -> tuple[list[int], int]:
    """The tokens of a question with its answer up to the letter, and the token that holds the letter."""
    before, _, after = answer.partition("{letter}")
    templated = bool(getattr(hm.tokenizer, "chat_template", None))
    if templated:
        lead = chat_tokens(hm.tokenizer, [{"role": "user", "content": question.question}]).text
    else:
        lead = question.question.rstrip() + "\n\n"
    text = lead + before + letter + after
    # A rendered conversation brings its own BOS.
    encoded = hm.tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    begin = len(lead) + len(before)
    at = next((i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a <= begin < b), None)
    if not at:
        raise DataError(f"the letter {letter!r} of {question.question[:50]!r} is not found among its tokens")
    return list(encoded["input_ids"][:at]), int(encoded["input_ids"][at])


# -- answers -------------------------------------------------------------------------------------------------------


class _Answers(NamedTuple):
    log_odds: Float[Tensor, "dose question"]
    mass: Float[Tensor, "dose question"]


def _measure(
    hm: HookManager, order: _Order, line: Line | None, doses: Doses, where: Where | None, batch_size: int
) -> _Answers:
    n, k, steers = len(order.tokens), len(doses.values), None if line is None else line.steers
    log_odds, mass = torch.zeros(k, n), torch.zeros(k, n)
    for block in blocks_for(steers, n, k, batch_size):
        edits = edits_of(steers, doses, block, where=where, n_rows=n)
        with quiet_at_zero(doses, block):
            logits = answer_logits(hm.run(order.tokens.take(block.rows), write=edits, logits="last"))
        log_odds[block.doses, block.rows], mass[block.doses, block.rows] = _answers(logits, order, block)
    return _Answers(log_odds, mass)


def _answers(logits: Float[Tensor, "r d_vocab"], order: _Order, block: Block) -> tuple[Tensor, Tensor]:
    both = torch.stack([order.matching[block.rows], order.other[block.rows]], 1).to(logits.device)
    chosen = logits.gather(1, both)
    mass = (chosen - logits.logsumexp(1, keepdim=True)).exp().sum(1)
    return (chosen[:, 0] - chosen[:, 1]).cpu().float(), mass.cpu().float()
