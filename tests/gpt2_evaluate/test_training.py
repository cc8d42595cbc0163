"""Both trainers compute tasks with their evaluations."""

import dataclasses
import json

import pytest

import gpt2_jax.train
import gpt2_torch.train
from gpt2_convert import read_weights
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.errors import UserError
from gpt2_core.evaluation.rows import read_rows
from gpt2_core.evaluation.run import Evaluated, evaluate_task
from gpt2_core.evaluation.tasks import TASKS
from gpt2_core.runs.folder import read_metrics
from gpt2_evaluate.backends import torch_scorer

pytestmark = pytest.mark.long

ENDINGS = ["eats it.", "sleeps.", "goes.", "stands up."]
FIGURES = {
    "hellaswag_llmc/acc", "hellaswag_llmc/acc_norm", "lambada_openai/acc", "lambada_openai/perplexity",
    "lambada_standard/acc", "lambada_standard/perplexity",
}  # fmt: skip


@pytest.fixture
def with_tasks(tmp_path):
    rows = {
        "hellaswag": [
            {"activity_label": "A", "ctx_a": "B", "ctx_b": "c", "ctx": f"{n} men", "endings": ENDINGS, "label": n % 4}
            for n in range(9)
        ],
        "lambada_openai": [{"text": f"{n} times she opened the door"} for n in range(9)],
        "lambada_standard": [{"text": "she opened the door ."}],
    }
    for name, of_file in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    return {"eval_tasks": "hellaswag_llmc, lambada", "eval_examples": 6, "eval_data_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("trainer", "more"),
    [(gpt2_jax.train, {"mesh": "data=2,fsdp=2", "attention": "xla"}), (gpt2_torch.train, {"device": "cpu"})],
    ids=["jax", "torch"],
)
def test_an_evaluation_has_the_tasks_figures_of_the_weights_of_its_step(make_config, with_tasks, trainer, more, capsys):
    folder = trainer.train(make_config(steps=4, checkpoint_interval=2, keep_checkpoints=3, **with_tasks, **more))
    evaluations = [row for row in read_metrics(folder.metrics) if row["split"] == "val"]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert all(set(row) == {"step", "split", "loss"} | FIGURES for row in evaluations)
    assert "lambada_openai/perplexity" in capsys.readouterr().out
    for row in evaluations[1:]:
        weights = read_weights(folder.path, str(row["step"]))
        model = Evaluated(
            weights.config, get_tokenizer("bytes"), torch_scorer(weights, device="cpu", precision="float32"), 4
        )
        for name in ("hellaswag_llmc", "lambada_openai", "lambada_standard"):
            rows = read_rows(name, TASKS[name].dataset, with_tasks["eval_data_dir"], 6)
            for result in evaluate_task(model, name, rows, lambda task, total: lambda count: None):
                assert row[f"{name}/{result.figure}"] == pytest.approx(result.value, rel=1e-4), result


@pytest.mark.parametrize("trainer", [gpt2_jax.train, gpt2_torch.train], ids=["jax", "torch"])
def test_a_task_that_cannot_be_read_is_a_sentence_before_the_run_begins(make_config, with_tasks, trainer, tmp_path):
    for changed, words in (
        ({"eval_tasks": "hellaswagg"}, "^--eval_tasks hellaswagg: no such task; use one or more of hellaswag, "),
        ({"eval_tasks": str(tmp_path)}, "^--eval_tasks /.*: no such task"),
        ({"eval_tasks": "wikitext103"}, r"^--eval_data_dir .*: no wikitext103\.jsonl or "),
    ):
        config = make_config("refused", **with_tasks | changed)
        with pytest.raises(UserError, match=words):
            trainer.train(config)
        assert not (tmp_path / "refused").exists()


def test_tasks_need_evaluations(make_config, with_tasks):
    data = dataclasses.replace(make_config().data, validation_fraction=0)
    with pytest.raises(UserError, match=r"^--eval_tasks hellaswag_llmc, lambada: .*validation_fraction 0; hold back"):
        make_config(data=data, **with_tasks)
