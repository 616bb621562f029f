"""The `interp` command: finds the verb, runs it, turns what went wrong into one line and an exit code."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple, cast

__all__ = ["VERBS", "Verb", "main", "usage"]


class Verb(NamedTuple):
    """One subcommand: the module whose `main(argv) -> exit code` runs it, and its line in the help."""

    module: str
    help: str


VERBS = {
    "attribute": Verb(
        "interp.cli.attribute", "estimate what patching each node or edge does, and verify the best exactly"
    ),
    "capture": Verb("interp.cli.capture", "write the activations of a text to a folder, by one process or many"),
    "circuit": Verb("interp.cli.circuit", "find the edges that a task needs; run the model with those alone"),
    "eval": Verb("interp.cli.evaluate", "measure trained dictionaries in every way that applies: one table, one page"),
    "export": Verb("interp.cli.export", "write trained dictionaries as circuit-tracer, sparsify or SAELens read them"),
    "patch": Verb("interp.cli.patch", "patch activations of one prompt into another, every place in turn, exactly"),
    "probe": Verb("interp.cli.probe", "probe activations, or few neurons, for a concept; beside controls, held out"),
    "show": Verb("interp.cli.show", "write a trained dictionary as one page: figures, curves, latents to look through"),
    "sites": Verb("interp.cli.sites", "list the sites of a model with shapes and definitions, from its config alone"),
    "steer": Verb("interp.cli.steer", "fit a direction with its controls; measure what doses of it do and cost"),
    "store": Verb("interp.cli.store", "what a store of activations holds; verify it, repair it, send it elsewhere"),
    "testbed": Verb("interp.cli.testbed", "the small world and its models: describe, sample, tasks, card, rebuild"),
    "train": Verb("interp.cli.train", "train a sparse dictionary on a site of a model"),
}

_FAILED, _BAD_USAGE = 1, 2


def usage() -> str:
    """The top-level help, written by hand so that asking for it imports nothing heavy."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: interp VERB [OPTIONS]",
            "",
            "Read, edit and take apart the activations of any Hugging Face decoder.",
            "",
            "verbs:",
            *lines,
            "",
            "options:",
            "  -h, --help  this text; after a verb, that verb's options",
            "  --version   print the version",
            "  --debug     show the traceback of an error",
            "",
            "Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad usage,",
            "143 stopped by a signal.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage, 143 stopped by a signal.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        code = _dispatch([word for word in given if word != "--debug"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader is gone (`interp sites … | head`): nothing to say, and the exit's own flush must not say it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except Exception as error:
        if debug:
            raise
        return _fail(_in_one_line(error))


def _dispatch(words: list[str]) -> int:
    if not words:
        sys.stderr.write(usage())
        return _BAD_USAGE
    name, *rest = words
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name == "--version":
        from interp import __version__

        sys.stdout.write(f"interp {__version__}\n")
        return 0
    if name not in VERBS:
        return _fail(_unknown(name), _BAD_USAGE)
    run = cast("Callable[[list[str]], int]", importlib.import_module(VERBS[name].module).main)
    return run(rest)


def _unknown(name: str) -> str:
    from interp.core.errors import nearest

    hint = nearest(name, VERBS) or f"the verbs are {', '.join(VERBS)};"
    return f"no verb {name!r}; {hint} `interp --help` describes them"


def _in_one_line(error: Exception) -> str:
    from interp.core.errors import InterpError

    if isinstance(error, InterpError):
        return str(error)
    return f"{type(error).__name__}: {error} (an error that interp did not foresee; --debug shows the traceback)"


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    return _fail(str(stop.code))


def _fail(message: str, code: int = _FAILED) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
