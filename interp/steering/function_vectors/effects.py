"""`head_effects`: how much each head's mean output brings a function back into prompts that do not show it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.sweep import Sweep
from interp.core.sweep_cells import Cells
from interp.core.text import Tokens
from interp.data.icl import CORRUPTIONS, TaskSplits, icl_pairs
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.effects_result import HeadEffects
from interp.steering.function_vectors.heads import HeadMeans, mean_head_activations
from interp.steering.function_vectors.options import (
    ICLOptions,
    Tasks,
    last_column,
    refuse_unsolved,
    solved,
    splits_of,
)

__all__ = ["head_cells", "head_effects", "means_of", "patch_heads", "trial_pairs"]

# A corruption that leaves more than this share of the probability has not taken the function away.
_LEFT = 0.9


def head_effects(
    hm: HookManager,
    tasks: Tasks | Sequence[Tasks],
    *,
    options: ICLOptions | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadEffects:
    """Measure the causal indirect effect of every head: put its mean output in its place at the last token.

    CIE(l, h) = p(answer | corrupted prompt, z_{l,h} ← ā_{l,h}) − p(answer | corrupted prompt), for the first token of
    the answer; ā is the head's mean over in-context prompts that show the function. The average over trials, and over
    tasks, ranks the heads. Questions are validation items that the model solves with true shots; shots, and the prompts
    of ā, come from the training items; test items are not looked at.

    All heads of a task are tried through one sweep: only the last column is run again, from the head's layer on.
    Memory: as for `sweep` with n_trials rows of the prompts' width T: the base run's streams, keys and values,
    n_trials · T · n_layers · (d_model + 2 n_kv_heads d_head) of them, and `budget_bytes` for the branches.

    Args:
        hm: the model.
        tasks: one task or several; each is split with seed 0 unless it is split already.
        options: trials, shots, corruption; see `ICLOptions`.
        seed: of the prompts.
        progress: show a bar on stderr. Ctrl-C keeps what is done.

    Returns:
        The effects per task, trial, layer and head, with the means.

    Raises:
        ConfigError: something that is no task.
        DataError: a task of which the model solves no validation item, or with too few shots.
        SiteError: a block without attention heads.

    Source: Todd et al. (2023), arXiv 2310.15213, §2.3, eq. 3–4. Departures: questions are of the validation items
    alone; corruptions other than shuffled outputs.
    """
    options = options or ICLOptions()
    given = [tasks] if isinstance(tasks, Tasks) else list(tasks)
    wrong = next((task for task in given if not isinstance(task, Tasks)), None)
    if not given or wrong is not None:
        what = "none" if wrong is None else f"{type(wrong).__name__} {wrong!r:.40}"
        raise ConfigError(f"expected a FunctionTask, its splits, or a list of them, got {what}")
    splits = [splits_of(task) for task in given]
    ready = [_Trials.of(hm, s, options, seed) for s in splits]
    shape = (len(ready), options.n_trials, hm.n_layers, hm.n_heads)
    patched = torch.full(shape, torch.nan)
    sides = torch.full((2, *shape[:2]), torch.nan)
    means: list[HeadMeans] = []
    notes: list[str] = []
    try:
        with _bar(len(ready) * hm.n_layers * hm.n_heads, progress) as step:
            for i, trials in enumerate(ready):
                means.append(mean_head_activations(hm, trials.shown, batch_size=options.batch_size))
                table = (patched[i], sides[:, i])
                said = patch_heads(hm, trials.pairs, means[i].z, table, options=options, step=step)
                notes += [note for note in said if note not in notes]
    except KeyboardInterrupt:
        if bool(sides[1].isnan().all()):  # filled in once a task's heads are begun
            raise
        notes.append(f"stopped: {float((~patched.isnan()).float().mean()):.0%} of the effects are measured")
    n = int((~sides[1, :, 0].isnan()).sum())
    means = means[:n]
    ready, splits, patched, sides = ready[:n], splits[:n], patched[:n], sides[:, :n]
    notes += _remarks(splits, patched.exp() - sides[1].exp()[..., None, None], sides.exp(), options)
    ids = [r.ids for r in ready]
    return HeadEffects(
        provenance=Provenance.of(hm, settings=options.settings(), data=ids, seed=seed),
        tasks=[s.train.name for s in splits],
        patched=patched,
        clean=sides[0],
        corrupted=sides[1],
        z=torch.stack([m.z for m in means]),
        written=torch.stack([m.written for m in means]),
        resid=torch.stack([m.resid for m in means]),
        solved=[r.solved for r in ready],
        corruption=options.corruption,
        n_shots=options.n_shots,
        notes=notes,
    )


def means_of(hm: HookManager, splits: TaskSplits, options: ICLOptions, seed: int) -> HeadMeans:
    """Return the means of one task's heads, over prompts of training items."""
    return mean_head_activations(hm, _shown(splits, options, seed), batch_size=options.batch_size)


def trial_pairs(hm: HookManager, splits: TaskSplits, options: ICLOptions, seed: int) -> tuple[PromptPairs, str]:
    """Return the trials of a task, asked of the validation items that the model solves; and how many those are.

    Raises:
        DataError: it solves none.
    """
    everything = icl_pairs(splits.validation, splits.train, n_shots=options.n_shots, seed=seed)
    right = solved(hm, everything, batch_size=options.batch_size)
    refuse_unsolved(splits.train.name, int(right.sum()), len(right), options.n_shots)
    inputs = {str(pair.meta["input"]) for pair, ok in zip(everything, right.tolist(), strict=True) if ok}
    kept = splits.validation.keep(inputs.__contains__)
    corruption, n = options.corruption, options.n_trials
    pairs = icl_pairs(kept, splits.train, n, n_shots=options.n_shots, corruption=corruption, seed=seed)
    return pairs, f"{int(right.sum())} of {len(right)}"


def _shown(splits: TaskSplits, options: ICLOptions, seed: int) -> PromptPairs:
    return icl_pairs(splits.train, splits.train, options.n_prompts, n_shots=options.n_shots, seed=seed + 1)


class _Trials(NamedTuple):
    """The trials of one task: corrupted prompts with their twins, prompts that show it, what is solved, token ids."""

    pairs: PromptPairs
    shown: PromptPairs
    solved: str
    ids: Tensor

    @classmethod
    def of(cls, hm: HookManager, splits: TaskSplits, options: ICLOptions, seed: int) -> "_Trials":
        pairs, right = trial_pairs(hm, splits, options, seed)
        ids = pairs.tokens(hm, side="left", same_length=False).corrupted.ids
        return cls(pairs, _shown(splits, options, seed), right, ids)


def patch_heads(
    hm: HookManager,
    pairs: PromptPairs,
    z: Float[Tensor, "layer n_heads d_head"],
    table: tuple[Float[Tensor, "trial layer n_heads"], Float[Tensor, "side trial"]],
    *,
    options: ICLOptions | None = None,
    step: Callable[[int], Any] = lambda n: None,
) -> list[str]:
    """Put one head's output at the last token of corrupted prompts in its place, head by head.

    Args:
        hm: the model.
        pairs: the prompts and their answers.
        z: what each head's output becomes.
        table: filled in with log-probabilities of the answer, in nats: of each head's patch, as it is done; and of the
            clean and the corrupted prompts as they are.
        options: engine and budget of the sweep.
        step: told how many heads are done.

    Returns:
        The sweep's notes.
    """
    options = options or ICLOptions()
    tokens = pairs.tokens(hm, side="left", same_length=False)
    metric = tokens.metric("log_prob")
    patched, sides = table
    sides[0] = metric(hm.run(tokens.clean, logits="last")).float().cpu()
    cells = head_cells(hm, tokens.corrupted, z)
    sweep = Sweep(hm, tokens.corrupted, cells, [metric], engine=options.engine, budget_bytes=options.budget_bytes)
    sides[1] = sweep.base[0]
    flat = patched.view(len(patched), -1)
    for done in sweep:
        flat[:, done.cells] = done.values[0].T
        step(len(done.cells))
    return sweep.notes


def head_cells(hm: HookManager, tokens: Tokens, z: Float[Tensor, "layer n_heads d_head"]) -> list[Cells]:
    """Return one cell for each head: its output at the last token of left-padded prompts becomes a given one.

    Rows in which a head's output is the given one already are left out.
    """
    layers = range(hm.n_layers)
    own = hm.run(tokens, read=[Site(f"{layer}.z").at(pos=-1) for layer in layers])
    batch, width = tokens.ids.shape
    made = []
    for layer in layers:
        here = own[f"{layer}.z"]
        value = z[layer].to(here)
        differs = (here != value).any(-1).T.cpu()
        columns = last_column(len(value), batch, width) & differs[:, :, None]
        made.append(Cells.replacing(f"{layer}.z", value[None, None], columns, heads=torch.arange(len(value))))
    return made


def _remarks(
    splits: Sequence[TaskSplits],
    effects: Float[Tensor, "task trial layer n_heads"],
    sides: Float[Tensor, "side task trial"],
    options: ICLOptions,
) -> list[str]:
    """What makes the effects mean less than they seem to; a table of zeros is warned about."""
    notes = []
    for i, split in enumerate(splits):
        clean, broken = float(sides[0, i].mean()), float(sides[1, i].mean())
        if broken > _LEFT * clean:
            other = " or ".join(repr(c) for c in CORRUPTIONS if c not in ("shuffled", options.corruption))
            notes.append(
                f"{split.train.name}: corruption {options.corruption!r} leaves the answer at p = {broken:.3g} of "
                f"{clean:.3g}, so there is next to nothing to bring back; try {other}"
            )
        measured = effects[i][~effects[i].isnan()]
        if len(measured) and not bool(measured.any()):
            notes.append(
                f"{split.train.name}: every effect is exactly 0. Either each head's mean is its own value in these "
                f"prompts (corrupted and clean prompts are the same?), or the answer's probability ({broken:.1e}) is "
                "too small to move; look at `patched`, in nats"
            )
            warnings.warn(notes[-1], stacklevel=3)
    return notes


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="heads", unit="head", disable=None if show else True) as bar:
        yield bar.update
