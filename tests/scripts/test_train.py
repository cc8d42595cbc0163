import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from gpt2_convert import read_weights


def rows(path, split="train"):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["split"] == split]


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes", [("data=2,fsdp=2,tensor=2",), pytest.param(("1", "8"), marks=pytest.mark.slow)], ids=["mixed", "1 and 8"]
)
def test_every_mesh_and_pytorch_give_the_same_float64_loss_curve(run, recipe, tmp_path, meshes):
    assert run("train_jax.py", "--config", recipe, "--steps", "0", "--run_dir", "init")[0] == 0
    same = ("--config", recipe, "--precision", "float64", "--init_from", "init")
    runs = {"torch": ("train_torch.py",)}
    runs |= {m: ("train_jax.py", "--mesh", m) for m in meshes}
    for name, (script, *mesh) in runs.items():
        code, _, err = run(script, *same, *mesh, "--run_dir", name)
        assert code == 0, err
    reference = rows(tmp_path / "torch")
    assert [step for step, _ in reference] == list(range(20))
    for name in runs:
        for split in ("train", "val"):
            ours, theirs = rows(tmp_path / name, split), rows(tmp_path / "torch", split)
            assert max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1e-11, name


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "times"),
    [
        ("train_jax.py", 1),
        pytest.param("train_jax.py", 3, marks=pytest.mark.slow),
        pytest.param("train_torch.py", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_and_resumed_is_the_run_never_killed(script, times, start, run, recipe, tmp_path):
    mesh = ("--mesh", "2") if script == "train_jax.py" else ()
    steps = ("--steps", str(13 * times + 3), "--checkpoint_interval", "2")  # longer than until the last is killed
    arguments = (*mesh, "--config", recipe, *steps, "--model.dropout", "0.1")
    code, _, err = run(script, *arguments, "--run_dir", "whole")
    assert code == 0, err
    seed = random.randrange(1 << 30)
    print(f"killed at the moments of seed {seed}")
    moments = random.Random(seed)
    kills = 0
    while kills < times:
        resume = ("--resume",) if (tmp_path / "killed" / "config.yaml").is_file() else ()
        process = start(script, *arguments, "--run_dir", "killed", *resume)
        # Let it come so far, then kill it within the next moments: often with a save in flight.
        metrics = tmp_path / "killed" / "metrics.jsonl"
        goal = (len(metrics.read_text().splitlines()) if metrics.is_file() else 0) + moments.randrange(3, 14)
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= goal):
            time.sleep(0.002)
        time.sleep(moments.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        kills += 1
        if process.returncode == 0:
            break
    code, out, err = run(script, *arguments, "--run_dir", "killed", "--resume")
    assert code == 0, err
    for split in ("train", "val"):
        assert rows(tmp_path / "killed", split) == rows(tmp_path / "whole", split)
    assert kills == times


@pytest.mark.long
@pytest.mark.parametrize("script", ["train_torch.py", pytest.param("train_jax.py", marks=pytest.mark.slow)])
def test_a_run_that_hangs_ends_to_be_resumed(script, environment, recipe, root, tmp_path):
    package = {"train_jax.py": "gpt2_jax", "train_torch.py": "gpt2_torch"}[script]
    # Batches that never come: a file system that doesn't answer.
    program = (
        "import sys, time, gpt2_core.data.batches as batches\n"
        "read = batches.TrainingBatches.__getitem__\n"
        "def hang(self, step):\n"
        "    return read(self, step) if step < 7 else time.sleep(1000)\n"
        "batches.TrainingBatches.__getitem__ = hang\n"
        f"sys.path.insert(0, {str(root / 'scripts')!r})\n"
        f"import {script.removesuffix('.py')} as script\n"
        "from gpt2_core.cli import run\n"
        "run(script.main)\n"
    )
    command = [sys.executable, "-c", program, "--config", str(recipe), "--run_dir", "r", "--hang_timeout", "5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert done.stderr.endswith("nothing has finished for 5 s (--hang_timeout); continue with --resume\n")
    assert "in hang" in done.stderr and f"{package}/train.py" in done.stderr
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir() if p.name.isdigit()] == ["5"]


@pytest.mark.long
def test_the_run_folder_holds_what_it_should(run, recipe, tmp_path):
    code, out, err = run("train_jax.py", "--config", recipe, "--steps", "6", "--sample_interval", "6")
    assert code == 0 and err == "", err
    folder = tmp_path / "runs" / "small-jax"
    assert {p.name for p in folder.iterdir() if p.name != ".lock"} == {
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "samples",
        "checkpoints",
    }
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["precision"], config["mesh"], config["attention"]) == ("float32", "data=1,fsdp=1,tensor=1", "xla")
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"5", "6", "index.json"}
    assert "step      0  loss" in out and "\x1b" not in out  # plain lines when piped
    # Trained to its end it can be trained further; each step is there once.
    code, _, err = run("train_jax.py", "--config", recipe, "--steps", "8", "--resume")
    assert code == 0 and [step for step, _ in rows(folder)] == list(range(8)), err
    # The written configuration is a recipe: the same run again, from it alone.
    code, _, err = run("train_jax.py", "--config", folder / "config.yaml", "--run_dir", "again", "--steps", "6")
    assert code == 0 and rows(tmp_path / "again")[:5] == rows(folder)[:5], err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_torch.py", pytest.param("train_jax.py", marks=pytest.mark.slow)])
def test_a_run_of_no_steps_can_be_resumed_and_trained_on(script, run, recipe, tmp_path):
    for more in (("--steps", "0"), ("--steps", "0", "--resume"), ("--steps", "2", "--resume")):
        code, _, err = run(script, "--config", recipe, "--run_dir", "r", *more)
        assert code == 0 and err == "", err
    assert [step for step, _ in rows(tmp_path / "r", "val")] == [0, 2]
    assert [step for step, _ in rows(tmp_path / "r")] == [0, 1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.path", "nowhere.txt"), "--data.path nowhere.txt: no such file"),
        (("--data.path", "empty.txt"), "the file is empty"),
        (("--model.block_size", "90000"), "--model.block_size 90000: the train split"),
        (("--model.n_head", "3"), "--model.n_embd 16: not divisible by n_head 3"),
        (("--run_dir", "taken", "--seed", "7"), "--run_dir taken: already holds a run of another configuration"),
        (("--resume", "--run_dir", "taken"), "taken was trained with model.n_layer 2, not 1"),
        (("--resume", "--run_dir", "new"), "holds no run to resume"),
        (("--init_from", "nowhere"), "nowhere: no such file or folder"),
        (("--precision", "tf32", "--device", "cpu"), "--precision tf32: needs an NVIDIA GPU of compute capability 8.0"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_overwritten(run, recipe, tmp_path, arguments, words, taken):
    # What both trainers share is tried by turns on one and on the other.
    script = ("train_jax.py", "train_torch.py")[len(words) % 2]
    (tmp_path / "empty.txt").write_text("")
    before = {p: p.read_bytes() for p in (tmp_path / "taken").rglob("*") if p.is_file()}
    code, _, err = run(script, "--config", recipe, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert {p: p.read_bytes() for p in (tmp_path / "taken").rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


@pytest.fixture
def taken(make_config, tmp_path):
    """A run folder, without the time it takes to train one."""
    from gpt2_core.config import ModelConfig
    from gpt2_core.runs.folder import plan_run

    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257)
    plan_run(make_config("taken", precision="float32", model=model), framework="jax", data_digest="d").begin()


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mesh", "data=3"), "--mesh data=3: batch_size 8 is not divisible by data = 3; use 1, 2, 4 or 8"),
        (("--mesh", "tensor=4"), "n_head 2 is not divisible by tensor = 4; use 1 or 2"),
        (("--mesh", "rows=4"), "--mesh rows=4: expected a number of devices"),
        (("--device", "cpu"), "--device: not an option of train_jax.py"),
        (("--attention", "cudnn"), "--attention cudnn: needs an NVIDIA GPU"),
        (("--precision", "tf32"), "--precision tf32: needs an NVIDIA GPU of compute capability 8.0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(run, recipe, tmp_path, arguments, words):
    code, _, err = run("train_jax.py", "--config", recipe, *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"small.yaml"}


@pytest.mark.long
@pytest.mark.parametrize("script", ["train_torch.py", pytest.param("train_jax.py", marks=pytest.mark.slow)])
def test_a_run_that_diverges_ends_with_a_sentence_and_exit_code_1(script, run, recipe, tmp_path):
    rate = ("--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "0", "--checkpoint_interval", "100")
    code, out, err = run(script, "--config", recipe, *rate, "--run_dir", "run")
    assert code == 1 and "the run has diverged" in err and err.count("\n") == 1
    assert "its update is left out (11 of this run)" in out
    found = json.loads((tmp_path / "run" / "diverged" / "step.json").read_text())
    assert len(found["sequences"]) == 8 and found["first_module_not_finite"] is not None
    # What was saved is what came before the updates that were left out, and finite.
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert newest - found["step"] in (1, 2)  # JAX has dispatched a step more
    weights = read_weights(tmp_path / "run" / "checkpoints" / str(newest))
    assert all(np.isfinite(array).all() for array in weights.arrays.values())


def test_the_torch_command_works_without_the_jax_options(run, recipe):
    code, _, err = run("train_torch.py", "--config", recipe, "--mesh", "2")
    assert code == 2 and "--mesh: not an option of train_torch.py" in err


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("train_jax.py", signal.SIGTERM),
        pytest.param("train_torch.py", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("train_jax.py", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("train_torch.py", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_run_told_to_stop_saves_its_step_and_resumed_is_the_run_never_stopped(
    script, number, start, run, recipe, tmp_path
):
    # A rate that doesn't depend on the number of steps, and no checkpoint but the one of the end.
    arguments = ("--config", recipe, "--optimizer.final_fraction", "1", "--checkpoint_interval", "1000000")
    process = start(script, *arguments, "--steps", "1000000", "--run_dir", "stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    (saved,) = (path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir() if path.name.isdigit())
    assert err == f"stopped by {number.name}; {saved} steps are saved; continue with --resume\n"

    steps = ("--steps", str(int(saved) + 7))
    for more in (("--run_dir", "stopped", "--resume"), ("--run_dir", "whole")):
        code, _, err = run(script, *arguments, *steps, *more)
        assert code == 0 and err == "", err
    for split in ("train", "val"):
        assert rows(tmp_path / "stopped", split) == rows(tmp_path / "whole", split)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_torch.py", "train_jax.py"])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_resumed(script, run, recipe, tmp_path):
    arguments = ("--config", recipe, "--keep_checkpoints", "2", "--run_dir", "run")
    assert run(script, *arguments)[0] == 0
    whole, checkpoints = rows(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    largest = max((path for path in (checkpoints / "20").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    code, _, err = run(script, "--config", recipe, "--resume", checkpoints / "20", "--run_dir", "other")
    assert code == 2 and "is damaged" in err and not (tmp_path / "other").exists()
    code, out, err = run(script, *arguments, "--resume")
    assert code == 0 and err == "", err
    assert "warning: checkpoint 20 is damaged" in out and "the run continues from step 15" in out
    assert (checkpoints / "20.damaged").is_dir() and (checkpoints / "20").is_dir()
    assert rows(tmp_path / "run") == whole
