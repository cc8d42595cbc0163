import math

import numpy as np
import pytest

from gpt2_core.config import PRESETS, ModelConfig
from gpt2_core.data.tokenizer import BytesTokenizer
from gpt2_core.errors import UserError
from gpt2_core.evaluation.published import PUBLISHED, preset_of
from gpt2_core.evaluation.rows import read_rows
from gpt2_core.evaluation.run import Evaluated, chosen_tasks, evaluate_task
from gpt2_core.evaluation.scoring import Score, TokenScores
from gpt2_core.evaluation.tasks import GROUPS, TASKS

BYTES = BytesTokenizer()
ROWS = {
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "[header] A man [title] is  cooking.",
        "ctx_b": "he THEN",
        "ctx": "A man is cooking. he THEN",
        "endings": ["eats.", "leaves the [substeps] house.", "sits.", "stands."],
        "label": "1",
    },
    "lambada": {"text": "she opened the old door"},
    "wikitext": {"page": " = Title = \n\n A word @-@ by @-@ word page , by 's hand .\n"},
}


def row_of(task):
    return next(row for name, row in ROWS.items() if task.startswith(name))


def texts(task):
    """The pairs that a task asks about its row."""
    pairs = TASKS[task].requests(row_of(task), BYTES, 1024)
    return [tuple(BYTES.decode(list(part)) for part in pair) for pair in pairs]


def test_hellaswag_is_asked_as_by_the_harness_and_as_by_llmc():
    context, ending = texts("hellaswag_harness")[1]
    assert (context, ending) == ("Cooking: A man. is cooking. He then", " leaves the house.")
    context, ending = texts("hellaswag_llmc")[1]
    assert (context, ending) == ("A man is cooking. he THEN", " leaves the [substeps] house.")


def test_lambada_asks_for_the_last_word_with_its_space():
    assert texts("lambada_openai") == texts("lambada_standard") == [("she opened the old", " door")]


def test_wikitext_asks_for_the_detokenised_page_after_end_of_text():
    assert texts("wikitext103") == [("<|endoftext|>", " = Title =\n\nA word-by-word page, by's hand .\n")]


def figures(task, scores):
    rows = [row_of(task)]
    requests = [TASKS[task].requests(row, BYTES, 1024) for row in rows]
    return {figure.name: figure.value for figure in TASKS[task].figures(rows, [scores], requests)}


@pytest.mark.parametrize(
    ("log_probs", "right"),
    [
        ([-5, -4, -6, -7], {"acc", "acc_norm", "acc_bytes"}),
        ([-5, -16.9, -6, -7], {"acc_norm", "acc_bytes"}),  # the right one has 17 characters, the first 5
        ([-5, -17.1, -6, -7], set()),
    ],
)
def test_the_harness_divides_by_characters_of_the_cleaned_ending(log_probs, right):
    given = figures("hellaswag_harness", [Score(value, False) for value in log_probs])
    assert {name for name, value in given.items() if value == 1.0} == right


def test_bytes_and_characters_choose_differently():
    row = ROWS["hellaswag"] | {"endings": ["a" * 10, "é" * 9, "x", "y"], "label": 1}
    scores = [[Score(value, False) for value in (-10, -9.9, -99, -99)]]
    by_name = {f.name: f.value for f in TASKS["hellaswag_harness"].figures([row], scores, [[]])}
    assert by_name == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 1.0}


def test_llmc_divides_by_tokens():
    # With its space the right ending, as it is, has 29 tokens, and the first 6.
    assert figures("hellaswag_llmc", [Score(v, False) for v in (-6, -28.9, -99, -99)]) == {"acc": 0.0, "acc_norm": 1.0}
    assert figures("hellaswag_llmc", [Score(v, False) for v in (-6, -29.1, -99, -99)]) == {"acc": 0.0, "acc_norm": 0.0}


def test_lambadas_perplexity_is_of_words_and_its_accuracy_of_whole_words():
    rows = [ROWS["lambada"]] * 2
    scores = [[Score(-1.0, True)], [Score(-3.0, False)]]
    by_name = {f.name: f.value for f in TASKS["lambada_openai"].figures(rows, scores, [[], []])}
    assert by_name == {"acc": 0.5, "perplexity": math.exp(2)}


def test_wikitexts_words_and_bytes_are_those_before_detokenising():
    page = ROWS["wikitext"]["page"]
    given = figures("wikitext103", [Score(-30.0, False)])
    tokens = len(texts("wikitext103")[0][1])
    # Splitting at white space counts what stands before the first and after the last, as the harness does.
    words = len(page.split()) + 2
    assert given["word_perplexity"] == math.exp(30 / words)
    assert given["token_perplexity"] == math.exp(30 / tokens)
    assert given["byte_perplexity"] == math.exp(30 / len(page))
    assert given["bits_per_byte"] == pytest.approx(math.log2(given["byte_perplexity"]), rel=1e-12)


def uniform(batch):
    return TokenScores(np.full(batch.targets.shape, -math.log(257)), np.zeros(batch.targets.shape, bool))


@pytest.mark.parametrize("task", TASKS)
def test_published_figures_are_of_figures_that_exist_and_shown_for_the_models_own_size(task):
    assert set(PUBLISHED) <= {(name, f.name) for name in TASKS for f in _results(name, "gpt2")}
    for preset in PRESETS:
        for result in _results(task, preset):
            expected = PUBLISHED[task, result.figure].figures.get(preset) if result.published else None
            assert (result.published and result.published.value) == expected
    assert all(result.published is None for result in _results(task, None))


def _results(task, preset):
    config = ModelConfig(**PRESETS[preset]) if preset else ModelConfig(n_layer=1)
    assert preset_of(config) == preset
    model = Evaluated(config, BYTES, uniform, 8)
    return [
        type("Shown", (), {"name": r.figure, "figure": r.figure, "published": r.published})
        for r in evaluate_task(model, task, [row_of(task)], lambda task, total: lambda count: None)
    ]


def test_a_uniform_model_has_the_vocabularys_perplexity():
    model = Evaluated(ModelConfig(n_layer=1, block_size=16), BYTES, uniform, 8)
    begin = lambda task, total: lambda count: None  # noqa: E731
    results = evaluate_task(model, "wikitext103", [ROWS["wikitext"]] * 3, begin)
    assert {r.figure: r.value for r in results}["token_perplexity"] == pytest.approx(257, rel=1e-12)


def test_groups_become_their_tasks_once(tmp_path):
    both = chosen_tasks(f"lambada, {tmp_path},lambada_openai,hellaswag")
    assert both == ["lambada_openai", "lambada_standard", str(tmp_path), "hellaswag_harness", "hellaswag_llmc"]
    assert all(task in TASKS for tasks in GROUPS.values() for task in tasks)
    with pytest.raises(UserError, match=r"^--tasks hellaswagg: no such task; use one or more of hellaswag, "):
        chosen_tasks("hellaswagg")


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        (
            "lambada_openai",
            '{"text": "a b"}\n{"text": 3}\n',
            r"lambada_openai\.jsonl, line 2: expected text in the field",
        ),
        ("lambada_openai", "\n\n", r"^--tasks lambada_openai: its data set has no rows"),
        ("lambada_openai", '{"text"', r"line 1 isn't JSON"),
        ("hellaswag_llmc", '{"ctx": "a"}', r"line 1: expected text in the field activity_label"),
        (
            "hellaswag_llmc",
            None,
            r"^--data_dir .*: no hellaswag_llmc\.jsonl or hellaswag\.jsonl there, which the task ",
        ),
    ],
)
def test_a_local_file_that_is_no_data_set_is_a_sentence(tmp_path, task, content, words):
    if content is not None:
        (tmp_path / f"{task}.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read_rows(task, TASKS[task].dataset, str(tmp_path), None)


@pytest.mark.parametrize("label", [4, "", None, "one"])
def test_a_label_is_the_number_of_an_ending(label):
    field = TASKS["hellaswag_llmc"].dataset.fields["label"]
    assert not field.is_valid(label) and field.is_valid(3) and field.is_valid("0")


def test_rows_may_hold_any_line_separator_of_unicode(tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "a\u2028b c"}\n' * 3, encoding="utf-8")
    rows = read_rows("lambada_openai", TASKS["lambada_openai"].dataset, str(tmp_path), 2)
    assert rows == [{"text": "a\u2028b c"}] * 2
