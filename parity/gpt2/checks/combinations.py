"""Check `combinations`: options together, two by two: every architecture executed in every way, in float64.

A row of the table below is a model and a way of executing it. Each row trains on batches whose targets count unevenly,
the reference given the candidate's dropout masks, evaluates, and decodes with a KV cache. `parity.engine.covering`
chooses rows so that few of them bring many pairs of options together; `--full` brings together all.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from gpt2_core.config import IGNORE_INDEX, ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_core.sampling import Sampling
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.covering import Row, all_pairs, covering_rows, pairs_of
from parity.engine.evidence import Coverage
from parity.engine.results import Result, Skipped, relative_norm, relative_to_largest
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import (
    DECODING,
    DROPOUT,
    GENERATION,
    GIVEN_MASKS,
    INTERMEDIATES,
    MESH,
    TRAINING,
    Adapter,
    Trained,
)
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks import gradients
from parity.gpt2.naming import first_beyond

STEPS = 2
BATCH_SIZE = 8

# What each option changes, its most demanding value first. Those of EXECUTION change no result beyond rounding.
MODEL: dict[str, dict[str, dict]] = {
    "position": {
        "rope interleaved, base 100": {"position": "rope", "rope_pairs": "interleaved", "rope_theta": 100.0},
        "learned positions": {},
        "rope": {"position": "rope"},
        "alibi": {"position": "alibi"},
    },
    "mlp": {"swiglu": {"mlp": "swiglu"}, "tanh gelu": {}, "exact gelu": {"mlp": "gelu_exact"}},
    "norm": {"rms norm": {"norm": "rmsnorm"}, "layer norm": {}},
    "biases": {"no biases": {"bias": False}, "biases": {}},
    "head": {"untied head": {"tie_embeddings": False}, "tied head": {}},
    "query and key norm": {"qk norm": {"qk_norm": True}, "no qk norm": {}},
    "mlp width": {"mlp 40 wide": {"mlp_width": 40}, "mlp of default width": {}},
    "epsilon": {"epsilon 1e-2": {"layer_norm_epsilon": 1e-2}, "epsilon 1e-5": {}},
    "layers": {"2 layers": {"n_layer": 2}, "1 layer": {"n_layer": 1}},
    "heads": {"4 heads": {"n_head": 4}, "2 heads": {"n_head": 2}},
    "width": {"24 wide": {"n_embd": 24}, "16 wide": {"n_embd": 16}},
    # Attention computes 64 queries in four blocks, and 11 in one.
    "block": {"block 11": {"block_size": 11}, "block 64": {"block_size": 64}},
    "vocabulary": {"vocabulary 257": {"vocab_size": 257}, "vocabulary 256": {"vocab_size": 256}},
    "dropout": {"dropout 0.2": {"dropout": 0.2}, "no dropout": {}},
}
EXECUTION: dict[str, dict[str, dict]] = {
    "mesh": {
        "fsdp=2": {"mesh": "fsdp=2"},
        "data=2,fsdp=2,tensor=2": {"mesh": "data=2,fsdp=2,tensor=2"},
        "1 device": {"mesh": 1},
        "data=2, exchange in bfloat16": {"mesh": "data=2", "gradient_exchange": "bfloat16"},
        "tensor=2": {"mesh": "tensor=2"},
        "data=4": {"mesh": "data=4"},
        "fsdp=2, exchange in bfloat16": {"mesh": "fsdp=2", "gradient_exchange": "bfloat16"},
    },
    "accumulation": {"accumulation 2": {"accumulation": 2}, "one part": {}},
    "layers run": {"scan": {"scan_layers": True}, "unrolled": {}},
    "rematerialisation": {"remat": {"remat": True}, "no remat": {}},
    "attention": {"recompute": {"attention": "recompute"}, "xla": {"attention": "xla"}},
}
TABLE = {option: list(values) for option, values in (MODEL | EXECUTION).items()}


def rows_of(case: Case) -> list[Row]:
    """The rows that a level runs: the first of those that together cover every pair."""
    rows = covering_rows(TABLE)
    return rows[: case.at(1, 3, len(rows))]


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    asked = [(candidate, TRAINING), (reference, TRAINING), (candidate, MESH), (candidate, DECODING)]
    asked += [(candidate, DROPOUT), (reference, GIVEN_MASKS)]
    if skipped := lacking("combinations", "options two by two", *asked):
        yield skipped
    else:
        yield from _rows(case, candidate, reference)
    for head in case.at((), ("tied", "untied")):
        yield bfloat16_tokens(case, candidate, head)


def _rows(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    ran = []
    for number, row in enumerate(rows_of(case), start=1):
        mesh = config_of(row).mesh
        needed, there = candidate.devices_of(mesh), candidate.devices()
        if needed > there:
            yield Skipped("combinations", f"mesh {mesh}: needs {needed} devices and there are {there}")
            continue
        results = list(_row(case, candidate, reference, number, row))
        ran.append(row)
        covered = f"{len(pairs_of(ran))} of {len(all_pairs(TABLE))} pairs of options have met"
        yield from (dataclasses.replace(r, where=r.where or (covered if r.passed else "")) for r in results)
    case.evidence["combinations"] = Coverage(ran, len(pairs_of(ran)), len(all_pairs(TABLE)))


def config_of(row: Row) -> TrainConfig:
    """The model and the way of executing it that a row names."""
    return TrainConfig(
        model=ModelConfig(**_merged(MODEL, row)),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1, clip_norm=0.3),
        steps=STEPS,
        batch_size=BATCH_SIZE,
        precision="float64",
        **_merged(EXECUTION, row),
    )


def _merged(options: dict[str, dict[str, dict]], row: Row) -> dict:
    return functools.reduce(lambda merged, name: merged | options[name][row[name]], options, {})


def _row(case: Case, candidate: Adapter, reference: Adapter, number: int, row: Row) -> Iterator[Result]:
    config = config_of(row)
    weights = random_weights(dataclasses.replace(config.model, dropout=0.0), seed=case.seed + number, dtype=np.float64)
    batches = [uneven_batch(case, config.model, step) for step in range(STEPS)]
    ours, theirs = candidate.make(weights), reference.make(weights)
    if case.runs("training"):
        yield from _trained(case, ours, theirs, f"row {number}", row, batches)
    if case.level != "quick" and case.runs("decoding"):
        yield from _decoded(ours, theirs, f"row {number}", batches[0].inputs[:2])


def _trained(
    case: Case, ours: Adapter, theirs: Adapter, title: str, row: Row, batches: list[Batch]
) -> Iterator[Result]:
    config = config_of(row)
    if config.model.dropout > 0:
        b = theirs.train_with_masks(config, batches, ours.dropout_masks(config, batches).steps)
    else:
        b = theirs.train(config, batches)
    exact = dataclasses.replace(config, gradient_exchange="float32")
    a = ours.train(exact, batches)
    measured, where = first_difference(a, b, limits.STEP)
    if not measured <= limits.STEP:
        where += explained(case, ours, theirs)
    name = ", ".join(row.values())
    yield Result("combinations", f"{title}, {STEPS} training steps: {name}", measured, limits.STEP, where)
    if case.level == "quick":
        return

    evaluated, expected = ours.evaluate(config, batches[0]), theirs.loss_and_grads(batches[0], 1)[0]
    difference = abs(evaluated - expected) / expected
    yield Result("combinations", f"{title}, evaluation on the mesh", difference, limits.FORWARD)

    if config.gradient_exchange == "bfloat16":
        # The first gradient of either run is that of the same parameters; it is (1 - beta1) of it that the first
        # moment holds after a step.
        rounded = ours.train(config, batches[:1])
        whole = ours.train(exact, batches[:1])
        # Each device's part is rounded: where the parts cancel, their sum is less exact than any of them.
        cancelled = _cancellation(theirs, batches[0], config.accumulation)
        differences = {
            n: relative_norm(rounded.first_moments[n], m) / cancelled[n] for n, m in whole.first_moments.items()
        }
        worst = max(differences, key=lambda n: np.nan_to_num(differences[n], nan=np.inf))
        where = f"largest in {worst}, relative to the two devices' parts ({cancelled[worst]:.2f} times the sum)"
        exchanged = f"{title}, gradients exchanged in bfloat16"
        yield Result("combinations", exchanged, differences[worst], limits.BFLOAT16_EXCHANGE, where)


def _decoded(ours: Adapter, theirs: Adapter, title: str, tokens_BT: np.ndarray) -> Iterator[Result]:
    """With a KV cache, half of the tokens given at once and the others one by one."""
    T = tokens_BT.shape[1]
    pieces = [T // 2, *[1] * (T - T // 2)]
    decoded = ours.decoded_logits(tokens_BT, pieces)
    for against, logits in ((theirs.name, theirs.logits(tokens_BT)), ("recomputation", ours.logits(tokens_BT))):
        differences = [relative_to_largest(decoded[:, t], logits[:, t]) for t in range(T)]
        first = next((t for t, difference in enumerate(differences) if not difference <= limits.FORWARD), None)
        where = "" if first is None else f"first at position {first}, of {pieces[0]} given at once"
        yield Result(
            "combinations", f"{title}, KV cache against {against}", float(np.max(differences)), limits.FORWARD, where
        )


def _cancellation(reference: Adapter, batch: Batch, accumulation: int) -> dict[str, float]:
    """Of each gradient: the norms of its two parts, one from each device's sequences, over the norm of their sum; at
    least 1. Of the model without dropout, whose masks the reference's `loss_and_grads` doesn't take."""
    rows = np.arange(BATCH_SIZE).reshape(accumulation, 2, -1)
    count = np.sum(batch.targets != IGNORE_INDEX)
    parts = []
    for device in (0, 1):
        mine = rows[:, device].ravel()
        part = Batch(batch.inputs[mine], batch.targets[mine])
        share = np.sum(part.targets != IGNORE_INDEX) / count
        parts.append({n: share * g for n, g in reference.loss_and_grads(part, 1)[1].items()} if share else {})
    whole = reference.loss_and_grads(batch, 1)[1]
    sizes = {n: sum(np.linalg.norm(p[n]) for p in parts if p) for n in whole}
    return {n: max(1.0, float(sizes[n] / (np.linalg.norm(g) or 1.0))) for n, g in whole.items()}


def first_difference(a: Trained, b: Trained, limit: float) -> tuple[float, str]:
    """The largest relative difference of two trainings, and the first value beyond `limit`: by step the loss, then the
    gradient norm; at the end both moments and the parameters."""
    found = {}
    for step in range(len(b.losses)):
        found[f"step {step}, loss"] = abs(a.losses[step] - b.losses[step]) / abs(b.losses[step])
        found[f"step {step}, gradient norm"] = abs(a.grad_norms[step] - b.grad_norms[step]) / b.grad_norms[step]
    for what, x, y in (
        ("first moment", a.first_moments, b.first_moments),
        ("second moment", a.second_moments, b.second_moments),
        ("parameter", a.params, b.params),
    ):
        found |= {f"after the last step, {what} {name}": relative_norm(x[name], y[name]) for name in y}
    first = next((name for name, difference in found.items() if not difference <= limit), None)
    worst = float(np.max(list(found.values())))
    return worst, "" if first is None else f"{first}: relative difference {found[first]:.1e}"


def explained(case: Case, candidate: Adapter, reference: Adapter) -> str:
    """Whether the model is to blame for a training that differs, or how it was executed: the first value in which its
    forward pass differs, else what `gradients` says, without dropout, on one device, its layers unrolled."""
    weights = candidate.weights
    tokens = case.tokens % weights.config.vocab_size
    tokens_BT = tokens[: 2 * weights.config.block_size].reshape(2, -1)
    if INTERMEDIATES.of(candidate) and INTERMEDIATES.of(reference):
        values = (adapter.intermediates(tokens_BT) for adapter in (candidate, reference))
        found = divergence.compare(*values, (candidate.name, reference.name))
        if not divergence.worst_of(found) <= limits.FORWARD:
            return f"; forward: {first_beyond(found, limits.FORWARD)}"
    plain = dataclasses.replace(case, weights=weights, tokens=tokens)
    results = gradients.compare(candidate, reference, gradients.uneven_batch(plain), 1, watched=False)
    where = next((r.where for r in results if not r.passed), None)
    if where is not None:
        return f"; gradients: {where}"
    return "; forward pass and gradients of this model agree, executed plainly"


def uneven_batch(case: Case, model: ModelConfig, step: int) -> Batch:
    """Eight sequences of the text with ends of text in them. Of the first no target counts, of the others unevenly
    many: a mean over the wrong number shows only then, on a mesh and in accumulated parts."""
    T = model.block_size
    start = step * BATCH_SIZE * T
    windows = case.tokens[start : start + BATCH_SIZE * T + 1] % model.vocab_size
    windows[7 :: 2 * T + 3] = model.vocab_size - 1
    targets = windows[1:].reshape(BATCH_SIZE, T).copy()
    for row in range(BATCH_SIZE):
        targets[row, : T * (BATCH_SIZE - 1 - row) // (BATCH_SIZE - 1)] = IGNORE_INDEX
    return Batch(windows[:-1].reshape(BATCH_SIZE, T).astype(np.int32), targets.astype(np.int32))


def bfloat16_tokens(case: Case, candidate: Adapter, head: str) -> Result | Skipped:
    """In bfloat16 a candidate may narrow the weights before it generates; embeddings stay as they are though a tied
    head is narrowed. The likeliest tokens are those of a forward pass from the weights as they are, in the same
    dtype."""
    if skipped := lacking("combinations", f"bfloat16 tokens, {head} head", (candidate, GENERATION)):
        return skipped
    if candidate.device != "cpu":
        return Skipped(
            "combinations", "bfloat16 tokens: an accelerator's kernels sum in another order at other lengths"
        )
    T = 32
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=257, tie_embeddings=head == "tied")
    lengths = [1 + number % 8 for number in range(32)]
    prompts = [(case.tokens[97 * n :][:length] % 257).tolist() for n, length in enumerate(lengths)]
    with jax.enable_x64(False):
        narrow = candidate.make(random_weights(config), "bfloat16")
        count = T - max(lengths)
        tokens = narrow.generate(prompts, np.zeros((len(prompts), count)), Sampling(greedy=True)).tolist()
        contexts = [[*prompt, *new, *[0] * T][:T] for prompt, new in zip(prompts, tokens, strict=True)]
        logits_BTV = narrow.logits(np.array(contexts, np.int32))
    expected = [logits_TV[n - 1 : n - 1 + count].argmax(-1) for n, logits_TV in zip(lengths, logits_BTV, strict=True)]
    differing = np.argwhere(np.array(tokens) != np.array(expected))
    where = f"first at prompt {differing[0][0]}, token {differing[0][1]}" if len(differing) else ""
    title = f"bfloat16, {head} head: narrowed weights against a forward pass, {len(prompts)} prompts x {count} tokens"
    return Result("combinations", title, float(len(differing)), limits.TOKENS, where)
