"""Runs every pair of models through `parity.compare`: is the bug found on its line, and is the mended port the same?

    python examples/parity/gallery            # all pairs
    python examples/parity/gallery rope_pairs gelu_form

Exits with 1 if a pair isn't as it should be.
"""

import argparse
import importlib.util
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import parity
from parity.engine.errors import EngineError

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


@dataclass
class Outcome:
    """What a comparison said about a pair, and whether that is what it should say."""

    found: str  # file:line, or the tensors' names
    planted: bool  # and that is where the bug is
    hint: str  # the hint that names the mistake, or else the first one
    hinted: bool
    mended: str  # the verdict on the port without the bug

    @property
    def passed(self):
        return self.planted and self.hinted and self.mended == "same"


def load(name):
    """The pair's module, imported by its path."""
    spec = importlib.util.spec_from_file_location(f"gallery_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare(pair, candidate):
    options = getattr(pair, "options", {})
    to_candidate = getattr(pair, "to_candidate", None)
    return parity.compare(pair.make_reference(), candidate, inputs=pair.inputs, to_candidate=to_candidate, **options)


def planted_lines(pair):
    """Lines of the pair's file that carry the marker, as `file:line`."""
    path = Path(pair.__file__)
    lines = path.read_text().splitlines()
    return [f"{path.name}:{i}" for i, line in enumerate(lines, start=1) if "# BUG" in line]


def found_line(pair, report):
    """The planted line after those that were thought likelier, or else the lines named; whether it is among them."""
    divergence = report.first_divergence
    lines = [Path(line).name for line in divergence.lines] if divergence else []
    planted = [i for i, line in enumerate(lines) if line in planted_lines(pair)]
    if not planted:
        return ", ".join(lines) or "nowhere", False
    first = planted[0]
    return lines[first] + (f", after {', '.join(lines[:first])}" if first else ""), True


def found_tensor(pair, report):
    """The planted tensors that the planted check names: for bugs of a converter, or of a state."""
    failed = [f"{r.case} {r.where}" for r in report.results if r.check == pair.CHECK and not r.passed]
    names = list(dict.fromkeys(re.findall(rf"[\w.]*{pair.TENSOR}", " ".join(failed))))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (names[0] + more if names else "nowhere"), bool(names)


def judge(pair):
    """Compares the reference with the port and with the mended port."""
    report = compare(pair, pair.make_candidate())
    found, planted = (found_tensor if hasattr(pair, "TENSOR") else found_line)(pair, report)
    hints = [hint for hint in report.hints if re.search(pair.HINT, hint)]
    hint = next(iter([*hints, *report.hints]), "none")
    mended = compare(pair, pair.make_mended())
    return Outcome(found, planted and report.verdict == "different", hint, bool(hints), mended.verdict)


def mark(passed):
    return Text("yes", "green") if passed else Text("no", "red")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="pair", help=f"left out: all of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no pair is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    table = Table(show_lines=True)
    for title in ("pair", "found at", "planted there", "hint", "mended port", "seconds"):
        table.add_column(title, no_wrap=title == "pair", overflow="fold")
    passed = True
    for name in names:
        start = time.perf_counter()
        try:
            outcome = judge(load(name))
        except EngineError as error:
            outcome = Outcome("nowhere", False, str(error), False, "not compared")
        seconds = f"{time.perf_counter() - start:.1f}"
        hint = Text(outcome.hint, "" if outcome.hinted else "red")
        mended = Text(outcome.mended, "" if outcome.mended == "same" else "red")
        table.add_row(name, outcome.found, mark(outcome.planted), hint, mended, seconds)
        passed &= outcome.passed
    console = Console(markup=False)
    console.width = max(console.width, 120)  # so that lines stay readable in a log
    console.print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
