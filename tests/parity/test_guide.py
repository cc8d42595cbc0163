"""docs/porting-guide.md: its code is that of examples/parity/guide, and what it quotes is what is printed."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

import parity

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "parity" / "guide"
PAGE = (ROOT / "docs" / "porting-guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def guide(monkeypatch):
    """Imports a module of the guide's folder by its name, as from within that folder."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in ("port", "steps", "test_port"):
        sys.modules.pop(name, None)


def quoted(block: str) -> re.Pattern:
    """What a block of output stands for: `...` is anything, and so is the value of a figure like 1.3e-15."""
    pattern = re.escape(block.strip()).replace(re.escape("..."), ".*?")
    return re.compile(re.sub(r"\d\\\.\de\\[-+]\d\d", r"\\d\\.\\de[-+]\\d\\d", pattern), re.DOTALL)


def test_a_quotation_holds_for_what_it_quotes_alone():
    pattern = quoted("gradients: 1.3e-15, limit 1e-09 ...; end")
    assert pattern.fullmatch("gradients: 9.7e-16, limit 1e-09 largest at x; end")
    assert not pattern.fullmatch("gradients: 9.7e-16, limit 1e-05 largest at x; end")
    assert not pattern.fullmatch("gradients: 9.7e-16, limit 1e-09 largest at x")


def is_call(code: str) -> bool:
    """Whether a block of the guide prints something: the others are parts of its files."""
    return "print(" in code


@pytest.mark.long
def test_the_finished_port_is_the_same(guide):
    port = guide("port")
    report = parity.compare(
        port.make_reference, port.make_port, inputs=port.inputs, checks=("weights", "forward"), generate=False
    )
    assert report.verdict == "same"
    assert not report.unmapped


def test_the_code_of_the_guide_is_that_of_its_files(guide):
    steps = guide("steps")
    files = [steps.source(mistakes) for mistakes in (steps.MISTAKES, ())]
    files.append((FOLDER / "test_port.py").read_text(encoding="utf-8"))
    parts = [code for language, code in BLOCKS if language == "python" and not is_call(code)]
    assert len(parts) == 4
    for part in parts:
        # Definitions that are apart in the file stand together in the guide.
        for definition in part.split("\n\n\n"):
            assert any(definition.strip() in text for text in files), definition


def test_what_the_readme_quotes_is_in_the_guide():
    [block] = re.findall(
        r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    printed = "\n".join(code for language, code in BLOCKS if language == "text").replace("draft/", "")
    for line in block.splitlines():
        assert quoted(line).search(printed), line


def test_the_guide_mends_every_mistake_in_order(guide):
    diffs = [code.splitlines() for language, code in BLOCKS if language == "diff"]
    mistakes = guide("steps").MISTAKES
    assert len(diffs) == len(mistakes)
    for (wrong, right), mistake in zip(diffs, mistakes, strict=True):
        assert wrong.startswith("-") and mistake.wrong in wrong
        assert right.startswith("+") and mistake.right in right


def version(number: int):
    """The version of the port in which so many mistakes are mended."""
    return pytest.param(number, marks=pytest.mark.long if number == 2 else pytest.mark.slow)


@pytest.mark.parametrize("mended", [version(n) for n in range(4)])
def test_a_version_is_judged_as_the_guide_says(guide, tmp_path, mended):
    steps = guide("steps")
    left = steps.MISTAKES[mended:]
    report = steps.compare(tmp_path, left)
    output = [code for language, code in BLOCKS if language == "text"][mended]
    assert quoted(output).fullmatch(report.in_words()), report.in_words()
    if left:
        lines = steps.source(left).splitlines()
        file, _, line = report.first_divergence.lines[0].rpartition(":")
        assert file.endswith("draft/port.py")
        assert left[0].named in lines[int(line) - 1]
        assert re.search(left[0].hint, report.hints[0])
    else:
        assert report.verdict == "same"


@pytest.mark.slow
def test_the_calls_of_the_guide_print_what_it_says(guide, monkeypatch):
    monkeypatch.chdir(FOLDER)
    calls = [
        (code, BLOCKS[i + 1]) for i, (language, code) in enumerate(BLOCKS) if language == "python" and is_call(code)
    ]
    assert len(calls) == 7
    scope = {}
    for number, (code, (language, output)) in enumerate(calls):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "porting-guide.md", "exec"), scope)
        assert language == "text"
        # The guide shows what the first call prints of the early versions, which have a test of their own.
        if number > 0:
            assert quoted(output).fullmatch(printed.getvalue().strip()), printed.getvalue()


@pytest.mark.slow
def test_the_test_at_the_end_of_the_guide_passes(guide):
    guide("test_port").test_the_port_is_the_same_model()
