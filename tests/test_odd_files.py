"""Files that were edited, damaged or made up: whatever reads one returns, or raises a UserError that names the file."""

import dataclasses
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_convert import read_weights, write_weights
from gpt2_core.cli import read_recipe
from gpt2_core.config import DataConfig, ModelConfig, TrainConfig, resolved
from gpt2_core.config.io import from_yaml, to_yaml
from gpt2_core.data.text_files import users_files
from gpt2_core.data.tokens import open_tokens
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import RunFolder, metadata_of, metadata_path, plan_run, read_metadata, read_metrics
from gpt2_core.runs.manifest import damage, write_manifest
from gpt2_core.weights.safetensors import open_tensors
from parity.gpt2.cases import random_weights

MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=257)
CONFIG = TrainConfig(model=MODEL, data=DataConfig("text", "text.txt", "bytes"), batch_size=2, run_dir="run")

# What stands in a file by mistake or malice where a number, a word or a group of settings was.
ODD_VALUES = [
    None,
    True,
    -1,
    0,
    0.5,
    10**400,
    -(10**400),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "a\0b",
    "٣",
    "[/x]",
    "x" * 10_000,
    [],
    [[]],
    {},
    {"a": 1},
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder with whole files, the one that is changed, and what reads it."""

    folder: Path
    name: str
    read: Callable[[Path], object]
    """Takes the folder."""
    dumps: Callable[[object], str] | None = None
    """Writes a changed value; None: only bytes are changed."""
    loads: Callable[[str], object] = json.loads


def a_run(folder: Path) -> None:
    """A run folder with a checkpoint, as far as can be read without a framework."""
    folder.mkdir(parents=True)
    config = resolved(dataclasses.replace(CONFIG, run_dir=str(folder)), precision="float32")
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = [{"step": 0, "split": "val", "loss": 5.5}, {"step": 0, "split": "train", "loss": 5.6, "lr": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = folder / "checkpoints" / "2"
    metadata_path(checkpoint).parent.mkdir(parents=True)
    metadata_path(checkpoint).write_text(json.dumps(metadata_of(config, 2, "torch", "digest")))
    write_manifest(checkpoint)


def resume(folder: Path) -> object:
    run = folder / "run"
    config = resolved(dataclasses.replace(CONFIG, run_dir=str(run), resume="newest"), precision="float32")
    plan = plan_run(config, framework="torch", data_digest="digest")
    plan.begin()
    return RunFolder(run).best_step()


def tokens_of(folder: Path, **data: str) -> object:
    data = {"tokens": str(folder / "tokens"), "tokenizer": "bytes"} | data
    return open_tokens(dataclasses.replace(CONFIG, data=DataConfig(**data))).digest


def every_document(path: Path, kind: str) -> list[str]:
    corpus = users_files(DataConfig(kind, str(path), "bytes"))
    return ["".join(document.pieces) for document in corpus.documents()]


def yaml_dumps(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("whole")
    a_run(folder / "run")
    (folder / "recipe.yaml").write_text("steps: 3\nmodel:\n  n_layer: 2\noptimizer: {learning_rate: 1e-3}\n")
    (folder / "text.txt").write_text("A few words.\n" * 40)
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    text = DataConfig("text", str(folder / "text.txt"), "bytes", cache_dir=str(folder / "cache"))
    open_tokens(dataclasses.replace(CONFIG, data=text)).path.rename(folder / "tokens")
    foreign = folder / "foreign"
    foreign.mkdir()
    for name in ("train.ds", "val.ds"):
        np.arange(200, dtype="<u2").tofile(foreign / name)
        (foreign / f"{name}.metadata").write_text("bytes|2\n200 0.2 K\n")
        np.array([100, 200], "<u8").tofile(foreign / f"{name}.index")
    weights = random_weights(MODEL)
    for form in ("hf", "msgpack"):
        write_weights(weights, folder / form, form)
    write_weights(weights, folder / "weights.safetensors", "safetensors")

    def of_json(name: str, read: Callable[[Path], object]) -> Case:
        return Case(folder, name, read, json.dumps)

    found = {
        "a run's config.yaml": Case(
            folder, "run/config.yaml", lambda f: from_yaml(f / "run/config.yaml"), yaml_dumps, yaml.safe_load
        ),
        "a recipe": Case(folder, "recipe.yaml", lambda f: read_recipe(f / "recipe.yaml"), yaml_dumps, yaml.safe_load),
        "metrics.jsonl": Case(folder, "run/metrics.jsonl", lambda f: read_metrics(f / "run/metrics.jsonl")),
        "metrics.jsonl, resumed": Case(folder, "run/metrics.jsonl", resume),
        "a checkpoint's metadata": of_json(
            "run/checkpoints/2/metadata/metadata", lambda f: read_metadata(f / "run/checkpoints/2")
        ),
        "a checkpoint's manifest": of_json(
            "run/checkpoints/2/manifest.json", lambda f: damage(f / "run/checkpoints/2")
        ),
        "index.json of tokens": of_json("tokens/index.json", tokens_of),
        "verified.json of tokens": of_json("tokens/verified.json", tokens_of),
        "datatrove's metadata": Case(
            folder, "foreign/train.ds.metadata", lambda f: tokens_of(f, tokens=str(f / "foreign"))
        ),
        "datatrove's index": Case(folder, "foreign/train.ds.index", lambda f: tokens_of(f, tokens=str(f / "foreign"))),
        "datatrove's tokens": Case(folder, "foreign/train.ds", lambda f: tokens_of(f, tokens=str(f / "foreign"))),
        "a line of JSONL": Case(
            folder, "rows.jsonl", lambda f: every_document(f / "rows.jsonl", "jsonl"), json.dumps, _first_line
        ),
        "text": Case(folder, "text.txt", lambda f: every_document(f / "text.txt", "text")),
        "config.json of hf": of_json("hf/config.json", lambda f: read_weights(f / "hf")),
        "config.json of msgpack": of_json("msgpack/config.json", lambda f: read_weights(f / "msgpack")),
        "safetensors": Case(folder, "weights.safetensors", lambda f: open_tensors(f / "weights.safetensors")),
    }
    return found


def _first_line(text: str) -> object:
    return json.loads(text.splitlines()[0])


def changed_value(value: object, generator: random.Random) -> object:
    """The value with something in it replaced, added, renamed or left out."""
    if not isinstance(value, dict | list) or not value or generator.random() < 0.2:
        return generator.choice(ODD_VALUES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = generator.choice(list(copy)) if isinstance(copy, dict) else generator.randrange(len(copy))
    match generator.randrange(4):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[generator.choice(["", "a\0b", "x" * 99, key + "s"])] = generator.choice(ODD_VALUES)
        case _:
            copy[key] = changed_value(copy[key], generator)
    return copy


def changed_bytes(content: bytes, generator: random.Random) -> bytes:
    """The bytes with some flipped, left out, doubled or appended, or others instead."""
    place = generator.randrange(len(content) + 1)
    other = generator.randbytes(generator.choice([1, 1, 8, 100]))
    match generator.randrange(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + other + content[place + len(other) :]
        case 2:
            return content[:place] + content[place // 2 :]
        case 3:
            return content + other
        case 4:
            return b"[" * generator.choice([10, 5000]) + content[:place]
        case _:
            return content[:place] + generator.choice([b"9" * 5000, b"\xff", b"\0", b"{", b"\n"]) + content[place:]


def changed(case: Case, generator: random.Random) -> bytes:
    content = (case.folder / case.name).read_bytes()
    if case.dumps is None or generator.random() < 0.4:
        return changed_bytes(content, generator)
    value = changed_value(case.loads(content.decode()), generator)
    try:
        return case.dumps(value).encode()
    except ValueError:  # a number that Python refuses to write
        return content


def survive(case: Case, examples: int) -> None:
    @given(st.randoms(use_true_random=False))
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    def each(generator: random.Random) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "f"
            shutil.copytree(case.folder, folder)
            (folder / case.name).write_bytes(changed(case, generator))
            try:
                case.read(folder)
            except UserError as error:
                assert str(folder) in str(error), error  # it names the file, or the folder that the file belongs to

    each()


NAMES = (
    "a run's config.yaml",
    "a recipe",
    "metrics.jsonl",
    "metrics.jsonl, resumed",
    "a checkpoint's metadata",
    "a checkpoint's manifest",
    "index.json of tokens",
    "verified.json of tokens",
    "datatrove's metadata",
    "datatrove's index",
    "datatrove's tokens",
    "a line of JSONL",
    "text",
    "config.json of hf",
    "config.json of msgpack",
    "safetensors",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [15, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_odd_file_is_read_or_refused_in_a_sentence(cases, name, examples):
    survive(cases[name], examples)


def test_every_file_is_read_as_it_was_written(cases):
    assert tuple(cases) == NAMES
    for case in cases.values():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "f"
            shutil.copytree(case.folder, folder)
            case.read(folder)
