import json
import time

import pytest

from gpt2_core.config import DataConfig
from gpt2_core.data import hub
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.documents import UnreachableError
from gpt2_core.errors import UserError


def texts(corpus, start=0):
    return ["".join(document.pieces) for document in corpus.documents(start)]


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Corpora of the hub's shape, in folders: `datasets` reads those as it reads the hub's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def make(name, **splits):
        folder = tmp_path / name
        folder.mkdir()
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        monkeypatch.setitem(hub.DATASETS, name, hub.DATASETS[name]._replace(dataset=str(folder), config=None))
        return get_corpus(DataConfig(name))

    return make


@pytest.mark.parametrize("name", ["openwebtext", "tinystories"])
def test_a_corpus_of_the_hub_is_read_from_any_document_on(on_the_hub, name):
    rows = [f"text {i}" for i in range(50)]
    with_validation = name == "tinystories"
    corpus = on_the_hub(name, train=rows[:40], **({"validation": rows[40:]} if with_validation else {}))
    expected = rows if with_validation else rows[:40]
    assert texts(corpus) == expected
    assert texts(corpus, start=17) == expected[17:]
    splits = {document.split for document in corpus.documents()}
    assert splits == ({"train", "val"} if with_validation else {None})


def test_wikitexts_lines_are_joined_into_articles(on_the_hub):
    lines = ["", " = One = \n", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " end \n"]
    corpus = on_the_hub("wikitext2", train=lines, validation=lines[1:3])
    articles = ["".join(lines[1:5]), "".join(lines[5:])]
    assert [t for t in texts(corpus) if t] == [*articles, "".join(lines[1:3])]
    assert texts(corpus, start=1) == texts(corpus)[1:]


def test_without_a_network_a_corpus_of_the_hub_is_looked_for_in_the_cache_alone(
    server, url_of, no_proxy_set, monkeypatch
):
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    url, offline = url_of(server), []

    def load(*_, **__):
        offline.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": ["cached"]})

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(get_corpus(DataConfig("openwebtext"))) == ["cached"]
    server.close()
    assert texts(get_corpus(DataConfig("openwebtext"))) == ["cached"]
    assert offline == [(False, False), (True, True)]
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["openwebtext", "wikitext2"])  # one is streamed
def test_without_a_network_it_is_said_at_once(name, server, url_of, no_proxy_set, tmp_path, monkeypatch):
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url_of(server))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("tried again"))
    server.close()
    with pytest.raises(UnreachableError, match=f"--data.corpus {name}: .*refused.*; check the network"):
        texts(get_corpus(DataConfig(name)))


def test_without_the_network_or_the_extra_it_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(hub, "network_error", lambda url: None)
    with pytest.raises(UnreachableError, match=r"--data.corpus openwebtext: .* \(no route\); check the network"):
        texts(get_corpus(DataConfig("openwebtext")))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2-jax\[data\]'"):
        get_corpus(DataConfig("openwebtext"))


def test_the_fingerprint_that_prepared_tokens_record_stays_the_same():
    """With another they would be taken for tokens of another corpus."""
    pytest.importorskip("datasets")
    fingerprint = get_corpus(DataConfig("openwebtext")).fingerprint()
    assert fingerprint == "ab511aac606f86e661b826b78c0e57058864c9f95871381cafaf86215feae2b0"
