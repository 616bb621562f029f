"""The top-level names: lazy, complete, and light to import."""

import ast
import importlib
import subprocess
import sys

import pytest

import interp
import tests.source as source

HEAVY = [
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "plotly",
    "jinja2",
    "tyro",
    "pandas",
    "datasets",
    "numpy",
]
HEAVY_SEEN = (
    f"import sys; seen = [name for name in {HEAVY} if name in sys.modules]; sys.exit(f'loaded {{seen}}' if seen else 0)"
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=source.REPO, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import interp; dir(interp); interp.__version__",
        "from interp.cli.main import main; assert main(['--help']) == 0",
        "from interp.cli.main import main; assert main(['--version']) == 0",
        "from interp.cli.main import main; assert main(['no-such-verb']) == 2",
    ],
)
def test_importing_interp_and_asking_for_help_load_nothing_heavy(code: str) -> None:
    done = run_python(f"{code}\n{HEAVY_SEEN}")
    assert done.returncode == 0, done.stderr


def test_the_check_for_heavy_modules_can_fail() -> None:
    assert "loaded ['numpy']" in run_python(f"import numpy\n{HEAVY_SEEN}").stderr


@pytest.mark.parametrize("name", [name for name in interp.__all__ if name != "__version__"])
def test_each_public_name_is_the_object_of_its_home_module(name: str) -> None:
    home = importlib.import_module(interp._HOMES[name])
    assert getattr(interp, name) is getattr(home, name)
    assert name in home.__all__


def test_the_lazy_names_the_typed_names_and_all_agree() -> None:
    typed = {
        alias.name: node.module
        for guard in source.tree(source.PACKAGE / "__init__.py").body
        if isinstance(guard, ast.If)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == interp._HOMES
    assert {*typed, "__version__"} == set(interp.__all__) == set(dir(interp))


def test_an_unknown_name_is_an_attribute_error_that_offers_the_nearest() -> None:
    with pytest.raises(AttributeError, match="HookManager"):
        _ = interp.HookManger  # type: ignore[attr-defined]
    assert not hasattr(interp, "zzz")
