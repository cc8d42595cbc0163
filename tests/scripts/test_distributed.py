"""train_jax.py as several processes on this host, over loopback, as a user or a scheduler would start them."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from gpt2_core.errors import STOPPED

LONG = ("--steps", "1000000", "--checkpoint_interval", "1000000", "--optimizer.final_fraction", "1")


def rows(path, split="train"):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["split"] == split]


def difference(one, other):
    """The largest difference of losses, both splits; the steps must be the same."""
    pairs = [pair for split in ("train", "val") for pair in zip(rows(one, split), rows(other, split), strict=True)]
    assert pairs and all(a == b for (a, _), (b, _) in pairs)
    return max(abs(a - b) for (_, a), (_, b) in pairs)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_all(root, tmp_path, environment, recipe):
    """Start so many processes of one run; `patch` is Python that one of them runs first, `of` says which."""
    started = []

    def start_all(count, *arguments, patch="", of=1):
        address = f"127.0.0.1:{free_port()}"
        script = root / "scripts" / "train_jax.py"
        patched = tmp_path / "patched.py"
        patched.write_text(f"import runpy\n{patch}\nrunpy.run_path({str(script)!r}, run_name='__main__')\n")
        for number in range(count):
            own = ("--coordinator", address, "--processes", str(count), "--process_id", str(number))
            command = [sys.executable, patched if patch and number == of else script, "--config", recipe, *own]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            command = [*map(str, command), "--precision", "float64", *arguments]
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[-count:]

    yield start_all
    for process in started:
        with contextlib.suppress(OSError):
            process.kill()
        process.communicate()


def ended(processes, seconds=120.0):
    """What each process has left: exit code, output, errors. All must have ended within so many seconds."""
    deadline = time.monotonic() + seconds
    left = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, left, strict=True)]


def succeeded(processes):
    results = ended(processes, 300.0)
    assert [(code, err) for code, _, err in results] == [(0, "")] * len(results)
    assert "step " in results[0][1] and "Gloo" not in results[0][1]
    assert all(out == "" for _, out, _ in results[1:])  # the first one speaks
    return results


def until_trained(path, processes, lines=4):
    metrics = path / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.02)


def saved_steps(path):
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


# The last batch of the validation is padded: 13 sequences in batches of 4.
CURVE = ("--accumulation", "2", "--eval_sequences", "13", "--model.dropout", "0.1", "--steps", "8")

NOTES_ROWS = """
import json
import gpt2_core.data.batches as batches
init = batches.TrainingBatches.__init__
def noting(self, *arguments, rows=None, **options):
    open("rows.json", "w").write(json.dumps(rows))
    init(self, *arguments, rows=rows, **options)
batches.TrainingBatches.__init__ = noting
"""


@pytest.mark.long
def test_two_processes_train_as_one(start_all, start, recipe, tmp_path):
    one = start("train_jax.py", "--config", recipe, "--precision", "float64", "--mesh", "2", *CURVE, "--run_dir", "one")
    succeeded(start_all(2, "--mesh", "2", *CURVE, "--run_dir", "two", patch=NOTES_ROWS))
    # Of each part of the batch, sequences 0 to 3 and 4 to 7, it reads the second half alone.
    assert json.loads((tmp_path / "rows.json").read_text()) == [2, 3, 6, 7]
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    assert difference(tmp_path / "two", tmp_path / "one") <= 1e-11
    config, theirs = ((tmp_path / name / "config.yaml").read_text() for name in ("two", "one"))
    assert config.replace("run_dir: two", "run_dir: one") == theirs
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"), [(4, "data=4"), (2, "fsdp=2"), (2, "data=2,fsdp=2"), (2, "tensor=2"), (4, "data=2,tensor=2")]
)
def test_every_mesh_over_processes_gives_the_same_curve_and_samples(count, mesh, start_all, run, recipe, tmp_path):
    """With tensor=2 both processes compute the same sequences."""
    more = (*CURVE, "--sample_interval", "4", "--sample_tokens", "12")
    code, _, err = run("train_jax.py", "--config", recipe, "--precision", "float64", *more, "--run_dir", "one")
    assert code == 0, err
    succeeded(start_all(count, "--mesh", mesh, *more, "--run_dir", "several"))
    assert difference(tmp_path / "several", tmp_path / "one") <= 1e-11
    for step in (4, 8):
        sample, expected = (tmp_path / name / "samples" / f"{step}.txt" for name in ("several", "one"))
        assert sample.read_text() == expected.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, "data=2"), (4, "fsdp=2,tensor=2")])
def test_tasks_are_computed_by_several_processes_as_by_one(count, mesh, start_all, run, recipe, tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "she opened the door"}\n{"text": "no one came"}\n' * 3)
    more = ("--steps", "2", "--eval_tasks", "lambada_openai", "--eval_data_dir", ".")
    code, _, err = run("train_jax.py", "--config", recipe, "--precision", "float64", *more, "--run_dir", "one")
    assert code == 0, err
    succeeded(start_all(count, "--mesh", mesh, *more, "--run_dir", "several"))
    both = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "several")]
    ours, theirs = ([row for row in of_one if row.pop("split") == "val"] for of_one in both)
    assert len(ours) == 2 and "lambada_openai/perplexity" in ours[0]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-11)


@pytest.mark.slow
def test_what_four_processes_have_saved_one_and_two_resume(start_all, run, recipe, tmp_path):
    common = ("--mesh", "fsdp=4", *CURVE, "--checkpoint_interval", "4", "--keep_checkpoints", "9")
    succeeded(start_all(4, *common, "--run_dir", "four"))
    assert saved_steps(tmp_path / "four") == [4, 8]
    middle = ("--resume", str(tmp_path / "four" / "checkpoints" / "4"))
    succeeded(start_all(2, *common, *middle, "--run_dir", "two"))
    alone = ("--config", recipe, "--precision", "float64", *common, *middle, "--run_dir", "one")
    code, _, err = run("train_jax.py", *alone)
    assert code == 0, err
    whole = [row for row in rows(tmp_path / "four") if row[0] >= 4]
    for name in ("two", "one"):
        resumed = rows(tmp_path / name)
        assert [step for step, _ in resumed] == [4, 5, 6, 7]
        assert max(abs(a - b) for (_, a), (_, b) in zip(resumed, whole, strict=True)) <= 1e-11
    # And back: what one has saved, four continue in the same folder, to the end.
    succeeded(start_all(4, *common, "--steps", "10", "--resume", "--run_dir", "one"))
    assert [step for step, _ in rows(tmp_path / "one")] == [4, 5, 6, 7, 8, 9]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "killed"), [(2, 1), (2, 0), (4, 2)])
def test_when_one_is_killed_the_others_end_with_a_sentence(count, killed, start_all, tmp_path):
    processes = start_all(count, "--mesh", str(count), *LONG, "--run_dir", "run")
    until_trained(tmp_path / "run", processes)
    processes[killed].send_signal(signal.SIGKILL)
    for number, (code, _, err) in enumerate(ended(processes, 60.0)):
        if number != killed:
            why = f"process {killed} is gone, or its host or network, without having said why"
            assert (code, err) == (
                STOPPED,
                f"error: {why}; continue with --resume (this process, {number}, ends too)\n",
            )
    # Nothing is left that would be in the way of the next start.
    succeeded(start_all(count, "--mesh", str(count), *LONG, "--steps", "3", "--resume", "--run_dir", "run"))


@pytest.mark.slow
@pytest.mark.parametrize(("told", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1), ((0, 1), signal.SIGTERM)])
def test_a_signal_to_any_stops_all_at_the_same_step(told, number, start_all, run, recipe, tmp_path):
    told = (told,) if isinstance(told, int) else told
    processes = start_all(2, "--mesh", "2", *LONG, "--run_dir", "run")
    until_trained(tmp_path / "run", processes)
    for each in told:
        processes[each].send_signal(number)
    results = ended(processes, 60.0)
    (step,) = saved_steps(tmp_path / "run")
    for each, (code, _, err) in enumerate(results):
        by = number.name if each in told else f"{number.name} to process {told[0]}"
        assert (code, err) == (STOPPED, f"stopped by {by}; {step} steps are saved; continue with --resume\n")
    assert rows(tmp_path / "run")[-1][0] == step - 1
    # Resumed, it is the run that was never stopped.
    end = ("--mesh", "2", *LONG, "--steps", str(step + 4))
    succeeded(start_all(2, *end, "--resume", "--run_dir", "run"))
    code, _, err = run("train_jax.py", "--config", recipe, "--precision", "float64", *end, "--run_dir", "whole")
    assert code == 0 and difference(tmp_path / "run", tmp_path / "whole") <= 1e-11, err


SLOW_EVALUATION = """
import time
import gpt2_core.data.batches as batches
fast = batches.evaluation_batches
def slow(*arguments, **options):
    for batch in fast(*arguments, **options):
        time.sleep(1)
        yield batch
batches.evaluation_batches = slow
"""
SLOW_COMPILING = """
import time
import gpt2_jax.train_step as train_step
compile = train_step.Program.compile_train_step
train_step.Program.compile_train_step = lambda program, options=None: time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "where"),
    [(SLOW_EVALUATION, "evaluating"), (SLOW_COMPILING, "compiling")],
    ids=["evaluating", "compiling"],
)
def test_evaluation_and_compiling_are_given_up_by_all(patch, where, start_all, tmp_path):
    """The process that isn't told has the work that would take minutes."""
    more = ("--eval_sequences", "1000000", "--batch_size", "2")
    processes = start_all(2, "--mesh", "2", *LONG, *more, "--run_dir", "run", patch=patch)
    while not (tmp_path / "run" / "config.yaml").is_file():
        time.sleep(0.05)
    time.sleep(15)
    processes[0].send_signal(signal.SIGTERM)
    results = ended(processes, 60.0)
    assert [code for code, _, _ in results] == [STOPPED, STOPPED], results
    assert results[0][2].startswith("stopped by SIGTERM; ") and results[0][2].count("\n") == 1
    assert results[1][2].startswith("stopped by SIGTERM to process 0; ") and results[1][2].count("\n") == 1


RAISES = """
import gpt2_core.data.batches as batches
from gpt2_core.errors import UserError
def failing(self, step, fine=batches.TrainingBatches.__getitem__):
    if step == 5:
        raise {error}
    return fine(self, step)
batches.TrainingBatches.__getitem__ = failing
"""


@pytest.mark.slow
@pytest.mark.parametrize("of", [0, 1])
def test_an_error_in_one_ends_all_with_a_sentence_each(of, start_all, tmp_path):
    patch = RAISES.format(error="UserError('the tokens are damaged')")
    processes = start_all(2, "--mesh", "2", *LONG, "--run_dir", "run", patch=patch, of=of)
    results = ended(processes)
    told = f"error: process {of} has ended: the tokens are damaged (this process, {1 - of}, ends too)\n"
    expected = {of: (2, "error: the tokens are damaged\n"), 1 - of: (2, told)}
    assert {number: (code, err) for number, (code, _, err) in enumerate(results)} == expected


@pytest.mark.slow
def test_a_mistake_in_the_program_of_one_ends_the_other_with_a_sentence(start_all, tmp_path):
    processes = start_all(2, "--mesh", "2", *LONG, "--run_dir", "run", patch=RAISES.format(error="KeyError('x')"))
    (code, _, err), (_, _, traceback) = ended(processes)
    assert (code, err) == (1, "error: process 1 has ended: KeyError: 'x' (this process, 0, ends too)\n")
    assert "KeyError: 'x'" in traceback


FULL_DISK = """
import errno
from orbax.checkpoint._src.futures import future
result, left = future.ChainedFuture.result, [1]
def failing(self, timeout=None):
    result(self, timeout)
    if left:
        left.pop()
        raise OSError(errno.ENOSPC, "No space left on device")
future.ChainedFuture.result = failing
"""


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_is_a_failed_save_of_the_run(start_all, tmp_path):
    arguments = ("--mesh", "2", "--steps", "9", "--checkpoint_interval", "3", "--run_dir", "run")
    (first, *_) = succeeded(start_all(2, *arguments, "--keep_checkpoints", "9", patch=FULL_DISK))
    assert (
        "checkpoint 3 can't be saved (in process 1: [Errno 28] No space left on device); training goes on" in first[1]
    )
    assert saved_steps(tmp_path / "run") == [6, 9]


@pytest.mark.slow
def test_a_run_that_diverges_ends_alike_in_all(start_all, tmp_path):
    rate = ("--optimizer.learning_rate", "1e300", "--optimizer.clip_norm", "0", "--checkpoint_interval", "100")
    results = ended(start_all(2, "--mesh", "2", "--steps", "40", *rate, "--run_dir", "run"))
    assert [code for code, _, _ in results] == [1, 1], results
    assert all("the run has diverged" in err and err.count("\n") == 1 for _, _, err in results)
    found = json.loads((tmp_path / "run" / "diverged" / "step.json").read_text())
    assert len(found["sequences"]) == 8


@pytest.mark.slow
def test_two_processes_of_one_number_end_the_run(start_all, tmp_path):
    first, second = start_all(2, *LONG, "--mesh", "2", "--run_dir", "run")
    until_trained(tmp_path / "run", [first, second])
    again = subprocess.Popen(second.args, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    results = ended([again, first])
    said = "two processes have the number 1 (--process_id); give each its own"
    assert results[0][::2] == (2, f"error: {said}\n")
    assert results[1][::2] == (2, f"error: process 1 has ended: {said} (this process, 0, ends too)\n")


@pytest.mark.slow
def test_a_process_that_waits_for_others_in_vain_ends_with_a_sentence(start_all):
    patch = "import gpt2_jax.distributed\ngpt2_jax.distributed.CONNECT_SECONDS = 3"
    first, second = start_all(2, "--mesh", "2", patch=patch, of=0)
    second.kill()
    (code, _, err), _ = ended([first, second], 60.0)
    assert code == 2 and "process 0 of 2 has waited 3 s" in err and err.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--distributed", "auto"), "--distributed auto: nothing tells this process of others"),
        (("--coordinator", "localhost:1234"), "processes started by hand need --processes and --process_id too"),
        (
            ("--coordinator", "localhost:1234", "--processes", "2", "--process_id", "2"),
            "--process_id 2: with --processes 2 they are numbered from 0 to 1",
        ),
        (
            ("--coordinator", "localhost:1234", "--processes", "2", "--process_id", "0", "--mesh", "3"),
            "--mesh 3: its 3 devices can't be shared equally by 2 processes; use a mesh of a multiple of 2",
        ),
    ],
)
def test_what_cannot_be_started_is_one_sentence(run, recipe, tmp_path, arguments, words):
    code, _, err = run("train_jax.py", "--config", recipe, *arguments, "--batch_size", "12")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert {p.name for p in tmp_path.iterdir()} <= {"small.yaml", "license.txt"}
