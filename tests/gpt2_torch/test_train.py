import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_core.config import IGNORE_INDEX, DataConfig, ModelConfig, OptimizerConfig
from gpt2_core.config.io import from_yaml, to_yaml
from gpt2_core.errors import DivergedError, RunError, UserError
from gpt2_core.runs import log as runlog
from gpt2_core.runs.folder import RunFolder, RunPlan, losses_of, read_metrics
from gpt2_torch import checkpoints
from gpt2_torch import train as train_module
from gpt2_torch.divergence import first_not_finite
from gpt2_torch.model import GPT2
from gpt2_torch.optimizer import make_optimizer
from gpt2_torch.runtime import pick_device, resolve_precision, set_matmul_precision
from gpt2_torch.train import accumulate_gradients, train, train_step

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses(folder, split="train"):
    return [row["loss"] for row in read_metrics(folder.metrics) if row["split"] == split]


@pytest.mark.long
def test_it_learns(make_config):
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    found = losses(train(make_config(steps=100, optimizer=optimizer, checkpoint_interval=50)), "val")
    assert found[0] > 5.4 and found[-1] < 4.0


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_bitwise_the_run_that_went_through(make_config, dropout):
    model = dataclasses.replace(make_config().model, dropout=dropout)
    whole = train(make_config("whole", model=model, steps=6))
    # Trained to step 3 as part of a run of 6: the schedule is the whole run's.
    part = train(make_config("part", model=model, steps=6))
    (part.checkpoints / "6").rename(part.path / "taken away")
    resumed = train(make_config("part", model=model, steps=6, resume="newest"))
    assert losses(resumed) == losses(whole) and losses(resumed, "val") == losses(whole, "val")


def test_decay_touches_matrices_only(make_config):
    torch.manual_seed(0)
    model = GPT2(make_config().model).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.5))
    # A learning rate of 0.1 and gradients of zero leave decay alone: p (1 - 0.1 x 0.5).
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() >= 2 else 1.0
        assert torch.equal(p, before[name] * factor), name


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_memory_not_the_gradient(accumulation):
    torch.manual_seed(0)
    model = GPT2(ModelConfig(1, 2, 16, 8, 31)).double()
    inputs, targets = torch.randint(31, (2, 4, 8))
    targets[0, :7] = IGNORE_INDEX
    targets[3, 2:] = IGNORE_INDEX

    def gradient(parts):
        model.zero_grad()
        loss = accumulate_gradients(model, inputs, targets, accumulation=parts)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    (a_loss, a), (b_loss, b) = gradient(1), gradient(accumulation)
    assert torch.allclose(a_loss, b_loss, rtol=1e-14) and (a - b).norm() <= 1e-14 * a.norm()


class Products(TorchDispatchMode):
    """Writes down the dtypes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.update(x.dtype for x in args if isinstance(x, torch.Tensor))
        return function(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMS norm's weights stay float32
@pytest.mark.parametrize("options", [{}, {"position": "rope", "qk_norm": True, "mlp": "swiglu", "norm": "rmsnorm"}])
def test_in_bfloat16_every_product_is_of_bfloat16(options):
    # So TF32, a way to compute products of float32, has nothing to do there, and isn't switched on.
    model = GPT2(ModelConfig(2, 2, 16, 16, 64, **options))
    tokens = torch.zeros((2, 16), dtype=torch.long)
    with Products() as products:
        accumulate_gradients(model, tokens, tokens, autocast=torch.autocast("cpu", torch.bfloat16))
    assert set(products.dtypes) == {torch.bfloat16} and products.dtypes.total() > 50


def test_the_norm_reported_is_the_one_before_clipping():
    torch.manual_seed(0)
    model = GPT2(ModelConfig(1, 2, 16, 8, 31)).double()
    optimizer = make_optimizer(model, OptimizerConfig())
    inputs, targets = torch.randint(31, (2, 4, 8))
    accumulate_gradients(model, inputs, targets)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    model.zero_grad()
    _, norm = train_step(model, optimizer, inputs, targets, learning_rate=1e-3, clip_norm=expected / 10)
    assert norm.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_is_left_out_and_the_next_is_made(fused):
    """One row of the embeddings is infinite: only a batch with that token isn't finite."""
    torch.manual_seed(0)
    model = GPT2(ModelConfig(1, 2, 16, 8, 31, tie_embeddings=False))
    with torch.no_grad():
        model.wte.weight[3] = float("inf")
    optimizer = make_optimizer(model, OptimizerConfig())
    if not fused:
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    good = torch.randint(4, 31, (2, 4, 8))
    bad = good.clone()
    bad[0, -1, -1] = 3

    def state() -> list[bytes]:
        moments = [tensor for of in optimizer.state.values() for tensor in of.values()]
        return [tensor.detach().numpy().tobytes() for tensor in (*model.parameters(), *moments)]

    step = functools.partial(train_step, model, optimizer, learning_rate=1e-2, clip_norm=1.0)
    step(*good)
    before = state()
    loss, _ = step(*bad)
    assert not torch.isfinite(loss) and state() == before
    assert all(torch.isfinite(figure) for figure in step(*good)) and state() != before
    assert not checkpoints.is_finite(model.state_dict(), optimizer.state_dict())
    assert first_not_finite(model, [good, bad]) == "wte" and first_not_finite(model, [good]) is None


def test_curves_are_drawn_with_the_checkpoints_but_not_all_the_time(make_config, monkeypatch):
    drawn = []
    monkeypatch.setattr(runlog, "draw_curves", lambda rows, *_: drawn.append(rows[-1]["step"]))
    train(make_config("short", steps=7, checkpoint_interval=3))
    assert drawn == [7]  # when the run is over, whatever has ended it
    monkeypatch.setattr(runlog, "SECONDS_BETWEEN_DRAWINGS", 0)
    train(make_config("long", steps=7, checkpoint_interval=3))
    assert drawn[1:] == [3, 6, 7, 7]


@pytest.mark.long
def test_it_stops_at_the_target_and_accumulates_as_its_devices_need(make_config):
    settings = {"steps": 60, "target_loss": 4.5, "device_batch_size": 2, "eval_interval": 100}
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    folder = train(make_config(optimizer=optimizer, checkpoint_interval=100, **settings))
    found = losses(folder)
    means = [sum(found[end - 10 : end]) / 10 for end in range(10, len(found) + 1)]
    assert len(found) < 60 and means[-1] <= 4.5 < min(means[:-1])
    assert folder.steps() == [len(found)]  # the last step is kept and evaluated
    assert [row["step"] for row in read_metrics(folder.metrics) if row["split"] == "val"] == [0, len(found)]
    assert from_yaml(folder.config).accumulation == 4
    # Resumed, it has nothing left to do.
    resumed = train(make_config(optimizer=optimizer, checkpoint_interval=100, resume="newest", **settings))
    assert losses(resumed) == found


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_opens_tokens_and_weights_once(make_config, monkeypatch, rank):
    opened = []
    open_tokens = train_module.open_tokens
    monkeypatch.setattr(train_module, "open_tokens", lambda config: opened.append("tokens") or open_tokens(config))
    config = make_config()
    # A second process gets the plan of the first.
    plan = RunPlan(config, RunFolder(Path(config.run_dir)), checkpoint=None, continued=False)
    monkeypatch.setattr(
        train_module.dist, "broadcast_object_list", lambda sent: sent.__setitem__(0, plan) if rank else None
    )
    start = train_module.open_run(
        config, lambda config: opened.append("weights"), torch.device("cpu"), rank, processes=2
    )
    assert opened == ["tokens", "weights"]
    assert start.plan.config == config and len(start.tokens.train) == 1


def test_a_text_that_is_missing_is_named_before_a_step_is_planned(make_config, monkeypatch):
    monkeypatch.setattr(train_module, "check_memory", lambda *_: pytest.fail("half a minute for a large model"))
    with pytest.raises(UserError, match=r"--data\.path nowhere\.txt: no such file"):
        train(make_config(data=DataConfig("text", "nowhere.txt", "bytes")))


def by_two(recipe: Path, *options: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("scripts/train_torch.py", "--config", str(recipe), *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_a_state_that_came_after_steps_that_were_left_out_is_saved_under_its_own_number(make_config, monkeypatch):
    """The losses of three steps in a row are spikes, which is seen when the step is logged that comes four later."""
    limits = dict.fromkeys((3, 4, 5), 0.0)
    steps = itertools.count()
    monkeypatch.setattr(train_module, "loss_limit", lambda *_: torch.tensor(limits.get(next(steps), math.inf)))
    config = make_config(steps=30, log_interval=9, max_skipped_steps=2, checkpoint_interval=100, skip_spikes=6.0)
    with pytest.raises(DivergedError, match="step 5 has loss .*, a spike above 0.0000 .* for 3 steps"):
        train(config)
    folder = RunFolder(Path(config.run_dir))
    assert folder.steps() == [10]
    assert len(losses_of(folder.checkpoints / "10")) == 10
    assert json.loads((folder.diverged / "step.json").read_text())["step"] == 5


@pytest.mark.slow
def test_a_model_split_over_two_processes_trains_as_one_and_is_resumed_by_one(make_config, tmp_path):
    options = {"precision": "float64", "steps": 4, "accumulation": 2, "checkpoint_interval": 2, "sample_interval": 2}
    options |= {"optimizer": OptimizerConfig(3e-3, warmup_steps=2, clip_norm=0.5), "sample_tokens": 5}
    options |= {"eval_interval": 1, "best_checkpoint_interval": 1, "keep_checkpoints": 9}
    one = train(make_config("one", **options))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(make_config("split", fsdp=True, **options)))
    by_two(recipe)
    split = RunFolder(tmp_path / "split")
    for kind in ("train", "val"):
        assert losses(split, kind) == pytest.approx(losses(one, kind), rel=1e-12)
    norms = [[row["grad_norm"] for row in read_metrics(f.metrics) if row["split"] == "train"] for f in (one, split)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-12) and min(norms[0]) > 0.5  # every step is clipped
    assert split.steps() == one.steps() == [1, 2, 3, 4]  # the second and the fourth are due, the others the best so far
    assert [split.sample(step).read_text() for step in (2, 4)] == [one.sample(step).read_text() for step in (2, 4)]

    # The same files: one process goes on from a split model's checkpoint, and the other way round.
    resumed = train(make_config("resumed", resume=str(split.checkpoints / "2"), **options))
    assert losses(resumed, "train") == pytest.approx(losses(one, "train")[2:], rel=1e-12)
    recipe.write_text(to_yaml(make_config("back", fsdp=True, resume=str(one.checkpoints / "2"), **options)))
    by_two(recipe)
    assert losses(RunFolder(tmp_path / "back"), "train") == pytest.approx(losses(one, "train")[2:], rel=1e-12)


@pytest.mark.slow
def test_tasks_of_a_split_model_are_computed_as_by_one_process(make_config, tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "she opened the door"}\n{"text": "no one came"}\n' * 3)
    tasks = {"eval_tasks": "lambada_openai", "eval_data_dir": str(tmp_path)}
    options = {"precision": "float64", "steps": 2, "checkpoint_interval": 2} | tasks
    one = train(make_config("one", **options))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(make_config("split", fsdp=True, **options)))
    by_two(recipe)
    names = ("lambada_openai/perplexity", "lambada_openai/acc", "loss")
    both = [
        [[row[name] for name in names] for row in read_metrics(folder.metrics) if row["split"] == "val"]
        for folder in (one, RunFolder(tmp_path / "split"))
    ]
    assert len(both[0]) == 2
    for ours, theirs in zip(*both, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-12)


def test_a_model_is_not_split_over_one_process(make_config):
    with pytest.raises(UserError, match="--fsdp true: splits a model over processes, and there is one"):
        train(make_config(fsdp=True))


@pytest.mark.long
def test_two_processes_train_as_one(make_config, tmp_path):
    one = train(make_config("one", precision="float64", steps=4, accumulation=2))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(make_config("two", precision="float64", steps=4, accumulation=2)))
    # Gloo's threads outliving the group abort a Python that ends, now and then.
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, runpy\n"
        "runpy.run_path('scripts/train_torch.py', run_name='__main__')\n"
        "for name in pathlib.Path('/proc/self/task').glob('*/comm'):\n"
        "    print('thread', name.read_text().strip())\n"
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(script), "--config", str(recipe)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for split in ("train", "val"):
        found = [row["loss"] for row in rows if row["split"] == split]
        assert found == pytest.approx(losses(one, split), rel=1e-12)
    assert done.stdout.count("step      0  loss") == 1  # one process speaks
    assert "gloo" not in done.stdout


@pytest.mark.long
def test_when_one_of_two_processes_is_told_to_stop_both_stop_at_the_same_step_and_it_is_saved(make_config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(make_config("two", steps=1_000_000, checkpoint_interval=1_000_000)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("scripts/train_torch.py", "--config", str(recipe)),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3) and process.poll() is None:
        time.sleep(0.05)
    *_, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    (saved,) = (path.name for path in (tmp_path / "two" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"stopped by SIGTERM; {saved} steps are saved" in err
    assert f"stopped by a signal to another process; {saved} steps are saved" in err
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["step"] == int(saved) - 1


def test_a_model_that_cannot_be_held_leaves_no_folder(make_config):
    config = make_config(model=dataclasses.replace(make_config().model, n_embd=10**12))
    with pytest.raises(UserError, match="out of memory: the model's .* parameters and the optimizer's state need"):
        train(config)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_deterministic_run_is_the_same_to_the_bit_again(make_config, device):
    try:
        runs = [train(make_config(name, device=device, deterministic=True)) for name in ("one", "two")]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(runs[0]) == losses(runs[1])
    states = [(run.checkpoints / "6" / "model.safetensors").read_bytes() for run in runs]
    assert states[0] == states[1]


def test_a_device_that_is_not_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="--device cuda: .* finds none here; use cpu"):
        pick_device("cuda")


def test_float32_products_are_in_tf32_for_tf32_alone(make_config):
    set_matmul_precision("tf32")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    train(make_config(steps=1))  # in float32
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("NVIDIA A100", (8, 0))])
def test_tf32_is_refused_where_there_is_none(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    if capability >= (8, 0):
        assert resolve_precision("tf32", torch.device("cuda")) == "tf32"
    else:
        with pytest.raises(UserError, match="tf32: needs .* 8.0 or newer .*, and this is Tesla T4; use float32"):
            resolve_precision("tf32", torch.device("cuda"))
    with pytest.raises(UserError, match="and this is mps; use float32"):
        resolve_precision("tf32", torch.device("mps"))


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_saved_does_not_end_training(train_with_full_disk, capsys):
    folder = train_with_full_disk(train, checkpoints, failures=1)
    assert folder.steps() == [4, 6] and len(losses(folder)) == 6
    assert "warning: checkpoint 2 can't be saved ([Errno 28] No space left on device)" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_whose_last_state_cannot_be_saved_fails(train_with_full_disk):
    with pytest.raises(RunError, match=r"checkpoint 6 can't be saved .*: the state after step 6 is lost; make room"):
        train_with_full_disk(train, checkpoints, failures=99)
