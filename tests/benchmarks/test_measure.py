import json

import pytest
from rich.console import Console

from benchmarks.measure import Session, interleave, last_words, ratio, sides, write_json
from gpt2_core.errors import RunError, UserError

# Sessions for the child processes, which import this module by its name.
HERE = "tests.benchmarks.test_measure"


def sleeper(spec) -> Session:
    import time

    done: list[int] = []

    def work(units: int) -> None:
        done.append(units)
        print("what a library prints is no answer")
        time.sleep(spec["seconds"] * units)

    return Session({"name": spec["name"]}, work, lambda: {"done": done})


def refused(spec) -> Session:
    raise UserError("--device cuda: there is none")


def crashed(spec) -> Session:
    raise ValueError("a bug")


@pytest.mark.long
def test_sides_take_turns_and_are_timed_by_the_unit():
    spec = {"seconds": 0.02}
    functions = {name: (f"{HERE}:sleeper", spec | {"name": name}) for name in ("a", "b")}
    console = Console(quiet=True)
    with sides(functions, console) as started:
        seconds = interleave(started, rounds=3, units={"a": 2, "b": 3}, console=console)
        ends = {name: side.end() for name, side in started.items()}
    # Seconds a unit: a turn of a takes 0.04 or more. The quickest, because a busy machine can hold any turn up.
    assert all(0.02 <= min(values) < 0.04 for values in seconds.values())
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    # One unit to be ready, a warm round, three that count.
    assert ends == {"a": {"done": [1, 2, 2, 2, 2]}, "b": {"done": [1, 3, 3, 3, 3]}}
    assert started["a"].facts["name"] == "a" and started["a"].facts["seconds_to_first_unit"] > 0.02


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [("refused", UserError, "x: --device cuda: there is none"), ("crashed", RunError, "x: .*a bug")],
)
def test_a_side_that_fails_says_why(function, kind, words):
    with pytest.raises(kind, match=words) as failure, sides({"x": (f"{HERE}:{function}", {})}, Console(quiet=True)):
        pass
    assert failure.type is kind


def talkative(spec) -> Session:
    """Says more than a pipe holds before it is ready."""
    import sys

    sys.stderr.write("warning\n" * (1 << 16))
    return Session({}, lambda units: None)


def test_a_side_may_say_as_much_as_it_likes():
    with sides({"x": (f"{HERE}:talkative", {})}, Console(quiet=True)) as started:
        assert started["x"].work(1) < 10


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("warning\nerror: --x 1: must be 2\nbye", 2, "--x 1: must be 2"),
        ("Traceback\n  raise\njax.errors.JaxRuntimeError: INTERNAL: no\n----\nFor simplicity, JAX", 1,
         "jax.errors.JaxRuntimeError: INTERNAL: no"),
        ("F1125 14:07:49.340   27902 flags.cc:234] Unknown flag in XLA_FLAGS: --x\n*** Check failure\n@ 0x1", -6,
         "Unknown flag in XLA_FLAGS: --x"),
        ("some words", -9, "ended by signal SIGKILL"),
        ("some words\nlast words\n", 1, "last words"),
        ("", 1, "it printed nothing"),
    ],
)  # fmt: skip
def test_the_reason_is_found_in_what_a_process_printed(text, code, words):
    assert last_words(text, code) == words


def test_a_ratio_is_of_the_same_rounds():
    """A slow minute slows both: the ratio of each round is 2, though the medians of the times are far apart."""
    ours, theirs = [1.0, 5.0, 1.1], [2.0, 10.0, 2.2]
    found = ratio(ours, theirs)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    spread = ratio([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (1.5, 2.0, 2.5)


def test_results_are_written_with_what_they_belong_to(tmp_path):
    write_json(str(tmp_path / "o.json"), ["train", "--batch", "2"], {"x": 1})
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["command"] == "python scripts/bench.py train --batch 2" and found["results"] == {"x": 1}
    assert {"jax", "torch"} <= set(found["versions"]) and found["machine"]["cores"] and found["date"]
    with pytest.raises(UserError, match=r"--json .*: can't be written"):
        write_json(str(tmp_path / "none" / "o.json"), [], {})
