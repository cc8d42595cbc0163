import json

import numpy as np
import pytest

from gpt2_convert.canonical import write as write_safetensors
from gpt2_core.config import ModelConfig
from gpt2_core.data.tokenizer import BytesTokenizer
from gpt2_torch.weights import build
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)
ENDINGS = ["eats it.", "sleeps.", "goes away from here.", "stands up."]


@pytest.fixture
def files(tmp_path):
    """Weights in the format of safetensors, whose tokenizer is unknown, and data sets of a few rows."""
    write_safetensors(random_weights(MODEL), tmp_path / "w.safetensors")
    rows = {
        "hellaswag": [
            {"activity_label": "Eating", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he"}
            | {"endings": ENDINGS, "label": number % 4}
            for number in range(5)
        ],
        "lambada_openai": [{"text": "she opened the door"}] * 3,
        "lambada_standard": [{"text": "she opened the door ."}] * 3,
        "wikitext103": [{"page": " = A = \n\n A text , of words .\n" * 4}] * 2,
    }
    for name, of_file in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    return ("--weights", "w.safetensors", "--tokenizer", "bytes", "--data_dir", ".")


@pytest.mark.long
def test_every_task_has_the_same_results_of_both_backends(run, files):
    options = (*files, "--tasks", "hellaswag,lambada,wikitext103", "--precision", "float64", "--batch_size", "6")
    jax, torch = (
        run("evaluate.py", *options, "--json", "--backend", *rest) for rest in (("jax", "--mesh", "fsdp=2"), ("torch",))
    )
    assert jax[0] == torch[0] == 0, jax[2] + torch[2]
    ours, theirs = (json.loads(out)["results"] for _, out, _ in (jax, torch))
    assert [(r["task"], r["figure"]) for r in ours] == [(r["task"], r["figure"]) for r in theirs] and len(ours) == 13
    for a, b in zip(ours, theirs, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-10) and a["variant"] and a["meaning"]
    assert {r["task"]: r["examples"] for r in ours} == {
        "hellaswag_harness": 5, "hellaswag_llmc": 5, "lambada_openai": 3, "lambada_standard": 3, "wikitext103": 2,
    }  # fmt: skip


@pytest.mark.long
def test_the_loss_of_tokens_is_the_mean_over_all_windows_of_their_validation_split(run, files, tmp_path):
    ids = BytesTokenizer().encode("Some text to train on, and some to validate on. " * 40)
    for split in ("train", "val"):
        ids.astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    code, out, err = run(
        "evaluate.py", *files[:4], "--tasks", ".", "--backend", "torch", "--precision", "float64", "--json"
    )
    assert code == 0, err
    loss, perplexity = json.loads(out)["results"]

    import torch

    size, model = MODEL.block_size, build(random_weights(MODEL).astype(np.float64))
    windows = [ids[begin : begin + size + 1] for begin in range(0, len(ids) - size, size)]
    pairs = [(window[:-1], window[1:]) for window in windows]
    inputs, targets = (torch.from_numpy(np.stack(part)).long() for part in zip(*pairs, strict=True))
    with torch.no_grad():
        expected = model(inputs, targets).item() / targets.numel()
    assert loss["value"] == pytest.approx(expected, rel=1e-12) and loss["examples"] == len(windows)
    assert perplexity["value"] == pytest.approx(np.exp(expected), rel=1e-12)


@pytest.mark.long
def test_a_table_states_variant_definition_and_what_is_published(run, files, environment):
    environment["COLUMNS"] = "200"
    code, out, err = run("evaluate.py", *files, "--tasks", "lambada_openai", "--backend", "torch", "--limit", "2")
    assert code == 0 and err == ""
    text = " ".join(out.replace("│", " ").split())
    assert (
        text.startswith("lambada_openai: lm-eval's lambada_openai: OpenAI's detokenised text") and "2 examples" in text
    )
    assert "none known for this variant" in text and "perplexity" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "helaswag"), "--tasks helaswag: no such task; use one or more of hellaswag, lambada, "),
        (("--tasks", "lambada", "--backend", "torch", "--mesh", "2"), "--mesh 2: --backend torch computes on one"),
        (("--tasks", "lambada", "--device", "cpu"), "--device: chooses PyTorch's device"),
        (("--tasks", "lambada", "--limit", "0"), "--limit: must be 1 or more"),
        (("--tasks", "lambada", "--mesh", "3"), "--mesh data=3: batch_size 32 is not divisible by data = 3; use "),
        (("--tasks", "."), "--tasks .: "),
    ],
)
def test_bad_input_is_one_sentence(run, files, arguments, words):
    code, out, err = run("evaluate.py", *files, *arguments)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and len(said) == 1 and words in said[0] and err.count("\n") == 1, err


def test_without_a_network_a_sentence_says_so(run, files, environment):
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    code, out, err = run("evaluate.py", *files[:4], "--tasks", "hellaswag")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "--tasks hellaswag_harness: Rowan/hellaswag can't be read from the Hugging Face Hub (" in err
    assert "--data_dir FOLDER" in err
