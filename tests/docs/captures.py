"""The capture that tests of the command line begin with: a tiny model, a small text, two sites."""

import json
from pathlib import Path

import torch

from tests.families import make, word_tokenizer

SITES = ["1.resid_post", "0.z"]


def capture_words(folder: Path) -> list[str]:
    """The words of a capture, but for where it goes, once its model and text have been written to a folder."""
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 120, (9,), generator=draw).tolist() for _ in range(120)]
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    words = ["capture", "--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), "--sites", *SITES]
    return [*words, "--text.ctx", "16", "--text.rows", "4", "--text.part", "train", "--store.unit-documents", "20"]
