"""The contract table: every family against TransformerLens, the plain model and itself.

python -m tests.contract.table            prints it
python -m tests.contract.table --write    writes tests/contract/TABLE.md
"""

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from tests import oracle
from tests.contract import laws, laws_edits
from tests.families import FAMILIES

PATH = Path(__file__).with_name("TABLE.md")


def _edits(name: str) -> float:
    return max(laws_edits.edits_against_plain(name), laws_edits.pattern_edits(name))


COLUMNS: dict[str, Callable[[str], float | None]] = {
    "plain hooks": laws.against_plain,
    "eager patterns": laws.patterns_against_eager,
    "residual": laws.residual_identity,
    "padded": laws.padded_as_unpadded,
    "batched": laws.batched_as_single,
    "edits": _edits,
    "cached = uncached": laws_edits.generation,
    "gradients": laws_edits.gradients,
}

_INTRODUCTION = f"""# The contract, family by family

Made by `python -m tests.contract.table --write` on tiny random models (perturbed gains and biases, sharpened patterns,
windows of 5 for 12 tokens, active soft-caps, Granite's multipliers), fp32 on the CPU. Numbers are the largest absolute
difference; the tests hold each below {laws.TOLERANCE:.0e}, and logits to the bit.

* **TransformerLens**: every site that both sides read, against `TransformerBridge.run_with_cache` on the same weights
  (scores at masked positions and the differences listed below left out), with the number of sites compared.
* **logits**: equal to the bit to the plain model's: without reads, under all reads, padded left and right.
* **plain hooks**, **eager patterns**: reads against hooks made by hand and the model's own eager attention,
  unpadded, padded left and right.
* **residual**: resid_pre + attn_out + mlp_out = resid_post. **padded**, **batched**: a row among pads, and in a batch,
  reads as the row alone.
* **edits**: `Add`, `Replace`, `Ablate` at resid_pre, resid_post, attn_out, mlp_out, q, k, v, z, mlp_post, pattern and
  attn_scores against edits made by hand. **cached = uncached**: reads during generation under edits, the tokens equal.
* **gradients**: against autograd through the plain model, relative to the largest above 1.
"""


def _number(value: float | None) -> str:
    if value is None:
        return "refused"
    return "0" if value == 0 else f"{value:.0e}"


def _row(name: str) -> str:
    compared = laws.against_transformer_lens(name)
    held = [row.delta for row in compared if row.known is None]
    lens = f"{_number(max(held))} ({len(held)} sites)" if held else "see below"
    logits = "equal" if laws.logits_bit_equal(name) else "DIFFER"
    return " | ".join([name, lens, logits, *(_number(law(name)) for law in COLUMNS.values())])


def _disagreements() -> list[str]:
    lines = ["## Where TransformerLens is at fault", ""]
    for (family, kind), reason in oracle.KNOWN_DIFFERENCES.items():
        where = "from the first pattern on" if kind == "*" else f"`{kind}`"
        lines.append(f"* {family}, {where}: {reason}.")
    lines += [f"* {family}: {reason}." for family, reason in oracle.UNAVAILABLE.items()]
    refused = {name: laws.reading(name).refused for name in FAMILIES}
    if any(refused.values()):
        lines += ["", "## Sites that are refused", ""]
        lines += [f"* {name} {site}: {why}" for name, sites in refused.items() for site, why in sites.items()]
    return lines


def table() -> str:
    """The whole page as Markdown."""
    heads = ["family", "TransformerLens", "logits", *COLUMNS]
    lines = [_INTRODUCTION, "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += [f"| {_row(name)} |" for name in FAMILIES]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines += ["", *_disagreements(), "", f"Versions: {versions}, transformer-lens {version('transformer-lens')}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table, or write it to `TABLE.md`."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    text = table()
    if "--write" in sys.argv[1:]:
        PATH.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
