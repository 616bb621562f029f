"""The README is true: its Python runs, its tables are the code's, its commands exist."""

import re
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import tests.source as source
from interp.cli.main import VERBS
from interp.cli.main import main as command
from tests.docs import tables

README = tables.README.read_text(encoding="utf-8")
GUIDES = {page.parent.name: page.read_text(encoding="utf-8") for page in tables.GUIDES}
PAGES = {"README": README, **GUIDES}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def right_hand_lines() -> list[str]:
    """The code cells under "here" in the section for people who come from other libraries."""
    section = README.split("## Coming from elsewhere")[1].split("\n## ")[0]
    cells = [row.split(" | ")[-1] for row in section.splitlines() if row.startswith("| ")][1:]
    return [cell.strip(" |`") for cell in cells]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The README's Python, run from top to bottom; what it defined."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        # What `interp train` leaves, but for the training.
        save_a_dictionary(Path("runs/first"), d_model=128)
        for block in [block for page in PAGES.values() for block in blocks("python", page)]:
            exec(compile(block, "README.md", "exec"), names)
        names["folder"] = Path.cwd()
    return names


def test_the_session_runs_and_its_comments_are_true(session: dict[str, Any]) -> None:
    out, one, g, hm = (session[name] for name in ("out", "one", "g", "hm"))
    batch, pos = out.tokens.shape
    assert out["2.resid_post"].shape == (batch, pos, hm.d_model)
    assert out["resid_post", 2] is out["blocks.2.hook_resid_post"]
    assert one["3.z"].shape == (batch, hm.d_head)
    assert g["2.resid_post"].shape == g.grad["2.resid_post"].shape
    assert g.grad["2.resid_post"].abs().sum() > 0
    assert "<script" in (session["folder"] / "attention.html").read_text()


def test_the_lines_for_people_from_other_libraries_run(
    session: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(session["folder"])
    lines = right_hand_lines()
    assert len(lines) > 10
    for line in lines:
        with warnings.catch_warnings():
            # An untrained dictionary on an untrained model: notes about it are no failure of the line.
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(line, "README.md", "exec"), session)


def save_a_dictionary(folder: Path, d_model: int) -> None:
    import torch

    from interp.dictionaries.topk import TopKConfig, TopKSAE

    sae = TopKSAE(TopKConfig(d_in=d_model, d_sae=32, k=4))
    sae.init_from(torch.randn(100, d_model), seed=0)
    sae.save(folder, notes={"hook_name": "blocks.2.hook_resid_post"})


def test_the_listing_of_the_nouns_runs(session: dict[str, Any]) -> None:
    import interp

    hm, text, v = (session[name] for name in ("hm", "text", "v"))
    clean, corrupt = hm.run(session["clean"], read=["3.z"]), session["corrupted"]
    out = hm.run(text, read=["*.resid_post", "3.z"], to="cpu", logits="all")
    assert out.stack("resid_post").shape == (hm.n_layers, *out.tokens.shape, hm.d_model)
    assert out.logits.shape == (*out.tokens.shape, hm.d_vocab)
    assert not [note for note in out.notes if "BOS" not in note]
    where = interp.Where(pos=-1, head=1)
    last = hm.run(corrupt, write=[interp.Replace("3.z", clean["3.z"], where=where)], logits="last")
    assert last.logits.shape == (1, 1, hm.d_vocab)
    chat = hm.chat([{"role": "user", "content": "Where does Mary live?"}])
    steer = interp.Add("2.resid_post", v, scale=4.0, where=interp.Where.generated())
    assert len(hm.generate(chat, max_new_tokens=3, write=[steer]).text) == 1


def test_the_generated_tables_are_the_codes() -> None:
    for page in tables.GENERATED:
        assert tables.renewed(page) == page.read_text(encoding="utf-8"), "run python -m tests.docs.tables --write"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_the_commands_on_the_page_exist_and_their_options_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line) for block in blocks("bash", page) for line in block.splitlines()]
    assert page is not README or ["bash", "scripts/test"] in commands
    for words in commands:
        if words[0] == "interp":
            assert words[1] in VERBS
            options = [word for word in words[2:] if word.startswith("--")]
            # Of "store" and "testbed", the second word is a verb too.
            with suppress(SystemExit):
                command([*words[1 : 3 if words[1] in ("store", "testbed") else 2], "--help"])
            known = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
            assert all(option in known for option in options), (words, options)
    for path in re.findall(r"`(?:bash |python )?((?:scripts|notebooks|tests|benchmarks|configs)/[\w./-]+)", page):
        assert (source.REPO / path).exists(), f"the page names {path}"
    for name in re.findall(r"`(test_\w+\.py)`", page):
        assert list((source.REPO / "tests").rglob(name)), f"the page names {name}"


def test_the_pages_are_short_and_plain() -> None:
    assert all(len(page.splitlines()) <= 280 for page in PAGES.values())
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home)/", "".join(PAGES.values()))


@pytest.mark.parametrize("path", sorted((source.REPO / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_config_parses_and_opens_with_its_command(path: Path) -> None:
    from interp.cli.attribute import AttributeConfig
    from interp.cli.capture import CaptureConfig
    from interp.cli.circuit import CircuitConfig
    from interp.cli.patch import PatchConfig
    from interp.cli.probe import ProbeConfig
    from interp.cli.steer import SteerConfig
    from interp.train.build_testbed import BuildConfig
    from interp.train.config import TrainConfig

    text = path.read_text(encoding="utf-8")
    opening = "\n".join(line for line in text.splitlines()[:6] if line.startswith("#"))
    kind: dict[str, type[BaseModel]] = {"interp train": TrainConfig, "interp testbed rebuild": BuildConfig}
    kind |= {"interp capture": CaptureConfig, "interp patch": PatchConfig}
    kind |= {"interp attribute": AttributeConfig, "interp circuit": CircuitConfig}
    kind |= {"interp probe": ProbeConfig, "interp steer": SteerConfig}
    commands = [command for command in kind if command in opening.splitlines()[0]]
    assert len(commands) == 1, "a config opens with the command that runs it"
    assert re.search(r"minute|hour", opening), "and says how long it takes"
    kind[commands[0]].model_validate(yaml.safe_load(text))
