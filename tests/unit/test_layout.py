"""The house rules, read out of the source: who may import whom, what a public function looks like."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tests.source as source

# Imports run to the left. `report` stands beside: it depends on `core` alone, and any room but `core` may use it.
RANKS = {"core": 0, "data": 1, "testbed": 2, "dictionaries": 2, "train": 3, "evaluate": 3, "cli": 5}
RANKS.update(dict.fromkeys(source.FAMILIES, 4))
# `Result.to_html` of any family ends in the report's page writer, called by name at the moment it is wanted.
REPORT_FROM_CORE = {"interp.core.result"}
# A folder whose config names the testbed's nano model is loaded by that class, imported by name at that moment.
TESTBED_FROM_CORE = {"interp.core.loading"}
# Files that are transformers model code: its base classes stand at the top, and its forwards take **kwargs. Nobody
# imports them but inside functions.
MODEL_CODE = {"interp.testbed.nano_model"}
# Who may import the libraries that are slow, or whose interface may move under us.
ONLY_IMPORTERS = {
    "transformer_lens": "interp.core.bridge",
    "sae_lens": "interp.dictionaries.interop",
    "plotly": "interp.report",
    "jinja2": "interp.report",
    "tyro": "interp.cli",
}
# Only inside functions: importing a module of the library must not take seconds.
HEAVY = {"accelerate", "datasets", "pandas", "plotly", "pyarrow", "sae_lens", "transformer_lens", "transformers"}
PICKLES = {"pickle", "dill", "joblib", "cloudpickle", "shelve"}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 80, 8
# Each of them is an argument that users know from `from_pretrained`, and none has a place elsewhere.
MORE_PARAMETERS = {"HookManager.load": 9}


def rooms_of(path: Path) -> tuple[str, set[str]]:
    """The room a file lies in and the rooms it imports from."""
    room = source.dotted(path).split(".")[1]
    names = (name.split(".") for _, name in source.imports(path))
    used = {parts[1] for parts in names if parts[0] == "interp" and len(parts) > 1} - {room}
    return room, used - {"testbed"} if source.dotted(path) in TESTBED_FROM_CORE else used


def room_files() -> list[Path]:
    return [path for path in source.modules() if path.parent != source.PACKAGE]


def relative(path: Path) -> str:
    return str(path.relative_to(source.REPO))


each_module = pytest.mark.parametrize("path", source.modules(), ids=relative)


@pytest.mark.parametrize("path", room_files(), ids=relative)
def test_a_file_imports_only_from_rooms_below_its_own(path: Path) -> None:
    room, used = rooms_of(path)
    assert room in RANKS or room == "report", f"{room} is no room of the house"
    if room == "report":
        assert used <= {"core"}, f"report depends on core alone, not on {used - {'core'}}"
        return
    if room == "core" and source.dotted(path) not in REPORT_FROM_CORE:
        assert "report" not in used, "core does not know the report"
    too_high = {other for other in used & RANKS.keys() if RANKS[other] > RANKS[room]}
    assert not too_high, f"{room} imports {too_high}, which stand above it: what both want moves down"
    if room in source.FAMILIES:
        assert not used & source.FAMILIES, (
            f"{room} imports the families {used & source.FAMILIES}: what both want moves down"
        )


def test_no_two_rooms_import_each_other() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for path in room_files():
        room, used = rooms_of(path)
        graph[room] |= used - {"report"}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
def test_a_library_has_one_importer(library: str) -> None:
    home = ONLY_IMPORTERS[library]
    strangers = [
        f"{source.dotted(path)}:{line}"
        for path in source.modules()
        for line, name in source.imports(path)
        if name.split(".")[0] == library and not f"{source.dotted(path)}.".startswith(f"{home}.")
    ]
    assert not strangers, f"{library} belongs in {home}"


@each_module
def test_a_module_imports_nothing_heavy_when_it_is_imported(path: Path) -> None:
    found = [name for _, name in source.imports(path, inside_functions=False)]
    assert not [name for name in found if name in MODEL_CODE or name.rpartition(".")[0] in MODEL_CODE]
    names = {name.split(".")[0] for name in found} - ({"transformers"} if source.dotted(path) in MODEL_CODE else set())
    assert not names & HEAVY, "import these inside the function that needs them"


@each_module
def test_a_module_neither_pickles_nor_prints_nor_names_a_class_that_is_gone(path: Path) -> None:
    imported = {part for _, name in source.imports(path) for part in name.split(".")}
    assert not imported & PICKLES
    assert "HookedTransformer" not in imported
    calls = [node for node in ast.walk(source.tree(path)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    loads = [node for node in calls if source.called(node) == "load" and ast.unparse(node.func) == "torch.load"]
    assert all("weights_only=True" in ast.unparse(node) for node in loads)


@each_module
def test_the_exported_names_are_sorted_and_there(path: Path) -> None:
    names = source.exported(path)
    if names is None:
        public = [name for name, _ in source.public_functions(path) if "." not in name]
        assert not public, "a module with public functions says so in __all__"
        return
    # As ruff's RUF022 sorts: constants, then classes, then the rest.
    assert names == sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[:1].isupper() else 2, name))
    assert len(names) == len(set(names))


@each_module
def test_a_module_and_its_public_functions_say_what_they_do(path: Path) -> None:
    assert ast.get_docstring(source.tree(path)), "a module opens with what it is"
    silent = [name for name, node in source.public_functions(path) if not ast.get_docstring(node)]
    assert not silent


@each_module
def test_public_signatures_are_small_and_closed(path: Path) -> None:
    for name, node in source.public_functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        assert count <= MORE_PARAMETERS.get(name, PARAMETERS), f"{name} takes {count} parameters"
        if source.dotted(path) in MODEL_CODE:
            continue
        assert node.args.kwarg is None, f"{name} takes **{node.args.kwarg.arg}" if node.args.kwarg else ""


@each_module
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    for node in ast.walk(source.tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} is {length} lines long"


def test_the_reader_of_imports_sees_functions_but_not_type_checking(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import a\n"
        "if TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "def f():\n    from d.e import g\n    importlib.import_module('h.i')\n"
    )
    assert {name for _, name in source.imports(path)} == {"a", "c", "d.e.g", "h.i"}
    assert {name for _, name in source.imports(path, inside_functions=False)} == {"a", "c"}
