"""What a function vector does on test items, beside its controls."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Add
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.result import Provenance
from interp.core.text import pad_id_of, pad_rows
from interp.core.where import Where
from interp.data.icl import FunctionTask, TaskSplits, icl_pairs
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.heads import head_vectors
from interp.steering.function_vectors.options import ICLOptions, Tasks, chunks, solved, splits_of
from interp.steering.function_vectors.scores import FunctionVectorScores
from interp.steering.function_vectors.screen import try_vectors
from interp.steering.function_vectors.vector import FunctionVector

__all__ = ["evaluate_function_vector"]


def evaluate_function_vector(
    hm: HookManager,
    vector: FunctionVector,
    task: Tasks,
    *,
    templates: Sequence[str] = (),
    n_random: int = 5,
    options: ICLOptions | None = None,
    seed: int = 0,
) -> FunctionVectorScores:
    """Score a function vector on test items: without shots, with shots that do not show it, in other wordings.

    Three controls stand beside it: no vector; as many random heads' vectors, of heads that it is not made of; and the
    mean residual stream of the layer itself. Each is added at the last token, after every block in turn. At the
    vector's own layer, whole answers are scored too: all of an answer's tokens are the most likely ones, given those
    before, which is what greedy decoding gives. In other wordings it is then added at every token of the answer.

    Memory: as for `sweep`, with batch_size rows; for whole answers batch_size · longest answer · d_vocab logits.

    Args:
        hm: the model.
        vector: the vector.
        task: the task, or its splits; they must be those that the vector was made with.
        templates: other wordings, with {input} and {output}; tried without shots.
        n_random: sets of random heads.
        options: shots, corruption, batch size; the corruption is scored beside "shuffled".
        seed: of prompts and random heads.

    Returns:
        Right or wrong, and log-probability, per condition, vector, layer and test item.

    Raises:
        ConfigError: no random sets.
        DataError: fewer heads outside the vector than in it, or test items that it was made of.
        ModelError: a vector of another model.

    Source: Todd et al. (2023), arXiv 2310.15213, §3.1. Departures: test items are not filtered by what the model solves
    (`ceiling` says what it solves); random heads are drawn outside the vector's; whole answers.
    """
    options, splits = options or ICLOptions(n_shots=vector.n_shots), splits_of(task)
    if type(n_random) is not int or n_random < 1:
        raise ConfigError(f"n_random={n_random!r}: expected a whole number ≥ 1; a vector without controls says little")
    vector.direction.check(hm)
    _refuse_leaks(vector, splits)
    conditions = _conditions(splits, templates, options, seed)
    names = ["function vector", *(f"random heads {i + 1}" for i in range(n_random)), "layer average"]
    layers = list(range(max(1, hm.n_layers - 1)))
    layers = sorted({*layers, vector.layer})
    plain = torch.stack([vector.vector, *_random(hm, vector, n_random, seed)])[:, None].expand(-1, len(layers), -1)
    vectors = torch.cat([plain, vector.resid[layers][None]])
    right, log_prob, full = [], [], []
    for pairs, side, _ in conditions.values():
        tried = try_vectors(hm, pairs, vectors, layers, side=side, options=options)
        base = [x[None, None].expand(1, len(layers), -1) for x in (tried.base_right, tried.base_log_prob)]
        right.append(torch.cat([base[0], tried.right]))
        log_prob.append(torch.cat([base[1], tried.log_prob]))
    chosen = torch.cat([torch.zeros(1, hm.d_model), vectors[:, layers.index(vector.layer)]])
    for i, (pairs, side, everywhere) in enumerate(conditions.values()):
        first = right[i][:, layers.index(vector.layer)]
        full.append(_whole(hm, pairs, side, chosen, vector.site, everywhere, options.batch_size, first))
    shown = icl_pairs(splits.test, splits.train, n_shots=options.n_shots, seed=seed)
    settings = {**options.settings(), "task": splits.train.name, "templates": list(templates), "n_random": n_random}
    return FunctionVectorScores(
        provenance=Provenance.of(hm, settings=settings, data=[vector.vector], seed=seed),
        task=vector.task,
        conditions=list(conditions),
        vectors=["none", *names],
        layers=layers,
        layer=vector.layer,
        right=torch.stack(right),
        log_prob=torch.stack(log_prob),
        full=torch.stack(full),
        ceiling=solved(hm, shown, batch_size=options.batch_size).float(),
        inputs=[str(pair.meta["input"]) for pair in shown],
    )


Condition = tuple[PromptPairs, str, bool]
"""Prompts, the side of them that is meant, and whether every token of the answer is edited."""


def _conditions(splits: TaskSplits, templates: Sequence[str], options: ICLOptions, seed: int) -> dict[str, Condition]:
    test, train = splits.test, splits.train
    made: dict[str, Condition] = {"zero_shot": (icl_pairs(test, train, n_shots=0, seed=seed), "clean", False)}
    for corruption in dict.fromkeys(("shuffled", options.corruption)):
        if corruption != "zero_shot":
            pairs = icl_pairs(test, train, n_shots=options.n_shots, corruption=corruption, seed=seed)
            made[corruption] = (pairs, "corrupted", False)
    for template in templates:
        worded: FunctionTask = test.with_template(template)
        made[template] = (icl_pairs(worded, train, n_shots=0, seed=seed), "clean", True)
    return made


def _refuse_leaks(vector: FunctionVector, splits: TaskSplits) -> None:
    """Refuse test items that the vector was made of; those of another function are no leak."""
    name = splits.train.name
    known = set(vector.seen) & set(splits.test.inputs) if vector.task in (name, f"{name}, rebuilt") else set[str]()
    if known:
        raise DataError(
            f"{len(known)} of {len(splits.test.inputs)} test items, such as {min(known)!r}, are among those that the "
            "vector was made of; give the splits that it was made with"
        )


def _random(hm: HookManager, vector: FunctionVector, n: int, seed: int) -> list[Float[Tensor, " d_model"]]:
    """Sums of as many heads' vectors, of heads that the vector is not made of."""
    every = [(layer, head) for layer in range(hm.n_layers) for head in range(hm.n_heads)]
    rest = [head for head in every if head not in set(vector.heads)]
    k = len(vector.heads)
    if len(rest) < k:
        raise DataError(f"the vector is of {k} of {len(every)} heads, so there are not {k} others for a control")
    draw = torch.Generator().manual_seed(seed)
    sets = [[rest[i] for i in torch.randperm(len(rest), generator=draw)[:k].tolist()] for _ in range(n)]
    return [head_vectors(hm, vector.written, heads).sum(0) for heads in sets]


# -- whole answers -----------------------------------------------------------------------------------------------


def _whole(
    hm: HookManager,
    pairs: PromptPairs,
    side: str,
    vectors: Float[Tensor, "vector d_model"],
    site: str,
    everywhere: bool,
    batch_size: int,
    first: Float[Tensor, "vector row"],
) -> Float[Tensor, "vector row"]:
    """Whether all tokens of an answer are the most likely ones; the first row of vectors is none."""
    parts = [part.tokens(hm, side="left", same_length=False) for part in chunks(pairs, batch_size)]
    if all(len(answer) == 1 for held in parts for answers in held.answers for answer in answers):
        return first
    readout = Readout.of(hm)
    found = []
    for held in parts:
        found.append(torch.stack([_decoded(hm, held, side, v, site, everywhere, readout) for v in vectors]))
    return torch.cat(found, 1)


@torch.no_grad()
def _decoded(
    hm: HookManager,
    held: PairTokens,
    side: str,
    vector: Float[Tensor, " d_model"],
    site: str,
    everywhere: bool,
    readout: Readout,
) -> Float[Tensor, " row"]:
    tokens = held.clean if side == "clean" else held.corrupted
    prompts = [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    owner = [row for row, answers in enumerate(held.answers) for _ in answers]
    answers = [list(answer) for some in held.answers for answer in some]
    rows = [prompts[row] + answer[:-1] for row, answer in zip(owner, answers, strict=True)]
    ids, mask = pad_rows(rows, pad_id_of(hm.tokenizer))
    read, edited = _places(mask, [len(prompts[row]) for row in owner], everywhere)
    write: list[Any] = [Add(site, vector, where=Where(mask=edited))] if bool(vector.any()) else []
    last = f"{hm.n_layers - 1}.resid_post"
    stream = hm.run(ids, mask=mask, read=[last], write=write)[last]
    said = readout.logits(stream[read.to(stream.device)]).argmax(-1).cpu()
    wanted = torch.tensor([token for answer in answers for token in answer])
    right = torch.zeros(len(owner), dtype=torch.long)
    lengths = torch.tensor([len(answer) for answer in answers])
    right.scatter_add_(0, torch.repeat_interleave(torch.arange(len(owner)), lengths), (said == wanted).long())
    best = torch.zeros(len(prompts))
    whole = (right == lengths).float()
    return best.scatter_reduce(0, torch.tensor(owner), whole, "amax")


def _places(
    mask: Bool[Tensor, "row pos"], lengths: list[int], everywhere: bool
) -> tuple[Bool[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Columns whose logits say an answer's tokens, and those where the vector is added; pads are on the right."""
    place = torch.arange(mask.shape[1])[None]
    last = torch.tensor(lengths)[:, None] - 1
    read = mask & (place >= last)
    return read, read if everywhere else place == last
