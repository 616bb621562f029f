"""A module from outside transformers, with a map of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import interp

D, HEADS, VOCAB = 16, 2, 30


class Block(nn.Module):
    """Pre-norm attention without projections of its own library, then a ReLU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.att = Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream in, residual stream out."""
        x = x + self.att(self.n1(x))
        return x + self.mlp(self.n2(x))


class Attention(nn.Module):
    """Causal attention that calls torch's kernel itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch pos d] → [batch pos d]."""
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """Two blocks that know nothing of transformers; the forward takes ids and gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(VOCAB, D), nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch pos vocab]."""
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PATHS = {
    "embed": "emb",
    "ln_final": "norm",
    "unembed": "head",
    "block": "blocks.{layer}",
    "ln1": "blocks.{layer}.n1",
    "ln2": "blocks.{layer}.n2",
    "attn": "blocks.{layer}.att",
    **{f"attn.{p}": f"blocks.{{layer}}.att.{p}" for p in "qkvo"},
    "mlp": "blocks.{layer}.mlp",
    "mlp.in": "blocks.{layer}.mlp.0",
    "mlp.out": "blocks.{layer}.mlp.2",
}


def toy_map(**changes: object) -> interp.ModelMap:
    facts: dict[str, object] = {
        "family": "toy",
        "n_layers": 2,
        "d_model": D,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "d_head": D // HEADS,
        "d_vocab": VOCAB,
        "d_mlp": 2 * D,
        "paths": PATHS,
        "attention": "inside",
        "rotary": False,
    }
    return interp.ModelMap(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def test_any_module_reads_and_edits_with_a_map_of_its_own(toy: Toy) -> None:
    hm, ids = interp.HookManager.load(toy, map=toy_map()), torch.randint(0, VOCAB, (2, 7))
    with torch.no_grad():
        plain = toy(ids)
    out = hm.run(ids, read=[site.short for site in hm.sites()], logits="all")
    assert torch.equal(out.logits, plain)
    for layer in range(2):
        total = out["resid_pre", layer] + out["attn_out", layer] + out["mlp_out", layer]
        assert torch.allclose(total, out["resid_post", layer], atol=1e-6)
        z = torch.einsum("bhqk,bkhd->bqhd", out["pattern", layer], out["v", layer])
        assert torch.allclose(z, out["z", layer], atol=1e-6)
    patched = hm.run(ids, write=[interp.Replace("1.resid_post", torch.zeros(D))]).logits
    assert torch.allclose(patched, toy.head(toy.norm.bias.expand(2, 7, D)), atol=1e-6)


def test_a_map_that_points_nowhere_is_refused_with_the_path(toy: Toy) -> None:
    with pytest.raises(interp.ModelError, match=r"blocks\.0\.wrong|'wrong\.0'|wrong"):
        interp.HookManager.load(toy, map=toy_map(paths={**PATHS, "block": "wrong.{layer}"}))


def test_a_module_without_a_config_asks_for_a_map(toy: Toy) -> None:
    with pytest.raises(interp.ModelError, match="ModelMap"):
        interp.HookManager.load(toy)


def test_a_wrong_map_is_found_by_the_sum_of_the_block(toy: Toy) -> None:
    hm = interp.HookManager.load(toy, map=toy_map(residual_multiplier=0.5))
    with pytest.raises(interp.ModelError, match="adds something else"):
        hm.run(torch.randint(0, VOCAB, (1, 5)), read=["0.attn_out"])
