"""Dictionaries that share a budget of active latents among the tokens of a batch."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError
from interp.data.store import Batch
from interp.dictionaries.base import SAE, Dictionary, DictionaryConfig, Losses, Transcoder
from interp.dictionaries.jumprelu import JumpReLUConfig, JumpReLUSAE, JumpReLUTranscoder, JumpReLUTranscoderConfig
from interp.dictionaries.objective import Objective
from interp.dictionaries.select import encode_batch_topk, encode_columns
from interp.dictionaries.sparse import Activity, SparseDictionary

__all__ = ["BatchTopKDictionary", "BatchTopKSAE", "BatchTopKTranscoder", "FeatureChoiceSAE", "zipf_budget"]

# Of averages over batches, the share that stays at each step. Thresholds fall while latents sharpen: with 0.99, the
# usual choice, a run of 150 steps ended 7 % above the threshold that gives k, and so with an L0 of 28 for a k of 32.
_MEMORY, _USAGE_MEMORY = 0.9, 0.99
_FLOOR = 0.9  # of the usual smallest choice: what lies below is passed over at first


class BatchTopKDictionary(SparseDictionary):
    """Keeps the k · n largest pre-activations of a batch of n tokens, at least zero: k per token on average.

    At inference a latent is active above the average of the smallest pre-activation that batches chose, so what is
    saved is a JumpReLU dictionary. This is also the Mutual Choice of Ayonrinde 2024 (2411.02124), for which
    `objective.aux` "zipf" gives the error not only to dead latents but to all that fire less than their rank should.

    Source: Bussmann, Leask & Nanda 2024, "BatchTopK sparse autoencoders" (2412.06410).

    Args:
        cfg: sizes and SAELens' settings of the dictionary at inference.
        objective: what it is trained to do.
        k: active latents per token, on average.

    Raises:
        ConfigError: more active latents than there are.
    """

    least: Tensor
    weight: Tensor
    usage: Tensor
    usage_weight: Tensor

    def __init__(self, cfg: DictionaryConfig, objective: Objective | None = None, *, k: int) -> None:
        super().__init__(cfg, objective)
        if not 0 < k <= cfg.d_sae:
            raise ConfigError(f"k is {k} for {cfg.d_sae} latents; it must be from 1 to {cfg.d_sae}")
        self.k = self.k_now = k
        # Averages over batches, biased to 0 by the same `weight` that they are divided by.
        self.register_buffer("least", torch.zeros(self._thresholds, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(self._thresholds, dtype=torch.float64))
        self.register_buffer("usage", torch.zeros(cfg.d_sae, dtype=torch.float64))
        self.register_buffer("usage_weight", torch.zeros(1, dtype=torch.float64))
        self._seen: tuple[Tensor, Tensor] | None = None
        self._fired: tuple[Tensor, Tensor | int] | None = None

    @property
    def _thresholds(self) -> int:
        """How many thresholds are kept: one for all latents."""
        return 1

    @classmethod
    def from_cfg(cls, cfg: Any) -> Dictionary:
        """Refuse: what is saved is a JumpReLU dictionary."""
        raise ArtifactError(f"a {cls.__name__} is saved as the JumpReLU dictionary that it is at inference; load that")

    @property
    def threshold(self) -> Float[Tensor, "n"]:
        """Above what latents are active at inference: one number, or one per latent."""
        mean = self.least / self.weight.clamp_min(1e-12)
        # A latent that was never given a token while others were is not active anywhere.
        never = (self.weight == 0) & (self.weight > 0).any()
        return mean.masked_fill(never, torch.inf).to(self.W_enc.dtype)

    def check_split(self, tokens: int, latents: int) -> None:
        """Refuse to be trained by processes that it cannot be split among; as for every dictionary.

        Raises:
            ConfigError: says why.
        """
        super().check_split(tokens, latents)
        if latents > 1 and self.objective.aux == "zipf":
            raise ConfigError("aux 'zipf' ranks all latents by their usage, which shards do not know: train.shards 1")

    def at(self, done: float) -> None:
        """Be told which share of the training is done, before each step."""
        super().at(done)
        self.k_now = self.objective.k_at(done, self.k, self.cfg.d_sae)

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations, as the saved dictionary does."""
        pre = self._pre(self._check_input(x))
        return pre.relu() * (pre > self.threshold)

    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        """Return the training loss of a batch; with `objective.aux` "zipf" more than dead latents get the error.

        Args:
            batch: activations.
            dead: latents that AuxK trains on the error; None for none.
        """
        made = super().loss(batch, dead=self._needy(dead))
        tokens = self.across.tokens
        self._fired = made.fired, tokens.count(len(batch.x)) if batch.mask is None else tokens.sum(batch.mask.sum())
        return made

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        # A look at the threshold costs a GPU a wait, and helps a CPU alone.
        floor = _FLOOR * float(self.threshold) if x.device.type == "cpu" and float(self.weight) > 0 else None
        n = self.across.count(len(x)) * min(self.k_now, self.cfg.d_sae)
        codes, revived, least = encode_batch_topk(x, self._encoder(dead=dead), n=n, floor=floor)
        # Of no tokens there is no choice to remember.
        self._seen = least.clamp_min(0)[None], torch.full_like(least, n > 0, dtype=torch.bool)[None]
        return Activity(codes.values.relu(), codes, revived)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore constraints, and take the batch's choice into the averages."""
        super().after_step()
        if self._seen is None or self._fired is None:
            return
        least, there = self._seen
        kept = torch.where(there, _MEMORY, 1.0).to(self.least)
        self.least.mul_(kept).add_((1 - kept) * least.to(self.least))
        self.weight.mul_(kept).add_(1 - kept)
        fired, n_tokens = self._fired
        count = torch.as_tensor(n_tokens, device=self.usage.device)
        stays = torch.where(count > 0, _USAGE_MEMORY, 1.0).to(self.usage)
        self.usage.mul_(stays).add_((1 - stays) * fired.to(self.usage) / count.clamp_min(1))
        self.usage_weight.mul_(stays).add_(1 - stays)
        self._seen = self._fired = None

    def _needy(self, dead: Tensor | None) -> Tensor | None:
        """Latents that get the error: dead ones, or all that fire less than half as often as their rank should."""
        if self.objective.aux != "zipf" or dead is None:
            return dead
        order = self.usage.argsort(descending=True, stable=True)
        budget = zipf_budget(self.cfg.d_sae, float(self.k), self.objective.zipf_alpha, self.objective.zipf_beta)
        expected = torch.empty_like(self.usage)
        expected[order] = budget.to(self.usage) * self.usage_weight
        return dead | (self.usage < 0.5 * expected)

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float | None = None) -> None:
        """Turn a dictionary of `scale · x` into the same one of `x`, its latents divided by `scale`, in place."""
        super().fold_scale(scale, target_scale)
        self.least.div_(scale)

    def fold_decoder_norm(self) -> None:
        """Refuse: tokens would share the budget in another way.

        Raises:
            ConfigError: always; `frozen()` has a threshold for each latent, which goes with its norm.
        """
        raise ConfigError("the norms of decoder rows cannot be folded before training has ended; fold frozen()'s")

    def _freeze(self, made: JumpReLUSAE | JumpReLUTranscoder) -> Dictionary:
        state = {name: value for name, value in self.state_dict().items() if name in made.state_dict()}
        made.to(self.W_enc).load_state_dict({**state, "threshold": self.threshold.expand(self.cfg.d_sae)})
        return made.train(self.training).requires_grad_(self.W_enc.requires_grad)


class BatchTopKSAE(BatchTopKDictionary, SAE):
    """Keeps the k · n largest pre-activations of a batch of n tokens, k per token on average; saved as a JumpReLU SAE.

    Source: Bussmann, Leask & Nanda 2024, "BatchTopK sparse autoencoders" (2412.06410), as in `BatchTopKDictionary`.
    """

    cfg: JumpReLUConfig

    def frozen(self) -> Dictionary:
        """Return the JumpReLU SAE that it is at inference."""
        return self._freeze(JumpReLUSAE(self.cfg, self.objective))


class BatchTopKTranscoder(BatchTopKDictionary, Transcoder):
    """A BatchTopK transcoder, with or without a skip connection; saved as a JumpReLU transcoder."""

    cfg: JumpReLUTranscoderConfig

    def frozen(self) -> Dictionary:
        """Return the JumpReLU transcoder that it is at inference."""
        return self._freeze(JumpReLUTranscoder(self.cfg, self.objective))


class FeatureChoiceSAE(BatchTopKSAE):
    """Each latent takes its largest pre-activations of a batch: as many tokens as its rank by usage allows.

    The budgets m ∝ 1 / (rank + β)^α add up to k · n for n tokens; α = 0 gives every latent the same. So no latent is
    ever without tokens, as long as the budget of the last is 1 at least. Each latent keeps a threshold of its own.
    Memory: all pre-activations of a batch.

    Source: Ayonrinde 2024 (2411.02124): a reproduction, for the paper's coefficients are not public; the knobs are
    `objective.zipf_alpha` and `objective.zipf_beta`.
    """

    @property
    def _thresholds(self) -> int:
        return self.cfg.d_sae

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        codes, revived = encode_columns(x, self._encoder(dead=dead), per_latent=self.budget(len(x)))
        least = x.new_full((self.cfg.d_sae,), torch.inf)
        least.scatter_reduce_(0, codes.index, codes.values.detach(), "amin")
        there = least.isfinite()
        self._seen = torch.where(there, least, 0).clamp_min(0), there
        return Activity(codes.values.relu(), codes, revived)

    def check_split(self, tokens: int, latents: int) -> None:
        """Refuse several processes.

        Raises:
            ConfigError: always, where there is more than one.
        """
        if tokens * latents > 1:
            raise ConfigError(
                "in feature_choice each latent chooses among all tokens of a batch and by its rank among all latents, "
                "which no process alone knows: train it with one process, or use batchtopk"
            )

    def budget(self, n_tokens: int) -> Int[Tensor, "d_sae"]:
        """How many tokens of so many each latent may take: k · n_tokens together."""
        total = min(self.k_now * n_tokens, n_tokens * self.cfg.d_sae)
        shares = zipf_budget(self.cfg.d_sae, float(total), self.objective.zipf_alpha, self.objective.zipf_beta)
        whole = shares.floor().clamp(max=n_tokens)
        # What rounding has left goes to those that lost most by it, in order of rank.
        while (rest := total - int(whole.sum())) > 0:
            order = (shares - whole).masked_fill(whole >= n_tokens, -torch.inf).argsort(descending=True, stable=True)
            whole[order[: min(rest, int((whole < n_tokens).sum()))]] += 1
        made = torch.empty(self.cfg.d_sae, dtype=torch.long, device=self.usage.device)
        made[self.usage.argsort(descending=True, stable=True)] = whole.long().to(made.device)
        return made


def zipf_budget(n: int, total: float, alpha: float, beta: float) -> Float[Tensor, "n"]:
    """Return shares of a total that fall with rank as 1 / (rank + β)^α, rank from 1: on the CPU, in float64."""
    shares = (torch.arange(1, n + 1, dtype=torch.float64) + beta).pow(-alpha)
    return total * shares / shares.sum()
