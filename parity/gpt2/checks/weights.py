"""Check `weights`: every way from the canonical form through a framework or a file and back is bitwise, and keeps the
architecture; what a format can't hold it refuses."""

import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from gpt2_convert import FORMATS, Holds, open_weights, read_weights, write_weights
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.config.io import differences, to_yaml
from gpt2_core.data.tokenizer import local_file
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import RunFolder
from gpt2_core.weights import DTYPES, Weights
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits, raw_files
from parity.gpt2.adapters.protocol import ROUND_TRIP, Adapter
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks import variants

RoundTrips = dict[str, Callable[[Weights], Weights]]

# Of sizes at which names sorted as text go wrong (h.10 before h.2) and the vocabulary is padded.
_DEEP = ModelConfig(n_layer=11, n_head=2, n_embd=8, block_size=6, vocab_size=130)
_UNTIED = "GPT-2 with every number of its own, exact GELU, an untied head"
# Models that the case is not: architecture, dtype, and what a format must hold to take it; the others refuse it.
MODELS: dict[str, tuple[ModelConfig, str, Holds]] = {
    "11 layers in float64": (_DEEP, "float64", Holds.FLOAT64),
    "11 layers in bfloat16": (_DEEP, "bfloat16", Holds(0)),
    "every option in float64": (
        ModelConfig(
            n_layer=1,
            n_head=3,
            n_embd=18,
            block_size=7,
            vocab_size=128,
            dropout=0.25,
            layer_norm_epsilon=0.03,
            position="rope",
            rope_theta=50.0,
            rope_pairs="interleaved",
            mlp="swiglu",
            mlp_width=20,
            norm="rmsnorm",
            bias=False,
            tie_embeddings=False,
            qk_norm=True,
        ),
        "float64",
        ~Holds(0),
    ),
    _UNTIED: (
        ModelConfig(
            n_layer=1,
            n_head=3,
            n_embd=18,
            block_size=7,
            vocab_size=129,
            layer_norm_epsilon=0.03,
            mlp="gelu_exact",
            mlp_width=20,
            tie_embeddings=False,
        ),
        "float32",
        Holds.SIZES | Holds.EXACT_GELU,
    ),
    "exact GELU, no biases": (
        ModelConfig(n_layer=1, n_head=3, n_embd=18, block_size=7, vocab_size=129, mlp="gelu_exact", bias=False),
        "bfloat16",
        Holds.NO_BIASES | Holds.EXACT_GELU,
    ),
    "11 layers in float32": (_DEEP, "float32", Holds(0)),
}


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    in_memory = {}
    for adapter in (candidate, reference):
        if skipped := lacking("weights", "there and back", (adapter, ROUND_TRIP)):
            yield skipped
        else:
            in_memory[f"{adapter.name} {adapter.container}"] = adapter.round_trip
    if case.runs("these weights"):
        yield from _these(case, in_memory)
    if case.runs("other models"):
        for name in case.at(list(MODELS)[:5], MODELS):
            yield _model(in_memory, name, *MODELS[name])
    parts: dict[str, Callable[[], Result]] = {
        "one setting": _one_by_one,
        "files as others read them": lambda: _raw("11 layers in bfloat16", list(raw_files.READERS)),
        "an untied head as others read it": lambda: _raw(_UNTIED, ["safetensors", "torch", "hf", "msgpack"]),
        "files as others write them": _foreign,
        "contradictions": _contradicting,
        "activations": _activations,
        "defaults of config.json": _left_out,
        "tokenizers": _tokenizers,
        "nanoGPT's GELU": _gelu_of_nanogpt,
        "a run's checkpoints": _chosen_checkpoints,
    }
    for name in filter(case.runs, parts):
        yield parts[name]()


def _these(case: Case, in_memory: RoundTrips) -> Iterator[Result | Skipped]:
    """The weights compared, through all that holds them."""
    weights = case.weights
    for name, round_trip in in_memory.items():
        yield _compare(name, weights, round_trip(weights))
    with tempfile.TemporaryDirectory() as folder:
        able = []
        for form in FORMATS:
            try:
                _write(weights, folder, form)
                able.append(form)
            except UserError as error:
                yield Skipped("weights", f"{form}: {error}")
        for form in able:
            yield _compare(f"{form} file", weights, _open(folder, form))
        # Through any two: each format writes what every other has read.
        for first in case.at((), able):
            yield _through(folder, first, able, weights)


def _one_by_one() -> Result:
    """GPT-2 with one setting changed at a time: a format holds it or refuses it, whatever else it could hold."""
    small = ModelConfig(n_layer=1, n_head=3, n_embd=18, block_size=7, vocab_size=129)
    changes = {name: options for name, options in variants.OPTIONS.items() if name != "all at once"}
    changes |= {f"epsilon {epsilon}": {"layer_norm_epsilon": epsilon} for epsilon in (1e-6, 0.03)}
    changes |= {"MLP 20 wide": {"mlp_width": 20}, "base 50": {"position": "rope", "rope_theta": 50.0}}
    lost, pairs = [], 0
    for name, options in changes.items():
        weights = _awkward(dataclasses.replace(small, **options), "float32")
        for form in FORMATS:
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
                _write(weights, folder, form)
                found = _compare(form, weights, _open(folder, form))
                lost += [] if found.passed else [f"{form}: {name}: {found.where}"]
                pairs += 1
    title = f"{len(changes)} settings, one at a time, in each format: {pairs} kept, the others refused"
    return Result("weights", title, float(len(lost)), limits.BYTES, lost[0] if lost else "")


def _activations() -> Result:
    """Files that transformers wrote, or might: every name it has for an activation that is one of ours."""
    wrong = []
    for name, mlp in raw_files.ACTIVATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = _path(folder, "hf")
            _write(_awkward(dataclasses.replace(_DEEP, n_layer=1, mlp=mlp), "float32"), folder, "hf")
            settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
            written = settings["activation_function"]
            wrong += [] if raw_files.ACTIVATIONS[written] == mlp else [f"{mlp} is written as {written}"]
            (path / "config.json").write_text(json.dumps(settings | {"activation_function": name}), encoding="utf-8")
            found = open_weights(path).config.mlp
            wrong += [] if found == mlp else [f"{name} is read as {found}, and is {mlp}"]
    title = f"hf: {', '.join(raw_files.ACTIVATIONS)}"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _left_out() -> Result:
    """config.json with one setting left out, which transformers then takes from GPT2Config."""
    wrong = []
    for key, (setting, default) in raw_files.HF_DEFAULTS.items():
        small = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 3, "vocab_size": 5, "layer_norm_epsilon": 0.03}
        small |= {"mlp": "gelu_exact", "mlp_width": 6, "tie_embeddings": False}
        small |= {"n_embd": 12} if setting == "n_head" else {}
        config = ModelConfig(**small | {setting: default})
        with tempfile.TemporaryDirectory() as folder:
            _write(random_weights(config), folder, "hf")
            path = _path(folder, "hf") / "config.json"
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings.pop(key, None)
            path.write_text(json.dumps(settings), encoding="utf-8")
            try:
                found = getattr(open_weights(_path(folder, "hf")).config, setting)
                wrong += [] if found == default else [f"without {key}, {setting} is read as {found}, not {default}"]
            except UserError as error:
                wrong.append(f"without {key}: {error}")
    title = f"hf: config.json without one of {', '.join(raw_files.HF_DEFAULTS)}"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _tokenizers() -> Result:
    """The tokenizers' names through every format but llm.c's, which has no place for it."""
    small = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=3, vocab_size=5)
    wrong, formats = [], [form for form in FORMATS if form != "llmc"]
    # The formats of transformers hold the end-of-text's id too, for which the tokenizer's files are read.
    names = (None, "bytes", *(name for name in ("gpt2",) if local_file(name, "vocab.bpe")))
    for form, name in itertools.product(formats, names):
        with tempfile.TemporaryDirectory() as folder:
            _write(dataclasses.replace(random_weights(small), tokenizer=name), folder, form)
            found = _open(folder, form).tokenizer
            wrong += [] if found == name else [f"{form}: the tokenizer {name} becomes {found}"]
    title = f"tokenizers' names through {', '.join(formats)}"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _gelu_of_nanogpt() -> Result:
    """Which GELU a checkpoint is read with: as asked for, else as the file says, else as its program computes."""
    config, wrong = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=3, vocab_size=5), []
    forms = ("gelu_exact", "gelu_tanh")
    writers = {"nanoGPT": raw_files.nanogpt, "build-nanogpt": raw_files.build_nanogpt}
    writers |= {f"this project, {mlp}": functools.partial(write_weights, to="nanogpt") for mlp in forms}
    for (program, write), asked in itertools.product(writers.items(), (None, *forms)):
        said = next((mlp for mlp in forms if program.endswith(mlp)), None)
        weights = random_weights(dataclasses.replace(config, mlp=said or "gelu_tanh"))
        with tempfile.TemporaryDirectory() as folder:
            write(weights, Path(folder) / "ckpt.pt")
            found = open_weights(Path(folder) / "ckpt.pt", mlp=asked).config.mlp
            due = asked or said or raw_files.NANOGPT_MLP[program]
            wrong += [] if found == due else [f"{program}, asked for {asked}: {found} where {due} is due"]
    title = "nanogpt: the GELU of checkpoints that do and don't record it, asked for and not"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _chosen_checkpoints() -> Result:
    """A run's checkpoints by their numbers, the latest, and the best by its log."""
    config, wrong = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=3, vocab_size=257), []
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        folder.config.write_text(to_yaml(TrainConfig(model=config)), encoding="utf-8")
        rows = [{"split": "val", "step": step, "loss": loss} for step, loss in ((2, 3.0), (9, 1.0), (10, 2.0))]
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        saved = {step: random_weights(config, seed=step) for step in (2, 9, 10)}
        for step, weights in saved.items():
            with jax.enable_x64(False):
                write_weights(weights, folder.checkpoints / str(step), "torch")
        for choice, due in {"latest": 10, "best": 9, "2": 2, "9": 9, "10": 10}.items():
            for way, read in (("opened", open_weights), ("read", read_weights)):
                found = read(folder.path, choice).arrays["wte.weight"]
                is_due = np.array_equal(found, saved[due].arrays["wte.weight"])
                wrong += [] if is_due else [f"--checkpoint {choice}, {way}: not the weights of step {due}"]
    title = "a run's checkpoints: latest, best and by number"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _raw(name: str, formats: Sequence[str]) -> Result:
    """The files as other programs see them."""
    config, dtype, _ = MODELS[name]
    weights, differing = _awkward(config, dtype), []
    for form in formats:
        with tempfile.TemporaryDirectory() as folder:
            _write(weights, folder, form)
            found, due = raw_files.READERS[form](_path(folder, form)), raw_files.expected(weights, form)
        differing += [f"{form}: {n}" for n in found | due if found.get(n) != due.get(n)]
    title = f"{name}: the files of {', '.join(formats)}, read by other means"
    return Result("weights", title, float(len(differing)), limits.BYTES, differing[0] if differing else "")


def _foreign() -> Result:
    """Files that other programs wrote, which read and write in ways that nothing here does."""
    weights, wrong = _awkward(_DEEP, "float32"), []
    for name, write in raw_files.WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(weights, Path(folder) / "written")
            try:
                back = open_weights(Path(folder) / "written", mlp="gelu_tanh" if "nanoGPT" in name else None)
                found = _compare(name, weights, back)
                wrong += [] if found.passed else [f"{name}: {found.where}"]
            except UserError as error:
                wrong.append(f"{name}: {error}")
    title = f"{len(raw_files.WRITERS)} files as other programs leave them"
    return Result("weights", title, float(len(wrong)), limits.BYTES, wrong[0] if wrong else "")


def _contradicting() -> Result:
    """Files whose tensors aren't those of their configuration: reading any of them would lose a part."""
    weights, taken = _awkward(dataclasses.replace(_DEEP, n_layer=2), "float32"), []
    for name, write in raw_files.CONTRADICTING.items():
        with tempfile.TemporaryDirectory() as folder:
            write(weights, Path(folder) / "written")
            try:
                open_weights(Path(folder) / "written", mlp="gelu_tanh" if "nanoGPT" in name else None).in_memory()
                taken.append(name)
            except UserError:
                pass
    title = f"{len(raw_files.CONTRADICTING)} files that contradict their configuration are refused"
    return Result("weights", title, float(len(taken)), limits.NONE, taken[0] if taken else "")


def _model(in_memory: RoundTrips, name: str, config: ModelConfig, dtype: str, needs: Holds) -> Result:
    """A model through everything that holds it; whatever else takes it has lost something."""
    weights = _awkward(config, dtype)
    ways = [_compare(way, weights, round_trip(weights)) for way, round_trip in in_memory.items()]
    refused = []
    for form in FORMATS:
        holds = needs in FORMATS[form].holds
        with tempfile.TemporaryDirectory() as folder:
            try:
                _write(weights, folder, form)
                found = _compare(form, weights, _open(folder, form))
            except UserError as error:
                refused.append(form)
                lost = float(weights.nbytes) if holds else 0.0
                found = Result("weights", form, lost, limits.BYTES, str(error))
            else:
                if not holds:
                    found = Result("weights", form, float(weights.nbytes), limits.BYTES, "is taken, and can't be held")
        ways.append(found)
    where = next((f"{way.case}: {way.where}" for way in ways if not way.passed), "")
    by = f", refused by {', '.join(refused)}" if refused else ""
    title = f"{name}: {len(ways) - len(refused)} round trips{by}"
    return Result("weights", title, sum(way.measured for way in ways), limits.BYTES, where)


def _awkward(config: ModelConfig, dtype: str) -> Weights:
    """Weights of a dtype that no narrower one can hold, with numbers in every tensor that a careless conversion
    changes: a negative zero, the smallest and the largest."""
    weights = random_weights(config, dtype=np.float64).astype(DTYPES[dtype])
    info = ml_dtypes.finfo(DTYPES[dtype])
    for array in weights.arrays.values():
        array.reshape(-1)[:3] = (-0.0, info.smallest_subnormal, info.max)
    return weights


def _through(folder: str, first: str, formats: list[str], weights: Weights) -> Result:
    """Weights that have been a file of the format `first`, through each of the others."""
    differing, where = 0.0, ""
    for second in formats:
        with tempfile.TemporaryDirectory() as again:
            _write(_open(folder, first), again, second)
            found = _compare(second, weights, _open(again, second))
        differing += found.measured
        where = where or (f"{second}: {found.where}" if found.measured else "")
    return Result("weights", f"{first} file, then each of {', '.join(formats)}", differing, limits.BYTES, where)


def _path(folder: str, form: str) -> Path:
    return Path(folder) / f"{form}.safetensors"


def _write(weights: Weights, folder: str, form: str) -> None:
    # As convert.py does: JAX's float64 is off there, and on in this suite.
    with jax.enable_x64(False):
        write_weights(weights, _path(folder, form), form)


def _open(folder: str, form: str) -> Weights:
    with jax.enable_x64(False):
        return open_weights(_path(folder, form))


def _compare(name: str, weights: Weights, back: Weights) -> Result:
    differing = {n: _differing_bytes(weights.arrays[n], back.arrays[n]) for n in back.arrays}
    first = next((n for n, count in differing.items() if count), "")
    # Dropout is a way of training, which not every format says.
    for setting, ours, theirs in differences(weights.config, back.config, frozenset({"dropout"})):
        differing[setting] = weights.nbytes
        first = f"{setting} {ours} becomes {theirs}"
    return Result("weights", name, float(sum(differing.values())), limits.BYTES, first)


def _differing_bytes(a: np.ndarray, b: np.ndarray) -> int:
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.nbytes, b.nbytes)
    return int((np.frombuffer(a.tobytes(), np.uint8) != np.frombuffer(b.tobytes(), np.uint8)).sum())
