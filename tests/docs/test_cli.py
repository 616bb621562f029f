"""The command line: exit codes, what goes to which stream, and what an error looks like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from interp.cli import main as cli
from interp.core.errors import ConfigError
from tests.families import FAMILIES


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    config = FAMILIES["Llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def failing_verb(monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """A verb `fail` whose words choose what it raises."""

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise {"typed": ConfigError("lr is -1; it must be above 0"), "bug": KeyError("k"), "exit": SystemExit(143)}[
                argv[0]
            ]

    monkeypatch.setitem(cli.VERBS, "fail", cli.Verb("fail_module", "fails"))
    monkeypatch.setitem(sys.modules, "fail_module", Module)
    return ConfigError


def test_help_and_version_go_to_stdout_and_a_missing_verb_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    assert all(name in shown.out for name in cli.VERBS) and not shown.err
    assert cli.main([]) == 2
    assert not capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("interp 0.")


def test_an_unknown_verb_is_bad_usage_and_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["site"]) == 2
    assert "did you mean 'sites'" in capsys.readouterr().err


def test_an_interp_error_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], failing_verb: type[BaseException]
) -> None:
    assert cli.main(["fail", "typed"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: lr is -1; it must be above 0\n")
    with pytest.raises(failing_verb):
        cli.main(["fail", "typed", "--debug"])


def test_an_unforeseen_error_names_its_kind_and_the_way_to_its_traceback(
    capsys: pytest.CaptureFixture[str], failing_verb: type[BaseException]
) -> None:
    assert cli.main(["fail", "bug"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'k'") and "--debug" in shown and shown.count("\n") == 1


def test_a_verbs_own_exit_code_is_kept(failing_verb: type[BaseException]) -> None:
    assert cli.main(["fail", "exit"]) == 143


def test_bad_options_of_a_verb_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sites"]) == 2
    assert cli.main(["sites", "x", "--no-such-option"]) == 2
    assert not capsys.readouterr().out


def test_training_says_how_it_is_stopped_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr()
    said = " ".join(shown.out.replace("│", " ").split())
    assert all(word in said for word in ("[CONFIG.yaml]", "--config FILE", "--resume", "--train.checkpoint-every"))
    assert "go on with the run in --out that was stopped or killed" in said and not shown.err


def test_sites_lists_a_model_from_its_config_alone(capsys: pytest.CaptureFixture[str], config_folder: Path) -> None:
    assert cli.main(["sites", str(config_folder), "--pattern", "*.resid_post", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["site"] for row in rows] == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert all(row["shape"] and row["definition"] and row["short"].endswith(".resid_post") for row in rows)
    assert cli.main(["sites", str(config_folder)]) == 0
    table = capsys.readouterr().out
    assert "hook_resid_post" in table and "[batch pos 32]" in table


def test_sites_of_a_model_that_is_not_there_is_one_clean_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["sites", str(tmp_path / "nowhere")]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "Traceback" not in shown.err and not shown.out


def test_a_reader_that_goes_away_is_met_in_silence() -> None:
    code = (
        "import sys; from interp.cli import main as cli\n"
        "class Module:\n"
        "    def main(argv):\n"
        "        for _ in range(100_000): sys.stdout.write('a long line of output\\n')\n"
        "        return 0\n"
        "sys.modules['talk'] = Module; cli.VERBS['talk'] = cli.Verb('talk', '')\n"
        "sys.exit(cli.main(['talk']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 1
