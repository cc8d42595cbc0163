import collections
import dataclasses
import random
import re
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2_convert.source
import gpt2_convert.torch_files
from gpt2_convert import FORMATS, Holds, open_weights, read_initial_weights, read_weights, write_weights
from gpt2_core.config import DataConfig, ModelConfig, TrainConfig
from gpt2_core.config.io import to_yaml
from gpt2_core.errors import UserError
from gpt2_core.weights import LazyArrays, Weights
from gpt2_torch.weights import to_state_dict
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)

# Every setting of the architecture, GPT-2's own value first, which is what an example shrinks to.
MODELS = st.builds(
    ModelConfig,
    n_layer=st.integers(1, 2),
    n_head=st.sampled_from([1, 2]),
    n_embd=st.sampled_from([8, 12]),
    block_size=st.integers(1, 9),
    vocab_size=st.one_of(st.integers(1, 260), st.just(128)),
    position=st.sampled_from(["learned"] * 3 + ["rope", "alibi"]),
    mlp=st.sampled_from(["gelu_tanh", "gelu_tanh", "gelu_exact", "swiglu"]),
    mlp_width=st.sampled_from([None, None, 20]),
    norm=st.sampled_from(["layernorm"] * 3 + ["rmsnorm"]),
    bias=st.sampled_from([True, True, False]),
    tie_embeddings=st.sampled_from([True, True, False]),
    qk_norm=st.sampled_from([False] * 3 + [True]),
)


def expected_after(config: ModelConfig, form: str) -> ModelConfig:
    """llm.c's header has no room for what only matters in training."""
    return dataclasses.replace(config, dropout=0.0) if form == "llmc" else config


def identical(a: Weights, b: Weights) -> bool:
    return a.arrays.keys() == b.arrays.keys() and all(
        a.arrays[n].dtype == x.dtype and a.arrays[n].tobytes() == x.tobytes() for n, x in b.arrays.items()
    )


@pytest.mark.long
@given(MODELS, st.sampled_from([np.float32, np.float32, ml_dtypes.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_model_goes_through_any_two_formats_bit_for_bit(config, dtype, seed):
    """Sizes, biases, tying, padding and options are drawn; a format that can't hold the model says which setting."""
    weights = random_weights(config, seed).astype(dtype)
    able = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for form in FORMATS:
            try:
                write_weights(weights, path / f"{form}.safetensors", form)
                able.append(form)
            except UserError as error:
                option = str(error).partition("can't hold ")[2].split(" ")[0]
                assert getattr(config, option) != getattr(ModelConfig(), option), error
        assert {"jax", "torch", "safetensors"} <= set(able)
        for first in able:
            for second in able:
                target = path / "again" / f"{first}-{second}.safetensors"
                write_weights(open_weights(path / f"{first}.safetensors"), target, second)
                back = open_weights(target)
                assert back.config == expected_after(expected_after(config, first), second)
                assert identical(back, weights), (first, second)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("vocab_size", [128, 300, 384])
def test_rows_of_a_padded_vocabulary_survive(tmp_path, form, vocab_size):
    """What the model counts as its vocabulary is kept whole, used or not; a format's own padding stays inside it."""
    weights = random_weights(dataclasses.replace(CONFIG, vocab_size=vocab_size))
    write_weights(weights, tmp_path / "a.safetensors", form)
    back = open_weights(tmp_path / "a.safetensors")
    assert back.config.vocab_size == vocab_size
    assert back.arrays["wte.weight"].tobytes() == weights.arrays["wte.weight"].tobytes()


@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_no_numbers_are_converted_as_they_are(tmp_path, form):
    arrays = dict(random_weights(CONFIG).arrays)
    arrays["h.0.mlp.c_fc.weight"][3, 3:6] = np.array([0x7FC00001, 0xFFC12345, 0x7F800000], np.uint32).view(np.float32)
    weights = Weights(CONFIG, arrays)
    write_weights(weights, tmp_path / "a.safetensors", form)
    assert identical(open_weights(tmp_path / "a.safetensors"), weights)


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_conversion_leaves_what_was_there(tmp_path, form):
    path = tmp_path / "a.safetensors"
    before = random_weights(CONFIG)
    write_weights(before, path, form)

    changed = random_weights(CONFIG, seed=1)
    stored = changed.tensors
    last = "ln_f.bias"

    def interrupt():
        raise KeyboardInterrupt

    stored[last] = dataclasses.replace(stored[last], read=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_weights(dataclasses.replace(changed, arrays=LazyArrays(stored)), path, form, force=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert identical(open_weights(path), before)
    write_weights(changed, path, form, force=True)
    assert identical(open_weights(path), changed)


def test_a_full_disk_is_noticed_before_and_while_writing(tmp_path, monkeypatch):
    weights = random_weights(CONFIG)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="a.safetensors: needs 0.00 GB and the disk has 0.00 GB free; free some space"):
        write_weights(weights, tmp_path / "a.safetensors", "safetensors")
    monkeypatch.undo()

    def full():
        raise OSError(28, "No space left on device")

    stored = weights.tensors
    stored["ln_f.bias"] = dataclasses.replace(stored["ln_f.bias"], read=full)
    for form in FORMATS:
        with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
            write_weights(dataclasses.replace(weights, arrays=LazyArrays(stored)), tmp_path / "a.safetensors", form)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, Path]:
    """A small model in every format, PyTorch's old one too."""
    folder = tmp_path_factory.mktemp("samples")
    weights = random_weights(ModelConfig(1, 2, 8, 8, 20))
    for form in FORMATS:
        write_weights(weights, folder / f"{form}.safetensors", form)
    old = folder / "old"
    old.mkdir()
    shutil.copy(folder / "hf.safetensors" / "config.json", old)
    tensors = {name: torch.from_numpy(array) for name, array in weights.arrays.items()}
    torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.long
@pytest.mark.parametrize("form", [*FORMATS, "old"])
def test_damaged_files_end_in_one_sentence(samples, form, tmp_path, capfd):
    """Truncated anywhere or with bits flipped: read, or refused in a sentence; never another error, never memory for
    what a damaged header promises, never anything printed."""

    read_weights(samples[form])  # whatever is imported for it, isn't counted below

    @given(st.randoms(use_true_random=False))
    @settings(max_examples=60, deadline=None)
    def damage(generator: random.Random):
        copy = tmp_path / "copy"
        whole = samples[form]
        shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)
        try:
            files = sorted(p for p in copy.rglob("*") if p.stat().st_size and p.is_file()) if copy.is_dir() else [copy]
            target = generator.choice(files)
            content = bytearray(target.read_bytes())
            if generator.random() < 0.3:
                del content[generator.randrange(len(content)) :]
            else:
                for _ in range(generator.choice([1, 1, 2, 8])):
                    place = generator.randrange(min(len(content), generator.choice([64, 400, 1 << 30])))
                    content[place] ^= 1 << generator.randrange(8)
            target.write_bytes(content)
            tracemalloc.start()
            try:
                weights = open_weights(copy)
                for name in weights.arrays:
                    weights.arrays[name]
            except UserError as error:
                assert "\n" not in str(error) and "copy" in str(error)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 20_000_000
        finally:
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()

    damage()
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_the_documentation_has_every_format_and_what_it_holds():
    lines = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line.strip("| ")) for line in lines if line.startswith("| `")]
    written_as = {row[0]: row[2] for row in rows if len(row) == 3}
    assert written_as == {f"`{name}`": "folder" if form.is_folder else "file" for name, form in FORMATS.items()}
    answers = {name: row[1:] for row in rows if set(row[1:]) <= {"yes", "no"} for name in row[0].split(", ")}
    layouts = {row[0]: row[1:] for row in rows if len(row) == 6 and not {"yes", "no"} & set(row)}
    assert layouts.keys() == written_as.keys()
    for name, form in FORMATS.items():
        assert answers[f"`{name}`"] == ["yes" if one in form.holds else "no" for one in Holds], name


@pytest.mark.parametrize("form", [*FORMATS, "old"])
def test_each_file_is_parsed_once(samples, form, monkeypatch):
    """By all formats that are asked whether it is theirs and by the one that reads it."""
    parsed = collections.Counter()

    def counted(parse):
        def count(what, *rest):
            parsed[parse.__name__, rest or what] += 1
            return parse(what, *rest)

        return count

    for module, name in (
        (gpt2_convert.source, "open_tensors"),
        (gpt2_convert.source, "read_metadata"),
        (gpt2_convert.source, "json_object"),
        (gpt2_convert.torch_files, "open_torch_file"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    open_weights(samples[form])
    assert set(parsed.values()) <= {1} and (parsed or form == "llmc")


def test_what_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "nothing").touch()
    for path, words in (
        ("a/b/nowhere", "a/b/nowhere: no such file or folder$"),
        ("empty", "holds no weights that this project knows; expected a run folder"),
        ("notes.txt", "holds no weights that this project knows"),
        ("nothing", "holds no weights that this project knows"),
    ):
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / path)


@pytest.mark.parametrize("form", FORMATS)
def test_the_wrong_format_named_is_refused(samples, form):
    for other in FORMATS:
        if other != form:
            with pytest.raises(UserError, match=f"{form}.safetensors"):
                open_weights(samples[form], form=other)


def test_a_checkpoint_is_chosen_of_a_run_folder_only(samples):
    with pytest.raises(UserError, match="--checkpoint best: .* isn't a run folder, so there is one set of weights"):
        open_weights(samples["llmc"], "best")


def test_a_bare_state_dict_is_read_with_its_runs_configuration_beside_it(tmp_path):
    weights = random_weights(CONFIG)
    torch.save(to_state_dict(weights), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"a state dict doesn't say what model it belongs to"):
        open_weights(tmp_path / "model.pt")
    (tmp_path / "config.yaml").write_text(to_yaml(TrainConfig(model=CONFIG)))
    assert identical(open_weights(tmp_path / "model.pt"), weights)


def test_starting_from_another_models_weights_is_refused_with_the_options_to_give(tmp_path):
    write_weights(random_weights(CONFIG), tmp_path / "w.safetensors", "safetensors")
    run = TrainConfig(data=DataConfig(tokenizer="bytes"), init_from=str(tmp_path / "w.safetensors"))
    same = dataclasses.replace(run, model=dataclasses.replace(CONFIG, dropout=0.1))  # dropout is a way of training
    assert read_initial_weights(same) is not None
    with pytest.raises(UserError, match="the tokenizer bytes, this run has gpt2; use --data.tokenizer bytes"):
        read_initial_weights(dataclasses.replace(same, data=DataConfig()))
    other = dataclasses.replace(run, model=dataclasses.replace(CONFIG, block_size=32, bias=False))
    words = (
        "have block_size 16 where this run has 32, bias True where this run has False; "
        "add --model.block_size 16 --model.bias true"
    )
    with pytest.raises(UserError, match=words):
        read_initial_weights(other)
