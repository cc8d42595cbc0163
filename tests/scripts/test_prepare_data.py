import json

import numpy as np
import pytest


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [json.dumps({"body": f"line {i}: " + "some more words " * 20}) for i in range(60)]
    path.write_text("\n".join([*rows, json.dumps({"body": ""})]))
    return path


@pytest.mark.slow
def test_a_corpus_is_prepared_once_and_trained_on_by_name(run, recipe, lines, tmp_path):
    arguments = (
        lines.name,
        "--field",
        "body",
        "--tokenizer",
        "bytes",
        "--out",
        "tokens",
        "--validation_fraction",
        "0.1",
    )
    code, out, err = run("prepare_data.py", *arguments, "--shard_tokens", "5000", "--workers", "2")
    assert code == 0 and err == "", err
    assert "of bytes" in out and "from 60 documents, 1 empty ones left out, in 5 shards" in out
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["tokenizer"] == "bytes" and index["documents"] == {"train": 54, "val": 6}
    assert np.fromfile(tmp_path / "tokens" / "val-00000.bin", "<u2").size == index["tokens"]["val"]
    again = run("prepare_data.py", *arguments, "--shard_tokens", "5000")
    assert again == (0, out, "")
    code, _, err = run("train_torch.py", "--config", recipe, "--data.tokens", "tokens", "--steps", "1")
    assert code == 0, err
    # The same documents by way of training itself, and mixed.
    corpus = ("--data.corpus", "jsonl", "--data.path", str(lines), "--data.field", "body", "--run_dir", "b")
    code, _, err = run("train_torch.py", "--config", recipe, *corpus, "--steps", "1")
    assert code == 0 and len(list((tmp_path / "data").iterdir())) == 1, err
    mixed = ("--data.mixture", f"tokens=1,{next((tmp_path / 'data').iterdir())}=2", "--run_dir", "c")
    code, _, err = run("train_torch.py", "--config", recipe, *mixed, "--steps", "1")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lines.jsonl",), "--out is required (folder for the tokens"),
        (("books", "--out", "o"), "--data.corpus books: no such corpus"),
        (("nothing.txt", "--out", "o"), "--data.path nothing.txt: no such file"),
        (("lines.jsonl", "--out", "o", "--tokenizer", "words"), "--data.tokenizer words: no such tokenizer"),
        (("lines.jsonl", "--out", "o", "--field", "text"), "line 1 has no such field; it has body"),
        (("lines.jsonl", "--out", "o", "--workers", "0"), "--workers 0: must be 1 or more"),
        (("lines.jsonl", "--out", "o", "--shard_tokens", "0"), "--shard_tokens 0: must be 1 or more"),
        (("lines.jsonl", "--out", "o", "--validation_fraction", "1"), "must be at least 0 and below 1"),
        (("lines.jsonl", "--out", "lines.jsonl", "--field", "body"), "lines.jsonl: can't write there"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, lines, tmp_path, arguments, words):
    code, _, err = run("prepare_data.py", *arguments, *(() if "--tokenizer" in arguments else ("--tokenizer", "bytes")))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]
