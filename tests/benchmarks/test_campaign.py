import dataclasses
import json
import time

import pytest
from rich.console import Console

from benchmarks import campaign, requirements
from benchmarks.campaign import conduct, main, next_stage, open_folder, read_records
from benchmarks.runner import Outcome, run_stage
from benchmarks.stages import GROUPS, Settings, Stage, stages
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.errors import RunError, UserError

SETTINGS = Settings(TrainConfig(device="cuda", mesh=1, batch_size=32), 7, 5, None, 0.01)
TOY = [
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16"),
    *("--model.vocab_size", "64", "--batch", "2", "--rounds", "2", "--steps", "1", "--device", "cpu"),
]


def stage(name: str, seconds: float = 1.0, group: str = "train", needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, group, f"the stage {name}", "module:function", {}, seconds, needs)


def record(name: str, status: str, seconds: float = 1.0) -> dict:
    return {"stage": name, "status": status, "seconds": seconds}


class Conductor:
    """Conducts stages whose outcomes are given, on a clock that stands still unless a stage takes its time."""

    def __init__(self, folder, plan: list[Stage], outcomes: dict[str, Outcome], monkeypatch) -> None:
        self.folder, self.plan, self.outcomes, self.ran, self.now = folder, plan, outcomes, [], 0.0
        (folder / "results").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(campaign.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(campaign, "render", lambda records: "".join(r["stage"] + "\n" for r in records))

    def __call__(self, seconds: float) -> list[str]:
        """The stages that a call with so many seconds ran, and how long each might have taken."""
        self.ran = []

        def run(function, spec, *, limit, log) -> Outcome:
            name = log.stem
            outcome = self.outcomes.get(name, Outcome("done", 1.0, {"is": name}))
            self.ran.append((name, limit))
            self.now += outcome.seconds
            return outcome

        conduct(
            lambda records: self.plan,
            self.folder,
            groups=list(GROUPS),
            deadline=self.now + seconds,
            describe=lambda: {"commit": "abc"},
            console=Console(quiet=True),
            run=run,
        )
        return [name for name, _ in self.ran]


def test_results_and_report_are_there_after_each_stage(tmp_path, monkeypatch):
    call = Conductor(tmp_path, [stage("b"), stage("a")], {}, monkeypatch)
    assert call(10) == ["b", "a"]
    found = json.loads((tmp_path / "results" / "a.json").read_text())
    assert found == {
        **{"stage": "a", "group": "train", "title": "the stage a", "status": "done", "seconds": 1.0},
        **{"results": {"is": "a"}, "message": "", "commit": "abc"},
    }
    assert (tmp_path / "campaign.md").read_text() == "b\na\n"


def test_a_second_call_does_what_the_first_left_and_then_tries_failures_again(tmp_path, monkeypatch):
    plan = [stage("a"), stage("b"), stage("c"), stage("d", seconds=30)]
    call = Conductor(tmp_path, plan, {"a": Outcome("failed", 1.0, message="a bug")}, monkeypatch)
    assert call(10) == ["a", "b", "c"]  # d is not begun: it wouldn't fit
    call.outcomes = {}
    assert call(40) == ["d", "a"]
    assert call(40) == []


def test_a_failure_is_tried_once_a_call(tmp_path, monkeypatch):
    call = Conductor(tmp_path, [stage("a")], {"a": Outcome("failed", 0.0, message="a bug")}, monkeypatch)
    assert call(10) == ["a"] and call(10) == ["a"]


def test_a_stage_that_does_not_fit_makes_room_for_a_shorter_one():
    plan = [stage("long", seconds=100), stage("short", seconds=5)]
    assert next_stage(plan, [], set(), 50).name == "short"
    assert next_stage(plan, [], {"short"}, 50) is None


def test_a_stage_that_ran_out_of_time_is_given_more():
    plan = [stage("a", seconds=10)]
    assert next_stage(plan, [record("a", "out of time", 60)], set(), 50) is None
    assert next_stage(plan, [record("a", "out of time", 60)], set(), 60).name == "a"
    assert next_stage(plan, [record("a", "failed", 60)], set(), 10).name == "a"


def test_a_stage_may_take_three_times_what_is_expected_and_never_more_than_there_is(tmp_path, monkeypatch):
    call = Conductor(tmp_path, [stage("a", seconds=10), stage("b", seconds=10)], {}, monkeypatch)
    call(25)
    assert call.ran == [("a", 25.0), ("b", 24.0)]
    call = Conductor(tmp_path / "other", [stage("a", seconds=10)], {}, monkeypatch)
    call(1000)
    assert call.ran == [("a", 30.0)]


def test_without_the_environment_nothing_else_is_begun(tmp_path, monkeypatch):
    plan = [stage("environment", group="environment"), stage("a")]
    call = Conductor(tmp_path, plan, {"environment": Outcome("failed", 1.0, message="no GPU here")}, monkeypatch)
    with pytest.raises(RunError, match="environment failed, so no other stage is started: no GPU here"):
        call(10)
    assert [r["stage"] for r in read_records(tmp_path)] == ["environment"]


def test_a_stage_whose_packages_are_missing_is_skipped_and_says_how_to_get_them(tmp_path, monkeypatch):
    lacking = stage("a", seconds=1000, needs=("grain", "no-such-package"))
    call = Conductor(tmp_path, [lacking, stage("b")], {}, monkeypatch)
    assert call(10) == ["b"]
    found = read_records(tmp_path)[0]
    assert found["status"] == "skipped"
    assert found["message"] == "needs no-such-package: pip install no-such-package"


def test_packages_are_asked_for_in_the_projects_versions(capsys):
    assert requirements.pip_command(["jax", "grain"]).startswith("pip install 'jax>=")
    assert "'grain>=" in requirements.pip_command(["jax", "grain"])
    assert requirements.missing(["jax", "no-such-package"]) == ["no-such-package"]
    with pytest.raises(SystemExit) as ended:
        requirements.require_or_exit(["no-such-package"], "bench.py")
    assert ended.value.code == 2
    assert "error: bench.py needs packages that aren't installed: no-such-package; pip" in capsys.readouterr().err


def test_what_packages_need_is_looked_into_too(monkeypatch):
    installed = {"a": ["b>=1", 'c; extra == "more"', 'd; python_version < "3"'], "b": ["e"], "jsonargparse": []}
    monkeypatch.setattr(requirements, "_requires", installed.get)
    assert requirements.missing_below(["a"]) == ["e"]
    assert list(requirements._missing_below("a[more]", set())) == ["e", "c"]


def test_the_plan_learns_from_what_is_known():
    first = {stage.name: stage for stage in stages(SETTINGS, campaign.Path("x"))}
    assert list(dict.fromkeys(stage.group for stage in first.values())) == list(GROUPS)
    assert first["profile-torch"].spec["attention"] == "flash"
    side = {"step_seconds": 0.1}
    known = [
        {"stage": "environment", "group": "environment", "status": "done",
         "results": {"gpu": {"memory.total": "143771 MiB"}}},
        {"stage": "train-flash", "group": "train", "status": "done", "results": {"sides": [side, side]}},
        {"stage": "train-cudnn", "group": "train", "status": "done",
         "results": {"sides": [side, {"step_seconds": 0.09}]}},
    ]  # fmt: skip
    then = {stage.name: stage for stage in stages(SETTINGS, campaign.Path("x"), known)}
    assert then["profile-torch"].spec["attention"] == "cudnn"
    batches = [plan["size-gpt2-xl"].spec["sides"][0]["config"]["batch_size"] for plan in (first, then)]
    assert batches[0] < batches[1]


def test_generation_is_measured_in_the_precision_that_was_asked_for():
    asked = dataclasses.replace(SETTINGS, config=dataclasses.replace(SETTINGS.config, precision="float32"))
    found = {stage.name: stage.spec["arguments"] for stage in stages(asked, campaign.Path("x"))
             if stage.group == "generate"}  # fmt: skip
    for arguments in found.values():
        assert arguments[arguments.index("--precision") + 1] == "float32"
    assert set(found) == {"generate-1", "generate-32"}


def test_a_folder_belongs_to_a_campaign_and_to_its_settings(tmp_path):
    open_folder(tmp_path / "mine", SETTINGS)
    open_folder(tmp_path / "mine", SETTINGS)
    other = dataclasses.replace(SETTINGS, config=dataclasses.replace(SETTINGS.config, model=ModelConfig(n_layer=3)))
    with pytest.raises(UserError, match=r"holds a campaign with other settings \(config.model.n_layer 12, not 3\)"):
        open_folder(tmp_path / "mine", other)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"--out .*theirs: exists and is not a campaign's folder; name another"):
        open_folder(tmp_path / "theirs", SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes 0.0: must be above 0"),
        (["--stages", "train,speed"], "--stages train,speed: no stages are called 'speed'; use environment, train"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt: no such file"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        main(["--out", str(tmp_path / "x"), *arguments])
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_a_stage_runs_in_a_process_and_says_why_it_cannot_here(tmp_path):
    """The cheapest real one: a step is compiled, taken and traced, and a CPU has no kernels."""
    config = TrainConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64),
        batch_size=2,
        mesh=1,
        device="cpu",
    )
    spec = {"config": dataclasses.asdict(config), "steps": 1}
    found = run_stage("benchmarks.profile:jax_profile", spec, limit=60, log=tmp_path / "log.txt")
    assert found.status == "skipped", found.message
    assert found.message.startswith("the trace has no GPU in it, only ") and "/host:CPU" in found.message


@pytest.mark.slow
def test_a_toy_campaign_on_cpu(tmp_path, capsys):
    out = tmp_path / "campaign"
    begin = time.monotonic()
    main(["--out", str(out), "--stages", "environment,train,floor", "--minutes", "4", "--commit", "abc", *TOY])
    assert time.monotonic() - begin < 4 * 60  # the budget it was given
    found = {record["stage"]: record for record in read_records(out)}
    assert {name: record["status"] for name, record in found.items()} == {
        "environment": "done",
        "train-auto": "done",
        "floor": "skipped",
    }
    jax, torch = found["train-auto"]["results"]["sides"]
    assert jax["tokens_per_second"] == pytest.approx(2 * 16 / jax["step_seconds"])
    assert found["train-auto"]["results"]["ratio"]["median"] > 0 and torch["peak_bytes"] > 1e7
    assert found["train-auto"]["commit"] == "abc" and "jax" in found["train-auto"]["versions"]
    report = (out / "campaign.md").read_text()
    assert "## A step" in report and "gpt2_jax/planning/targets has no description of cpu" in report
    assert "not done: floor" in capsys.readouterr().out
    begin = time.monotonic()
    main(["--out", str(out), "--stages", "environment,train", "--minutes", "4", *TOY])
    assert time.monotonic() - begin < 5  # both are done
