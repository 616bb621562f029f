"""`fit_refusal`: the one direction that refusal is mediated by, found at the tokens that follow an instruction."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.text import Tokens, pad_id_of, pad_rows, str_tokens, tokenize
from interp.steering.fitting.select import DirectionChoice, Score, SelectOptions, select_direction, token_log_odds

__all__ = ["fit_refusal", "instruction_tokens"]

_LAST = 5  # positions that are looked at where there is no chat template


def fit_refusal(
    hm: HookManager,
    harmful: Sequence[str],
    harmless: Sequence[str],
    harmful_val: Sequence[str],
    harmless_val: Sequence[str],
    *,
    refuses: Score | Sequence[str] = ("I",),
    options: SelectOptions | None = None,
    name: str = "refusal",
) -> DirectionChoice:
    """Find the direction of refusal: mean activation on harmful minus that on harmless instructions, well chosen.

    Candidates are the differences of means at every layer's `resid_pre` and every token that the chat template puts
    after the instruction; without a template, or with `options.chat` off, at the last five. `select_direction` chooses
    among them on the validation instructions. Any behaviour that some prompts show and others do not can be given
    instead. Memory: that of a forward of `options.rows` rows; and 8 · layers · positions · d_model bytes.

    Args:
        hm: the model.
        harmful: instructions that the model refuses (the behaviour is there), at least one.
        harmless: instructions that it follows.
        harmful_val, harmless_val: others of both kinds, to choose on.
        refuses: tokens that a refusal begins with, as texts of one token each; or a score of the behaviour.
        options: the limits of the choice.
        name: of the behaviour.

    Raises:
        DataError: no instructions, one that is to fit on and to choose on, one text where a list of tokens is expected,
            or a text of several tokens.

    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717, §2.3.
    """
    how = SelectOptions() if options is None else options
    if isinstance(refuses, str):
        raise DataError(f"refuses={refuses!r} would be read letter by letter; give a list of tokens, [{refuses!r}]")
    both = sorted(set(harmful) & set(harmful_val) | set(harmless) & set(harmless_val))
    if both:
        raise DataError(
            f"{len(both)} instructions are to fit on and to choose on, such as {both[0][:60]!r}; split them"
        )
    score = refuses if callable(refuses) else token_log_odds([hm.to_single_token(text) for text in refuses])
    parts = [instruction_tokens(hm, texts, chat=how.chat) for texts in (harmful, harmless, harmful_val, harmless_val)]
    counts = [n for _, n in parts]
    positions = list(range(-min(counts), 0))
    bad, good = (_means(hm, tokens, positions, how.rows) for tokens, _ in parts[:2])
    tokens = parts[0][0]
    # The template's tokens are the same after every instruction, so the first one's say what a position is.
    templated = how.chat and bool(getattr(hm.tokenizer, "chat_template", None))
    said = str_tokens(hm.tokenizer, tokens.ids[:1, tokens.mask[0]])[0] if templated else []
    hashed = [t for part, _ in parts[:2] for t in (part.ids, part.mask)]
    model = Provenance.of(hm, settings={"positions": positions}, data=hashed)
    candidates, labels = [], []
    for layer in range(hm.n_layers):
        for i, pos in enumerate(positions):
            v = (bad[layer, i] - good[layer, i]).float()
            if not float(v.norm()) > 0:
                continue  # a template's token sees nothing of the instruction before the first attention
            made = Direction({f"{layer}.resid_pre": v}, "mean_difference", model, read_at=f"pos={pos}", name=name)
            candidates.append(replace(made, folded=hm.is_folded))
            labels.append(f"{pos} {said[pos]!r}" if said else str(pos))
    return select_direction(hm, candidates, score, parts[2][0], parts[3][0], labels=labels, options=how)


def instruction_tokens(hm: HookManager, instructions: Sequence[str], *, chat: bool = True) -> tuple[Tokens, int]:
    """Return instructions as prompts that are ready to be answered, and how many tokens follow an instruction.

    With a chat template each is the user's turn, and the assistant's header follows; the number is that of the
    template's tokens after the instruction. Without one the texts are as they are, and the number is at most five.

    Args:
        hm: the model.
        instructions: the texts.
        chat: use the chat template, where there is one.

    Raises:
        DataError: no instructions, no tokenizer, or a template in which the instruction is not found.
    """
    if isinstance(instructions, str) or not instructions:
        raise DataError(f"expected a list of instructions, got {instructions!r}")
    if not (chat and getattr(hm.tokenizer, "chat_template", None)):
        tokens = tokenize(hm.tokenizer, list(instructions))
        return tokens, min(_LAST, int(tokens.lengths.min()))
    chats = [hm.chat([{"role": "user", "content": text}]) for text in instructions]
    lost = next((text for text, chat in zip(instructions, chats, strict=True) if "user" not in chat.spans), None)
    if lost is not None:
        raise DataError(f"the chat template does not show where {lost[:60]!r} stands; load the fast tokenizer")
    after = [int(chat.spans["user"][0].flip(0).int().argmax()) for chat in chats]
    ids, mask = pad_rows([chat.ids[0].tolist() for chat in chats], pad_id_of(hm.tokenizer))
    return Tokens(ids, mask, bos=all(chat.bos for chat in chats), tokenizer=hm.tokenizer), max(1, min(after))


def _means(hm: HookManager, tokens: Tokens, positions: list[int], rows: int) -> Float[Tensor, "layer position d_model"]:
    """Mean activation at the start of every block and at some positions, in double precision."""
    sites = [Site(f"{layer}.resid_pre").at(pos=positions) for layer in range(hm.n_layers)]
    total = torch.zeros(hm.n_layers, len(positions), hm.d_model, dtype=torch.float64)
    index: Int[Tensor, " n"] = torch.arange(len(tokens))
    for part in index.split(rows):
        out = hm.run(tokens.take(part), read=sites)
        total += torch.stack([out[site].double().sum(0).cpu() for site in sites])
    return total / len(tokens)
