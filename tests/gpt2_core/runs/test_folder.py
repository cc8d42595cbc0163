import dataclasses
import json
from pathlib import Path

import pytest

from gpt2_core.config import OptimizerConfig
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import RunFolder, metadata_of, metadata_path, plan_run, read_metrics, recent_training_loss
from gpt2_core.runs.manifest import write_manifest


def begin(config):
    """A run begun and given up."""
    plan = plan_run(config, framework="jax", data_digest="d")
    plan.begin()
    return plan


def fake_run(config, steps, rows=()) -> RunFolder:
    """A run folder with checkpoints that have metadata only."""
    folder = begin(config).folder
    for step in steps:
        path = metadata_path(folder.checkpoints / str(step))
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(metadata_of(config, step, "jax", "d")))
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def reopen(config, **changes):
    framework, digest = changes.pop("framework", "jax"), changes.pop("data_digest", "d")
    plan = plan_run(dataclasses.replace(config, **changes), framework=framework, data_digest=digest)
    plan.begin()
    return plan


def row(step, split="train", loss=1.0):
    return {"step": step, "split": split, "loss": loss}


def contents(folder: Path):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_run_writes_its_configuration(make_config):
    plan = begin(make_config())
    assert plan.folder.config.is_file() and plan.checkpoint is None and not plan.continued


def test_resuming_takes_the_newest_whole_checkpoint_and_cuts_the_metrics_there(make_config):
    rows = [row(0, "val"), *map(row, range(3)), row(3, "val"), row(3), row(4), row(6, "val")]
    folder = fake_run(make_config(), [1, 3], rows)
    (folder.checkpoints / "6.orbax-checkpoint-tmp-1").mkdir()  # saves and a removal that were killed
    (folder.checkpoints / ".6.tmp").mkdir()
    (folder.checkpoints / ".0.removed").mkdir()
    (folder.checkpoints / "mine").mkdir()  # nobody else's is touched
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "spl')  # a write that was killed
    assert reopen(make_config(), resume="newest").checkpoint == folder.checkpoints / "3"
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["1", "3", "mine"]
    assert read_metrics(folder.metrics) == [row(0, "val"), *map(row, range(3)), row(3, "val")]


def break_manifest(folder: RunFolder, step: int) -> None:
    write_manifest(folder.checkpoints / str(step))
    metadata_path(folder.checkpoints / str(step)).write_text("{}")


def test_damaged_checkpoints_are_set_aside_and_the_newest_whole_one_is_resumed(make_config):
    folder = fake_run(make_config(), [1, 3, 6, 8], [*map(row, range(9))])
    for step in (6, 8):
        break_manifest(folder, step)
    (folder.checkpoints / "8.damaged").mkdir()  # of an earlier time
    plan = plan_run(make_config(resume="newest"), framework="jax", data_digest="d")
    assert folder.steps() == [1, 3, 6, 8]  # a plan changes nothing
    plan.begin()
    assert plan.checkpoint == folder.checkpoints / "3" and folder.steps() == [1, 3]
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert names == {"1", "3", "6.damaged", "8.damaged", "8.damaged.1"}
    assert read_metrics(folder.metrics) == [*map(row, range(3))]
    newest, older = plan.warnings
    assert newest.startswith("checkpoint 8 is damaged (metadata/metadata has 2 bytes instead of ")
    assert "set aside as 6.damaged, and the run continues from step 3" in older


def test_where_no_checkpoint_is_whole_the_run_is_not_resumed(make_config):
    folder = fake_run(make_config(), [3])
    break_manifest(folder, 3)
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged \(3: metadata/metadata has 2 bytes"):
        reopen(make_config(), resume="newest")
    assert folder.steps() == [3]


def test_a_damaged_checkpoint_that_was_named_is_an_error(make_config):
    folder = fake_run(make_config(), [1, 3])
    break_manifest(folder, 1)
    path = folder.checkpoints / "1"
    with pytest.raises(UserError, match=rf"--resume {path}: .* is damaged .*; name another checkpoint"):
        reopen(make_config("other"), resume=str(path))


def test_a_checkpoint_under_another_name_is_an_error(make_config):
    folder = fake_run(make_config(), [3])
    (folder.checkpoints / "3").rename(folder.checkpoints / "7")
    with pytest.raises(UserError, match="7 was written after 3 steps, and its name says 7"):
        reopen(make_config(), resume="newest")


def test_names_that_only_look_like_numbers_are_no_checkpoints(make_config):
    folder = fake_run(make_config(), [3])
    for name in ("\u0664", "\u00b2", "-1", "1e3"):
        (folder.checkpoints / name).mkdir()
    assert folder.steps() == [3]


def test_a_link_among_old_checkpoints_is_removed_and_what_it_names_is_not(make_config, tmp_path):
    folder = fake_run(make_config(), [3, 4])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    (folder.checkpoints / "1").symlink_to(tmp_path / "elsewhere")
    folder.remove_obsolete(1)
    assert folder.steps() == [4] and (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def test_an_index_names_the_latest_and_the_best_for_other_tools(make_config):
    folder = fake_run(make_config(), [1, 2, 3], [row(s, "val", loss) for s, loss in {1: 2.0, 2: 1.0, 3: 3.0}.items()])
    folder.remove_obsolete(1)
    assert folder.steps() == [2, 3]
    assert json.loads((folder.checkpoints / "index.json").read_text()) == {"latest": "3", "best": "2"}


def test_resuming_a_run_killed_before_its_first_checkpoint_starts_it_again(make_config):
    folder = fake_run(make_config(), [], [row(0, "val"), row(0)])
    assert reopen(make_config(), resume="newest").checkpoint is None
    assert read_metrics(folder.metrics) == []


def test_a_run_killed_before_its_first_checkpoint_begins_again_as_it_began(make_config, tmp_path):
    source = fake_run(make_config(), [1, 3])
    begin(make_config("weights", init_from="w.safetensors"))
    assert reopen(make_config("weights"), resume="newest").config.init_from == "w.safetensors"
    begin(make_config("fork", resume=str(source.checkpoints / "1")))
    assert reopen(make_config("fork"), resume="newest").checkpoint == source.checkpoints / "1"


def test_a_folder_belongs_to_one_process_at_a_time(make_config):
    first = begin(make_config())
    with pytest.raises(UserError, match="another process is training there"):
        reopen(make_config(), resume="newest")
    del first
    reopen(make_config(), resume="newest")


def test_what_a_process_killed_at_its_start_left_is_no_hindrance(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.yaml.123.tmp").touch()
    assert {p.name for p in begin(make_config()).folder.path.iterdir()} == {".lock", "config.yaml"}


def test_a_run_that_came_to_nothing_is_no_hindrance_to_another(make_config):
    folder = begin(make_config()).folder
    folder.checkpoints.mkdir()
    folder.metrics.touch()
    assert reopen(make_config(), seed=5).checkpoint is None
    folder.metrics.write_text(json.dumps(row(0)) + "\n")
    with pytest.raises(UserError, match="another configuration"):
        reopen(make_config(), seed=6)


def test_a_run_may_go_on_elsewhere_from_a_checkpoint_of_another(make_config, tmp_path):
    source = fake_run(make_config(), [1, 3], [row(0)])
    fork = reopen(make_config(), resume=str(source.checkpoints / "1"), run_dir=str(tmp_path / "fork"), mesh="fsdp=4")
    assert fork.checkpoint == source.checkpoints / "1" and fork.folder.path == tmp_path / "fork"


def test_a_text_that_has_moved_is_the_same_text(make_config):
    folder = fake_run(make_config(), [3])
    moved = dataclasses.replace(make_config().data, path="elsewhere.txt", cache_dir="elsewhere")
    assert reopen(make_config(), data=moved, resume="newest").checkpoint == folder.checkpoints / "3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "already holds this run; continue it with --resume"),
        ({"seed": 5}, r"already holds a run of another configuration \(seed differ"),
        ({"resume": "newest", "seed": 5}, "was trained with seed 1337, not 5"),
        ({"resume": "newest", "optimizer": OptimizerConfig()}, "optimizer.learning_rate 0.003, not 0.0006 .and 1 more"),
        ({"resume": "newest", "framework": "torch"}, "was written by the jax trainer"),
        ({"resume": "newest", "data_digest": "e"}, "the text has changed"),
        ({"resume": "newest", "steps": 2}, "--steps 2: the run is already at step 3"),
        ({"resume": "newest", "run_dir": "nowhere"}, "holds no run to resume"),
        ({"resume": "/nowhere"}, "neither a run folder nor a checkpoint"),
    ],
)
def test_nothing_is_overwritten_and_no_other_run_resumed(make_config, changes, words):
    folder = fake_run(make_config(), [3], [row(0), row(3)])
    before = contents(folder.path)
    with pytest.raises(UserError, match=words):
        reopen(make_config(), **changes)
    assert contents(folder.path) == before


def test_going_back_in_the_same_folder_is_refused(make_config):
    folder = fake_run(make_config(), [1, 3])
    with pytest.raises(UserError, match="is already at step 3"):
        reopen(make_config(), resume=str(folder.checkpoints / "1"))


def test_a_folder_of_something_else_is_left_alone(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists and is not a run"):
        begin(make_config())
    assert contents(tmp_path / "run") == {str(tmp_path / "run" / "thesis.tex"): b"precious"}


def test_the_newest_and_the_best_checkpoints_are_kept(make_config):
    losses = {1: float("nan"), 2: 3.0, 3: 4.0, 4: 4.5, 5: 6.0}
    folder = fake_run(make_config(), losses, [row(s, "val", loss) for s, loss in losses.items()])
    assert folder.best_step() == 2
    folder.remove_obsolete(2)
    assert folder.steps() == [2, 4, 5]
    assert folder.checkpoint("latest").name == "5"
    assert folder.checkpoint("best").name == "2"
    assert folder.checkpoint("4").name == "4"
    with pytest.raises(UserError, match="--checkpoint 3: .* has the steps 2, 4, 5"):
        folder.checkpoint("3")


def test_without_validation_the_best_checkpoint_is_the_one_with_the_lowest_training_loss_of_late(make_config):
    # Falls to step 20, rises after; the lowest single loss, at step 27, is an outlier.
    losses = [30.0 - step if step <= 20 else 10.0 + (step - 20) for step in range(40)]
    losses[27] = 0.1
    folder = fake_run(make_config(), [10, 25, 40], [row(step, loss=loss) for step, loss in enumerate(losses)])
    means = {step: sum(losses[step - 10 : step]) / 10 for step in (10, 25, 40)}
    assert folder.best_step() == min(means, key=means.get) == 25
    assert recent_training_loss(read_metrics(folder.metrics), 4) == sum(losses[:4]) / 4


def test_computed_accumulation_may_follow_the_devices(make_config):
    fake_run(make_config(device_batch_size=4, accumulation=2), [3])
    assert reopen(make_config(device_batch_size=4, accumulation=1, resume="newest")).step == 3
    with pytest.raises(UserError, match="was trained with accumulation 1, not 2"):
        reopen(make_config(accumulation=2, resume="newest"))
