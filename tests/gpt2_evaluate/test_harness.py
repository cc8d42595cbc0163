"""The harness gets from our model what it gets from its own on the same weights."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from gpt2_convert import write_weights
from gpt2_core.config import ModelConfig
from gpt2_core.data.tokenizer import get_tokenizer, local_file
from gpt2_core.errors import UserError
from gpt2_core.evaluation.rows import read_rows
from gpt2_core.evaluation.run import Evaluated, evaluate_task
from gpt2_core.evaluation.scoring import encode_pair
from gpt2_core.evaluation.tasks import TASKS, _cleaned, _detokenised
from gpt2_evaluate.backends import torch_scorer
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50257)
TOLERANCE = 1e-4

# The harness takes seconds to import, so it is imported where it is used.
MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]


def weights():
    return dataclasses.replace(random_weights(MODEL), tokenizer="gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights as convert.py exports them, and GPT-2's tokenizer as transformers reads it."""
    from transformers import GPT2TokenizerFast

    path = tmp_path_factory.mktemp("hf") / "model"
    write_weights(weights(), path, "hf")
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    vocabulary.write_bytes(local_file("gpt2", "encoder.json"))
    merges.write_bytes(local_file("gpt2", "vocab.bpe"))
    GPT2TokenizerFast(str(vocabulary), str(merges)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    import gpt2_evaluate.harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_evaluate.harness, "configure", lambda *_: None)  # other tests have used JAX before
        return gpt2_evaluate.harness.GPT2JaxLM(str(folder), mesh="2", precision="float32", batch_size=8)


def test_a_process_that_has_used_jax_with_other_devices_is_told_so(folder):
    from gpt2_evaluate.harness import GPT2JaxLM

    assert jax.device_count() == 8
    with pytest.raises(UserError, match="^mesh=3: JAX has been used in this process already"):
        GPT2JaxLM(str(folder), mesh=3, precision="float32", batch_size=6)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


def words(generator, count):
    """Text in which tokens are short and long, with punctuation, other scripts and several spaces."""
    known = [
        "the",
        "old",
        "door",
        "unbelievably",
        "née",
        "東京",
        "1,234.5",
        "(and",
        "so)",
        "it's",
        "\n",
        "😀",
        "x" * 9,
        "",
    ]
    return " ".join(known[i] for i in generator.integers(0, len(known), count))


def pairs():
    generator = np.random.default_rng(0)
    made = [
        (words(generator, int(before)), " " + words(generator, int(after)))
        for before, after in generator.integers(1, 12, (320, 2))
    ]
    made = [
        (context, continuation) for context, continuation in made if context.strip()
    ]  # the model `hf` refuses others
    too_long = [(words(generator, 90), " the end"), (words(generator, 40) + "  ", "x"), ("a ", " b")]
    return [*made, *too_long, ("", "the start"), ("", "<|endoftext|>the start"), ("a<|endoftext|> b", " c")]


def asked(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_the_harness_own_choice_by_choice(ours, theirs):
    requests = asked("loglikelihood", pairs())
    both = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    differences = [abs(a - b) for (a, _), (b, _) in zip(*both, strict=True)]
    assert len(differences) > 300 and max(differences) <= TOLERANCE
    assert [greedy for _, greedy in both[0]] == [greedy for _, greedy in both[1]]


def test_greedy_continuations_are_recognised_by_both(ours, theirs):
    contexts = [context for context, _ in pairs()[:40] if context]
    made = ours.generate_until(asked("generate_until", [(c, {"max_gen_toks": 1}) for c in contexts]), disable_tqdm=True)
    # A token that makes another one with the end of the context leaves nothing to score.
    tokenizer = get_tokenizer("gpt2")
    both = [pair for pair in zip(contexts, made, strict=True) if encode_pair(tokenizer, *pair).continuation]
    requests = asked("loglikelihood", both)
    both = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in both[0]] == [greedy for _, greedy in both[1]]
    assert any(greedy for _, greedy in both[0])


def test_rolling_log_likelihoods_are_the_harness_own(ours, theirs):
    generator = np.random.default_rng(1)
    requests = asked("loglikelihood_rolling", [(words(generator, int(n)),) for n in [*range(1, 80), 200, 300]])
    both = [lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in (ours, theirs)]
    # A text has several windows; each is compared with the limit.
    windows = [max(1, len(get_tokenizer("gpt2").encode(r.args[0])) / MODEL.block_size) for r in requests]
    assert max(abs(a - b) / n for a, b, n in zip(*both, windows, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("until", [[], ["\n"], ["e", " the"]])
def test_generated_texts_are_the_harness_own(ours, theirs, until):
    generator = np.random.default_rng(2)
    options = {"until": until, "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", [(words(generator, int(n)), options) for n in [1, 3, 9, 20, 60, 200]])
    both = [lm.generate_until(requests, disable_tqdm=True) for lm in (ours, theirs)]
    assert both[0] == both[1] and any(both[0])


def test_a_generation_that_this_model_cannot_do_is_a_sentence(ours):
    for options, said in (
        ({"num_beams": 4, "max_gen_toks": 4}, "^generation with num_beams: gpt2_jax can't do this"),
        ({"max_gen_toks": 64}, "^a task generates 64 tokens, and the model's block size is 64"),
    ):
        with pytest.raises(UserError, match=said):
            ours.generate_until(asked("generate_until", [("a", options)]), disable_tqdm=True)


def test_sampling_repeats_itself_and_differs_from_example_to_example(ours):
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "until": []}
    requests = asked("generate_until", [("a", options), ("a", options)])
    first, again = (ours.generate_until(requests, disable_tqdm=True) for _ in range(2))
    assert first == again and first[0] != first[1]


def test_texts_are_cleaned_as_the_harness_cleans_them():
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    generator = np.random.default_rng(3)
    pieces = [*" .,;:!?'\"()[]{}=@-NSs°\n", " @-@ ", " @,@ ", " [title]", "[header] ", " 's ", "= = = =", " N ", "word"]
    for size in generator.integers(0, 60, 500):
        text = "".join(pieces[i] for i in generator.integers(0, len(pieces), size))
        assert _cleaned(text) == preprocess(text)
        assert _detokenised(text) == wikitext_detokenizer({"page": text})


def hellaswag(generator):
    return {
        "activity_label": words(generator, 2),
        "ctx_a": words(generator, 6),
        "ctx_b": words(generator, 2),
        "ctx": words(generator, 8),
        "endings": [words(generator, int(n)) + " [step] end" for n in generator.integers(1, 9, 4)],
        "label": str(generator.integers(0, 4)),
    }


ROWS = {
    "hellaswag": ("hellaswag_harness", hellaswag),
    "lambada_openai": ("lambada_openai", lambda generator: {"text": words(generator, 12) + " end"}),
    "wikitext": ("wikitext103", lambda generator: {"page": words(generator, 150)}),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_tasks_figures_are_the_harness_own(theirs, tmp_path, task):
    """Those of the harness's own task and its own model; all that differs is where the rows are."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    name, make = ROWS[task]
    file, generator = tmp_path / f"{name}.jsonl", np.random.default_rng(4)
    file.write_text("".join(json.dumps(make(generator)) + "\n" for _ in range(12)))
    shipped = next((Path(lm_eval.__file__).parent / "tasks").glob(f"*/{task}.yaml"))
    for path in shipped.parent.glob("*.py"):  # its functions are looked for beside a task
        shutil.copy(path, tmp_path)
    split = TASKS[name].dataset.split
    rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(file)}}}
    rows |= {f"{kind}_split": split if kind == split else None for kind in ("training", "validation", "test")}
    local = {"include": str(shipped), "task": "local"} | rows
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))
    manager = TaskManager(include_path=str(tmp_path))
    found = lm_eval.simple_evaluate(theirs, tasks=["local"], task_manager=manager, bootstrap_iters=0)["results"][
        "local"
    ]

    model = Evaluated(MODEL, get_tokenizer("gpt2"), torch_scorer(weights(), device="cpu", precision="float32"), 8)
    results = evaluate_task(model, name, read_rows(name, TASKS[name].dataset, str(tmp_path), None), begin=_untold)
    ours = {result.figure: result.value for result in results}
    expected = {key.removesuffix(",none"): value for key, value in found.items() if key.removesuffix(",none") in ours}
    assert len(expected) >= 2 and {f: ours[f] for f in expected} == pytest.approx(expected, rel=1e-5)


def _untold(task, total):
    return lambda count: None


def run_command(*arguments, **environment):
    command = [sys.executable, "-m", "gpt2_evaluate", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_command_knows_the_model(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "she opened the door"}\n' * 3)
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(tmp_path / "rows.jsonl") + "}}\n"
        "output_type: loglikelihood\ntest_split: test\ndoc_to_text: she opened the\ndoc_to_target: ' door'\n"
        "metric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    arguments = ["--model", "gpt2_jax", "--tasks", "local", "--include_path", tmp_path]
    done = run_command(*arguments, "--model_args", f"weights={folder}")
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    wrong = run_command(*arguments, "--model_args", "weights=nowhere")
    assert wrong.returncode == 2 and "error: nowhere: no such file" in wrong.stderr
