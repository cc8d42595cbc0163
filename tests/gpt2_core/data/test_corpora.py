import hashlib
import io
import sysconfig

import pytest

from gpt2_core.config import DataConfig
from gpt2_core.data import corpora
from gpt2_core.data.corpora import get_corpus
from gpt2_core.errors import UserError


def texts(corpus, start=0):
    return ["".join(document.pieces) for document in corpus.documents(start)]


def test_stdlib_is_megabytes_of_python_in_a_fixed_order():
    corpus = get_corpus(DataConfig(corpus="stdlib"))
    assert corpus.files == get_corpus(DataConfig(corpus="stdlib")).files
    assert sum(map(len, texts(corpus))) > 3_000_000
    root = sysconfig.get_paths()["stdlib"]
    assert all(str(path).startswith(root) and "site-packages" not in path.parts for path in corpus.files)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            DataConfig(corpus="books"),
            "--data.corpus books: no such corpus; use stdlib, shakespeare, .* text, jsonl or parquet",
        ),
        (DataConfig(corpus="text"), "name the file, folder or pattern with --data.path"),
        (DataConfig(corpus="text", path="/nowhere.txt"), "--data.path /nowhere.txt: no such file"),
        (DataConfig(corpus="stdlib", path="x.txt"), "add --data.corpus text"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        get_corpus(config)


def test_shakespeare_is_downloaded_once_checked_and_kept(tmp_path, monkeypatch):
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(b"to be")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", urlopen)
    config = DataConfig("shakespeare", validation_fraction=0.0, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="sent a file with another sha256"):
        get_corpus(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SHA256", hashlib.sha256(b"to be").hexdigest())
    assert texts(get_corpus(config)) == texts(get_corpus(config)) == ["to be"]
    assert len(calls) == 2

    def refuse(url, timeout):
        raise OSError("the network is off in this test")

    monkeypatch.setattr(corpora.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="can't be reached .*; put that file at"):
        get_corpus(DataConfig("shakespeare", cache_dir=str(tmp_path / "empty")))
