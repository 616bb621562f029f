"""Run by `test_tensor_parallel` under torchrun: `tensor_parallel.py MODEL TEXT OUT`; two processes hold one model."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import interp
from interp.cli.main import main as command
from interp.core.disk import weights_digest

LAYOUT = ["--text.ctx", "32", "--text.rows", "4", "--store.dtype", "float32", "--store.unit-documents", "8"]


def line(model: str, text: str, out: str) -> list[str]:
    """The command."""
    return ["capture", "--model", model, "--sites", "1.resid_post", "0.mlp_out", "--data", text, "--out", out, *LAYOUT]


def main(model: str, text: str, out: Path) -> None:
    """Capture; refuse what is split; say what each process saw."""
    torch.set_num_threads(1)
    code = command([*line(model, text, str(out / "store")), "--tensor-parallel"])
    hm, refused = interp.HookManager.load(model, model_kwargs={"tp_plan": "auto"}), ""
    for site in ("1.z", "0.mlp_post", "1.pattern"):
        try:
            hm.run(torch.arange(5, 9)[None], read=site)
        except interp.SiteError as err:
            refused += str(err)
    said = f"{code} {refused.count('split among 2 processes')} {weights_digest(hm.model)}"
    (out / f"rank{os.environ['RANK']}").write_text(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
