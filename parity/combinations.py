"""Check `combinations`: options together, two by two: every architecture executed in every way, in float64.

A row of the table below is a model and a way of executing it. Each row trains on batches whose targets count unevenly,
with PyTorch given JAX's dropout masks, evaluates, and decodes with a KV cache. `parity.covering` chooses rows so that
few of them bring many pairs of options together; `--full` brings together all.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

import gpt2_jax.train
import gpt2_jax.train_step
from gpt2_core.batches import IGNORED, Batch
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig, parse_mesh
from gpt2_core.sampling import Sampling
from gpt2_core.weights import Weights
from gpt2_jax.sharding import make_mesh
from parity import forward, gradients, places
from parity.covering import Row, all_pairs, covering_rows, pairs_of
from parity.sides import JaxSide, TorchSide, Trained
from parity.subjects import random_weights
from parity.suite import Result, Skipped, Subject, relative_norm, relative_to_largest

LIMIT = 1e-10  # of parameters and moments after AdamW steps, as in `optimizer`; losses and norms stay far below
LIMIT_LOGITS = 1e-12  # as in `forward`
# A bfloat16 has 8 bits of mantissa: what is sent is rounded by at most 2^-9 of itself, and the sum once more.
LIMIT_BFLOAT16 = 2.0**-8
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


def rows_of(subject: Subject) -> list[Row]:
    """The rows that a level runs: the first of those that together cover every pair."""
    rows = covering_rows(TABLE)
    return rows[: subject.at(1, 3, len(rows))]


def check(subject: Subject) -> Iterator[Result | Skipped]:
    ran = []
    for number, row in enumerate(rows_of(subject), start=1):
        mesh = config_of(row).mesh
        needed = math.prod(parse_mesh(mesh).values())
        if needed > len(jax.devices()):
            yield Skipped("combinations", f"mesh {mesh}: needs {needed} devices and there are {len(jax.devices())}")
            continue
        results = list(_row(subject, number, row))
        ran.append(row)
        covered = f"{len(pairs_of(ran))} of {len(all_pairs(TABLE))} pairs of options have met"
        yield from (dataclasses.replace(r, where=r.where or (covered if r.passed else "")) for r in results)
    subject.evidence["combinations"] = {"rows": ran, "covered": len(pairs_of(ran)), "pairs": len(all_pairs(TABLE))}
    for head in subject.at((), ("tied", "untied")):
        yield bfloat16_tokens(subject, head)


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


def _row(subject: Subject, number: int, row: Row) -> Iterator[Result]:
    config = config_of(row)
    weights = random_weights(
        dataclasses.replace(config.model, dropout=0.0), seed=subject.seed + number, dtype=np.float64
    )
    batches = [uneven_batch(subject, config.model, step) for step in range(STEPS)]
    ours, theirs = JaxSide(weights), TorchSide(weights)
    dropping = config.model.dropout > 0
    b = theirs.train(config, batches, ours.dropout_masks(config, batches) if dropping else None)
    exact = dataclasses.replace(config, gradient_exchange="float32")
    a = ours.train(exact, batches)
    measured, where = divergence(a, b, LIMIT)
    if not measured <= LIMIT:
        where += explained(subject, weights)
    name = ", ".join(row.values())
    yield Result("combinations", f"row {number}, {STEPS} training steps: {name}", measured, LIMIT, where)

    evaluated, expected = _evaluated(ours, config, batches[0]), theirs.loss_and_grads(batches[0], 1)[0]
    difference = abs(evaluated - expected) / expected
    yield Result("combinations", f"row {number}, evaluation on the mesh", difference, LIMIT_LOGITS)

    if config.gradient_exchange == "bfloat16":
        # The first gradient of either run is that of the same parameters; it is (1 - beta1) of it that the first
        # moment holds after a step.
        rounded = ours.train(config, batches[:1])
        whole = ours.train(exact, batches[:1])
        differences = {n: relative_norm(rounded.first_moments[n], m) for n, m in whole.first_moments.items()}
        worst = max(differences, key=lambda n: np.nan_to_num(differences[n], nan=np.inf))
        case = f"row {number}, gradients exchanged in bfloat16"
        yield Result("combinations", case, differences[worst], LIMIT_BFLOAT16, f"largest in {worst}")

    T = config.model.block_size
    tokens_BT = batches[0].inputs[:2]
    pieces = [T // 2, *[1] * (T - T // 2)]
    decoded = ours.decoded_logits(tokens_BT, pieces)
    for against, logits in (("PyTorch", theirs.logits(tokens_BT)), ("recomputation", ours.logits(tokens_BT))):
        differences = [relative_to_largest(decoded[:, t], logits[:, t]) for t in range(T)]
        first = next((t for t, difference in enumerate(differences) if not difference <= LIMIT_LOGITS), None)
        where = "" if first is None else f"first at position {first}, of {pieces[0]} given at once"
        case = f"row {number}, KV cache against {against}"
        yield Result("combinations", case, float(np.max(differences)), LIMIT_LOGITS, where)


def _evaluated(side: JaxSide, config: TrainConfig, batch: Batch) -> float:
    """The trainer's own evaluation of a batch, on the mesh and in the way that `config` says: the mean loss."""
    mesh = make_mesh(parse_mesh(config.mesh))
    definition = gpt2_jax.train.define_model(dataclasses.replace(config, norm_kernel="xla"))
    with jax.set_mesh(mesh):
        total = gpt2_jax.train_step.make_eval_step(definition, mesh)(side.params, *batch)
    return float(total) / int((batch.targets != IGNORED).sum())


def divergence(a: Trained, b: Trained, limit: float) -> tuple[float, str]:
    """The largest relative difference of two trainings, and the first place beyond `limit`: by step the loss, then the
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


def explained(subject: Subject, weights: Weights) -> str:
    """Whether the model is to blame for a training that differs, or how it was executed: the first value in which its
    forward pass differs, else what `gradients` says, without dropout, on one device, its layers unrolled."""
    config = weights.config
    tokens = subject.tokens % config.vocab_size
    tokens_BT = tokens[: 2 * config.block_size].reshape(2, -1)
    values = (side(weights).intermediates(tokens_BT) for side in (JaxSide, TorchSide))
    found = places.compare(*values)
    if not places.worst_of(found) <= forward.LIMIT:
        return f"; forward: {places.first_beyond(found, forward.LIMIT)}"
    plain = dataclasses.replace(subject, weights=weights, tokens=tokens, level="quick", evidence={})
    where = next((result.where for result in gradients.check(plain) if not result.passed), None)
    if where is not None:
        return f"; gradients: {where}"
    return "; forward pass and gradients of this model agree, executed plainly"


def uneven_batch(subject: Subject, model: ModelConfig, step: int) -> Batch:
    """Eight sequences of the text with ends of text in them. Of the first no target counts, of the others unevenly
    many: a mean over the wrong number shows only then, on a mesh and in accumulated parts."""
    T = model.block_size
    start = step * BATCH_SIZE * T
    windows = subject.tokens[start : start + BATCH_SIZE * T + 1] % model.vocab_size
    windows[7 :: 2 * T + 3] = model.vocab_size - 1
    targets = windows[1:].reshape(BATCH_SIZE, T).copy()
    for row in range(BATCH_SIZE):
        targets[row, : T * (BATCH_SIZE - 1 - row) // (BATCH_SIZE - 1)] = IGNORED
    return Batch(windows[:-1].reshape(BATCH_SIZE, T).astype(np.int32), targets.astype(np.int32))


def bfloat16_tokens(subject: Subject, head: str) -> Result | Skipped:
    """In bfloat16 JAX narrows the weights before it generates, and embeddings stay as they are though a tied head is
    narrowed. The likeliest tokens are those of a forward pass from the weights as they are, in the same dtype."""
    if jax.default_backend() != "cpu":
        return Skipped(
            "combinations", "bfloat16 tokens: an accelerator's kernels sum in another order at other lengths"
        )
    T = 32
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=257, tie_embeddings=head == "tied")
    lengths = [1 + number % 8 for number in range(32)]
    prompts = [(subject.tokens[97 * n :][:length] % 257).tolist() for n, length in enumerate(lengths)]
    with jax.enable_x64(False):
        side = JaxSide(random_weights(config), "bfloat16")
        count = T - max(lengths)
        tokens = side.generate(prompts, np.zeros((len(prompts), count)), Sampling(greedy=True)).tolist()
        contexts = [[*prompt, *new, *[0] * T][:T] for prompt, new in zip(prompts, tokens, strict=True)]
        logits_BTV = side.logits(np.array(contexts, np.int32))
    expected = [logits_TV[n - 1 : n - 1 + count].argmax(-1) for n, logits_TV in zip(lengths, logits_BTV, strict=True)]
    differing = np.argwhere(np.array(tokens) != np.array(expected))
    where = f"first at prompt {differing[0][0]}, token {differing[0][1]}" if len(differing) else ""
    case = f"bfloat16, {head} head: narrowed weights against a forward pass, {len(prompts)} prompts x {count} tokens"
    return Result("combinations", case, float(len(differing)), 0.0, where)
