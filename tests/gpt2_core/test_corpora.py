import sysconfig

import pytest

from gpt2_core.config import DataConfig
from gpt2_core.corpora import get_corpus
from gpt2_core.errors import UserError


def test_stdlib_is_megabytes_of_python_in_a_fixed_order():
    corpus = get_corpus(DataConfig(corpus="stdlib"))
    assert corpus.files == get_corpus(DataConfig(corpus="stdlib")).files
    assert sum(map(len, corpus.documents())) > 3_000_000
    root = sysconfig.get_paths()["stdlib"]
    assert all(str(path).startswith(root) and "site-packages" not in path.parts for path in corpus.files)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(corpus="books"), "--data.corpus books: no such corpus; use stdlib or text"),
        (DataConfig(corpus="text"), "name the file with --data.path"),
        (DataConfig(corpus="text", path="/nowhere.txt"), "--data.path /nowhere.txt: no such file"),
        (DataConfig(corpus="stdlib", path="x.txt"), "add --data.corpus text"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        get_corpus(config)


def test_text_that_is_empty_or_not_utf8_is_refused_by_name(tmp_path):
    for name, content, words in (("e.txt", b"", "the file is empty"), ("l.txt", b"caf\xe9", r"byte 3 is 0xe9")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            list(get_corpus(DataConfig(corpus="text", path=str(path))).documents())


def test_the_fingerprint_follows_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint()
    path.write_text("other")
    assert get_corpus(DataConfig(corpus="text", path=str(path))).fingerprint() != before
