"""A long run that is disturbed all the time ends as the one that is left alone, in both frameworks."""

import json
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2_convert import read_weights

STEPS = 2000


def rows(path: Path, split: str = "train") -> list[tuple[int, float]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["split"] == split]


def seen(process) -> tuple[int, int, int]:
    """Resident memory in bytes, threads and open files of a process that runs."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    values = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads")}
    return 1024 * values["VmRSS"], values["Threads"], len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return (
        sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if folder.is_dir() else []
    )


def flip_a_bit(run: Path, moments: random.Random) -> bool:
    """Damage a file of the newest checkpoint, if there is one before it to go back to."""
    if len(checkpoints(run)) < 2:
        return False
    files = sorted(p for p in checkpoints(run)[-1].rglob("*") if p.is_file() and p.stat().st_size)
    file = moments.choice(files)
    content = bytearray(file.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    file.write_bytes(content)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_jax.py", "train_torch.py"])
def test_a_run_of_two_thousand_steps_survives_a_disturbance_every_few_seconds(script, start, run, recipe, tmp_path):
    mesh = ("--mesh", "2") if script == "train_jax.py" else ()
    arguments = (*mesh, "--config", recipe, "--steps", str(STEPS), "--checkpoint_interval", "10")
    arguments += ("--eval_interval", "500", "--keep_checkpoints", "3", "--model.dropout", "0.1")
    code, _, err = run(script, *arguments, "--run_dir", "whole")
    assert code == 0, err
    seed = random.randrange(1 << 30)
    print(f"disturbed at the moments of seed {seed}")
    moments, disturbed, happened = random.Random(seed), tmp_path / "disturbed", {}
    code = None
    while code != 0:
        resume = ("--resume",) if (disturbed / "config.yaml").is_file() else ()
        process = start(script, *arguments, "--run_dir", "disturbed", *resume)
        metrics = disturbed / "metrics.jsonl"
        goal = (metrics.read_text().count("\n") if metrics.is_file() else 0) + moments.randrange(100, 400)
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= goal):
            time.sleep(0.01)
        kind = moments.choice(["SIGKILL", "SIGTERM", "SIGUSR1", "the folder can't be written", "a flipped bit"])
        happened[kind] = happened.get(kind, 0) + 1
        if kind == "the folder can't be written":
            # Not by permissions, which bind no root: a file stands where the next checkpoints' temporary folders go.
            blocked = [disturbed / "checkpoints" / f".{step}.tmp" for step in range(0, STEPS + 1, 10)]
            for path in blocked:
                if not path.exists():
                    path.write_text("")
            time.sleep(moments.random())
        process.send_signal(getattr(signal, kind, signal.SIGKILL))
        _, err = process.communicate(timeout=120)
        code = process.returncode
        assert code in (0, 75, -signal.SIGKILL) or (code == 1 and "can't be saved" in err), err
        assert "Traceback" not in err, err
        if kind == "a flipped bit" and code != 0 and not flip_a_bit(disturbed, moments):
            happened[kind] -= 1
    print(f"it was disturbed by {happened}")
    assert sum(happened.values()) >= 5
    for split in ("train", "val"):
        assert rows(disturbed, split) == rows(tmp_path / "whole", split)
    ours, theirs = (read_weights(folder).arrays for folder in (disturbed, tmp_path / "whole"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    kept = [p.name for p in checkpoints(disturbed)]
    assert len(kept) <= 4  # the newest three, and the best
    leftovers = [p.name for p in (disturbed / "checkpoints").iterdir() if p.name not in (*kept, "index.json")]
    assert all(".damaged" in name for name in leftovers), leftovers


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_jax.py", "train_torch.py"])
def test_a_long_run_keeps_its_memory_threads_and_files(script, start, recipe, tmp_path):
    mesh = ("--mesh", "2") if script == "train_jax.py" else ()
    # Few lines are printed: nobody reads them before the end, and a full pipe would hold the run.
    arguments = (
        *mesh,
        "--config",
        recipe,
        "--steps",
        str(STEPS),
        "--checkpoint_interval",
        "10",
        "--log_interval",
        "10",
    )
    process = start(script, *arguments, "--eval_interval", "100", "--sample_interval", "200", "--run_dir", "r")
    metrics, found = tmp_path / "r" / "metrics.jsonl", {}
    for step in (STEPS // 4, STEPS * 9 // 10):
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count('"train"') >= step // 10):
            time.sleep(0.01)
        # A save that is in flight has threads and files of its own: the fewest of several looks.
        looks = [seen(process) for _ in range(20) if not time.sleep(0.01)]
        found[step] = [min(values) for values in zip(*looks, strict=True)]
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (memory, threads, files), (memory_later, threads_later, files_later) = found.values()
    assert memory_later <= memory + (32 << 20)
    assert threads_later <= threads + 2 and files_later <= files + 2
