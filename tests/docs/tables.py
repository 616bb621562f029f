"""The tables of the READMEs that are made from the code: `python -m tests.docs.tables [--write]`."""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import interp
import tests.source as source
from interp.cli.main import VERBS
from interp.dictionaries.options import DictionaryOptions

README = source.REPO / "README.md"
DICTIONARIES, PATCHING, STEERING = (
    source.PACKAGE / room / "README.md" for room in ("dictionaries", "patching", "steering")
)
GUIDES = (DICTIONARIES, PATCHING, STEERING, source.REPO / "configs/README.md")
GUIDED = {"lens", "patching", "probing", "steering"}
"""Rooms whose functions are in a guide of their own."""


def verbs() -> str:
    """The command line's verbs, a row each."""
    return _table(("command", "what it does"), [(f"`interp {name}`", verb.help) for name, verb in VERBS.items()])


def methods() -> str:
    """The other methods that have a name of `interp`, a row each: the call, its docstring's opening, its source."""
    rooms = ("evaluate", *sorted(source.FAMILIES - GUIDED))
    rows = [row for room in rooms for row in _rows_of(room)]
    return _table(("function", "what it does", "source"), [row for row in rows if row[0].count(".") == 1])


def circuits() -> str:
    """The functions that the rooms `patching` and `lens` offer under their own names, a row each."""
    return _offered("patching", "lens")


def steering() -> str:
    """The functions that the rooms `steering` and `probing` offer under their own names, a row each."""
    return _offered("steering", "probing")


def _offered(*rooms: str) -> str:
    rows = []
    for room in rooms:
        offered = set(source.exported(source.PACKAGE / room / "__init__.py") or [])
        for call, what, origin in _rows_of(room):
            name = call.strip("`").rpartition(".")[2]
            if name in offered:
                shown = call if call.count(".") == 1 else f"`interp.{room}.{name}`"
                rows.append((shown, what, origin))
    return _table(("function", "what it does", "source"), rows)


def dictionaries() -> str:
    """The architectures that `dictionary.kind` names, a row each."""
    rows = []
    for kind in get_args(DictionaryOptions.model_fields["kind"].annotation):
        text = inspect.getdoc(type(DictionaryOptions(kind=kind).make(8))) or ""
        rows.append((f"`{kind}`", _sentence(text), _origin(text)))
    return _table(("`--dictionary.kind`", "what it is", "source"), rows)


GENERATED: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"methods": methods, "verbs": verbs},
    DICTIONARIES: {"dictionaries": dictionaries},
    PATCHING: {"circuits": circuits},
    STEERING: {"steering": steering},
}


def renewed(page: Path) -> str:
    """A page's text with every generated table made anew."""
    text = page.read_text(encoding="utf-8")
    for name, make in GENERATED[page].items():
        block = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        place = block.search(text)
        if place is None:
            raise ValueError(f"{page} has no place for the generated table {name!r}")
        text = f"{text[: place.start()]}{place[1]}{make()}\n{place[2]}{text[place.end() :]}"
    return text


def _rows_of(room: str) -> list[tuple[str, str, str]]:
    inside = source.PACKAGE / room
    return [row for path in source.modules() if inside in path.parents for row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    exported = source.exported(path) or []
    origin = _origin(ast.get_docstring(source.tree(path)) or "")
    for name, node in source.public_functions(path):
        if name in exported:
            home = "interp" if interp._HOMES.get(name) == source.dotted(path) else source.dotted(path)
            text = ast.get_docstring(node) or ""
            yield f"`{home}.{name}`", _sentence(text), origin or _origin(text)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _origin(text: str) -> str:
    """The first sentence after "Source:" in a module's docstring; a full stop inside "et al. (2020)" ends none."""
    found = re.search(r"^Source:(.*?)(\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return re.split(r"\. (?=[A-Z])", " ".join(found[1].split()))[0].rstrip(".") if found else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Print the generated tables, or write them into their pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them into their pages")
    if parser.parse_args().write:
        for page in GENERATED:
            page.write_text(renewed(page), encoding="utf-8")
    else:
        print("\n\n".join(make() for tables in GENERATED.values() for make in tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
