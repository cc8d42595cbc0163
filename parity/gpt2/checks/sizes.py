"""Check `sizes`: what the code decides by a size, on both sides of every such decision, in float64.

Blocks of queries, chunks of the loss, slots of the KV cache, tokens decoded at once, rows that pad the vocabulary: each
is a constant of the code, and a model that happens to lie on one side of it never runs what lies on the other. Parts
that can be called by themselves are held against PyTorch's own function of the same name.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from gpt2_core.config import IGNORE_INDEX, ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.weights import Weights
from parity.engine.adapter import Capability, lacking
from parity.engine.results import Result, Skipped, relative_norm
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import (
    ATTENTION,
    DECODING,
    FEW_SLOTS,
    GENERATION,
    LOGITS,
    LOSS,
    NORM_KERNEL,
    SPIKES,
    STOPPING,
    TRAINING,
    Adapter,
)
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks.combinations import explained, first_difference, uneven_batch

# Every size at which code of gpt2_jax decides something, and the part of this check that lies on both sides of it.
CONSTANTS = {
    "attention.BLOCKS": "attention: lengths that it divides and doesn't",
    "attention.SHORTEST_IN_BLOCKS": "attention: one token less, and as many",
    "loss.BLOCK": "loss: vocabularies of one block and of several",
    "loss.CHUNK_BYTES": "loss: one chunk and several, with a remainder and without",
    "generate.MIN_SLOTS": "generation: a cache that stays, grows, and ends at the block",
    "generate.CHUNK": "generation: tokens in chunks and one by one",
    "spikes.LEAST": "spikes: losses one fewer than are needed, and as many",
    "train_step.WINDOW": "spikes: more losses than are kept",
    "norm_kernels.BACKWARD_PROGRAMS": "norm kernel: rows that its programs share evenly and don't",
}

Compared = dict[str, tuple[np.ndarray, np.ndarray]]
"""The candidate's and PyTorch's value of each result, by name, the first computed first."""


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    adapters = candidate, reference
    asked: dict[str, list[tuple[Adapter, Capability]]] = {
        "attention": [(candidate, ATTENTION)],
        "loss": [(candidate, LOSS)],
        "spikes": [(adapter, SPIKES) for adapter in adapters],
        "norm kernel": [(candidate, NORM_KERNEL)],
        "sampling": [(adapter, GENERATION) for adapter in adapters],
        "generation": [(adapter, GENERATION) for adapter in adapters],
        "positions beyond GPT-2's 1,024": [(adapter, LOGITS) for adapter in adapters] + [(candidate, DECODING)],
        "training": [(adapter, TRAINING) for adapter in adapters],
    }
    parts = (_attention, _loss, _spikes, _norm_kernel, _sampling, _generation, _long, _training)
    of_name = dict(zip(asked, parts, strict=True))
    # The others compile whole models, or interpret a kernel.
    for name in filter(case.runs, case.at(("attention", "loss", "spikes", "sampling"), of_name, prove=of_name)):
        needed, part = asked[name], of_name[name]
        if skipped := lacking("sizes", name, *needed):
            yield skipped
        else:
            yield from part(case, candidate, reference)


# --- attention: blocks of queries, head sizes, lengths


def _attention(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    short, blocks = candidate.attention_blocks()
    lengths = {
        "one query": 1,
        "one short of blocks": short - 1,
        f"{blocks} blocks": short,
        "blocks, with a remainder": short + blocks // 2,
        f"{blocks} longer blocks": short + 3 * blocks,
    }
    for what in case.at(["blocks, with a remainder"], lengths):
        for kernel, rate in case.at([("recompute", 0.3)], [("xla", 0.0), ("recompute", 0.3)]):
            T = lengths[what]
            K = 5 if T % 2 else 6
            title = f"attention {kernel}, dropout {rate}: {what} ({T}), heads of {K}"
            yield _compared(title, _attended(candidate, kernel, rate, (2, 3, T, K)))
    for kernel, rate in case.at((), [("xla", 0.0), ("recompute", 0.3)]):
        title = f"attention {kernel}, dropout {rate}, ALiBi: {blocks} blocks ({short})"
        yield _compared(title, _attended(candidate, kernel, rate, (2, 3, short, 6), slopes=(0.5, 0.125, 0.25)))


def _attended(
    candidate: Adapter, kernel: str, rate: float, shape: tuple[int, ...], slopes: tuple[float, ...] | None = None
) -> Compared:
    generator = np.random.default_rng(0)
    q, k, v, dout = (generator.standard_normal(shape) for _ in range(4))
    ours, kept = candidate.attended(q, k, v, dout, kernel=kernel, rate=rate, slopes=slopes)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    scores = tensors[0] @ tensors[1].mT / shape[-1] ** 0.5
    if slopes is not None:
        distance = torch.arange(shape[2])[:, None] - torch.arange(shape[2])
        scores = scores - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
    weights = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    out = (weights * torch.from_numpy(kept.astype(np.float64)) / (1 - rate)) @ tensors[2]
    grads = torch.autograd.grad(out, tensors, torch.from_numpy(dout))
    return _paired(("output", "gradient of q", "gradient of k", "gradient of v"), ours, (out, *grads))


# --- spikes: losses that are there, and those that are kept


def _spikes(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    losses = np.random.default_rng(case.seed).gamma(4.0, size=75)
    losses[[5, 31, 62]] = np.nan, np.inf, 40.0
    due = np.full(len(losses), np.inf)
    for number in range(len(losses)):
        kept = [loss for loss in losses[:number] if np.isfinite(loss)][-50:]
        if len(kept) >= 20:
            due[number] = np.mean(kept) + 2.5 * np.std(kept)
    for adapter in (candidate, reference):
        found = adapter.loss_limits(losses, 2.5)
        with np.errstate(invalid="ignore"):  # both infinite, where they are equal
            differences = np.where(found == due, 0.0, np.abs(found - due) / due)
        beyond = np.flatnonzero(~(differences <= limits.FUNCTION))
        where = "" if not beyond.size else f"before loss {beyond[0]}: {found[beyond[0]]} where {due[beyond[0]]} is due"
        title = f"{adapter.name}: limits of {len(losses)} losses, two of them not finite"
        yield Result("sizes", title, float(np.max(differences)), limits.FUNCTION, where)


# --- the loss: chunks of tokens, rows that pad the vocabulary


def _loss(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    # Sequences, tokens of each, vocabulary, tokens of a chunk.
    cases = {
        "chunks with a remainder": (2, 13, 257, 5),
        "chunks of one length": (3, 12, 256, 4),
        "one chunk": (2, 13, 257, 13),
        "a token a chunk": (1, 7, 129, 1),
        "one token": (1, 1, 128, 1),
    }
    for what in case.at(list(cases)[:1], cases):
        B, T, V, C = cases[what]
        rows = candidate.vocabulary_rows(V)
        with candidate.loss_chunks(C * B * rows * np.dtype(np.float64).itemsize):
            found = _cross_entropy(candidate, B, T, V, rows)
        yield _compared(f"loss in {what}: {B} x {T} tokens, {C} a chunk, vocabulary {V} in {rows} rows", found)


def _cross_entropy(candidate: Adapter, B: int, T: int, V: int, rows: int) -> Compared:
    generator = np.random.default_rng(0)
    D = 6
    x_BTD, head_VD = generator.standard_normal((B, T, D)), generator.standard_normal((rows, D))
    targets_BT = generator.integers(0, V, (B, T))
    targets_BT[:, 1 :: B + 1] = IGNORE_INDEX

    # As in training, the loss is divided by something after it is summed.
    evaluated, trained, *grads = candidate.cross_entropy(x_BTD, head_VD, targets_BT, V, divisor=7)
    x, head = (torch.from_numpy(a).requires_grad_() for a in (x_BTD, head_VD))
    logits = F.linear(x, head[:V]).flatten(0, 1)
    expected = (
        F.cross_entropy(logits, torch.from_numpy(targets_BT).flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / 7
    )
    names = ("loss, evaluated", "loss, differentiated", "gradient of x", "gradient of the head")
    expected_grads = torch.autograd.grad(expected, (x, head))
    return _paired(names, (evaluated, trained, *grads), (expected, expected, *expected_grads))


# --- the norm kernel: rows that programs share, widths that are padded to a power of two


def _norm_kernel(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    """In float32, which is all that it computes in, against PyTorch's layer norm in float64."""
    cases = {"20 wide, 10 rows": (10, 20, True), "16 wide, 9 rows, no branch, no bias": (9, 16, False)}
    for what in case.at(list(cases)[:1], list(cases)[:1], cases):
        M, D, everything = cases[what]
        generator = np.random.default_rng(0)
        # Far from zero, where a careless variance is wrong.
        x, branch, dsum, dout = generator.standard_normal((4, M, D))
        x += 30.0
        w, b = generator.standard_normal((2, D))
        given = [x, branch if everything else None, w, b if everything else None]
        ours = candidate.normed_by_kernel(*given, 1e-3, (dsum, dout))
        x, branch, w, b = (None if a is None else torch.from_numpy(a.astype(np.float32)).double() for a in given)
        wanted = [a.requires_grad_() for a in (x, branch, w, b) if a is not None]
        total = x if branch is None else x + branch
        normed = F.layer_norm(total, (D,), w, b, 1e-3)
        grads = torch.autograd.grad((total, normed), wanted, (torch.from_numpy(dsum), torch.from_numpy(dout)))
        names = [n for n, a in zip(("x", "branch", "the weight", "the bias"), given, strict=True) if a is not None]
        found = _paired(["sum", "norm", *(f"gradient of {n}" for n in names)], ours, (total, normed, *grads))
        yield _compared(f"norm kernel: {what}", found, limits.FLOAT32_FUNCTION)


# --- the sampler: ties, edges of the filters, the ends of the uniform numbers


def _sampling(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    """Logits that are equal are taken by token id, wherever a filter cuts through them."""
    settings = {
        "greedy": Sampling(greedy=True),
        "everything": Sampling(),
        "top-k 3, top-p 0.6": Sampling(top_k=3, top_p=0.6),
        "top-p 0.5": Sampling(top_p=0.5),
        "top-k 1": Sampling(top_k=1),
        "top-k beyond the vocabulary, top-p 1": Sampling(top_k=50, top_p=1.0),
        "temperature 0.001": Sampling(temperature=1e-3),
        "temperature 50": Sampling(temperature=50.0, top_k=5),
    }
    below_one = np.nextafter(1.0, 0.0)
    # With all eight equal every share is a power of two: a uniform number or a top-p may lie on the edge exactly.
    rows = [(np.zeros(8), u) for u in (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, below_one)]
    for logits in (
        [1.0, 3.0, 3.0, 1.0, 3.0, 1.0, 1.0, 3.0],
        [-2.0, -5.0, -2.0, -9.0, -9.0, -2.0, -2.0, -5.0],
        [-0.0, 0.0, -1.0, 0.0, -0.0, -1.0, 0.0, -0.0],
        [4.0, -700.0, 4.0, -700.0, -800.0, 3.0, -800.0, 3.0],
    ):
        rows += [(np.array(logits), u) for u in (0.0, 0.1, 0.3, 0.55, 0.8, below_one)]
    logits_BV, uniforms_B = (np.stack(column) for column in zip(*rows, strict=True))
    for name in case.at(list(settings)[:3], settings):
        ours, theirs = (a.sample(logits_BV, uniforms_B, settings[name]) for a in (candidate, reference))
        differing = np.flatnonzero(ours != theirs)
        where = ""
        if len(differing):
            n = differing[0]
            where = f"first for logits {logits_BV[n].tolist()}, uniform {uniforms_B[n]}: {ours[n]} and {theirs[n]}"
        title = f"sampling among equal logits, {name}: {len(rows)} rows"
        yield Result("sizes", title, float(len(differing)), limits.TOKENS, where)


# --- generation: slots of the cache, sizes of a chunk, the end of the block


def _generation(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    few = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=12, vocab_size=7)
    sampled = Sampling(temperature=1.3, top_p=0.95)
    run = functools.partial(_generated, candidate, reference)
    if skipped := lacking("sizes", "a cache that grows", (candidate, FEW_SLOTS)):
        yield skipped
    else:
        with candidate.few_slots(4):
            # The longest prompt is neither the first nor the last, and no multiple of what is decoded at once.
            yield run("a cache that grows from 4 slots to a block of 12, and slides", few, (1, 3, 2), 20, sampled)
    if not case.at(False, True):
        return
    if FEW_SLOTS.of(candidate):
        slots = candidate.min_slots()
        long = dataclasses.replace(few, block_size=2 * slots + 44, vocab_size=130)
        title = f"a cache that grows from {slots} slots to a block of {long.block_size}, and slides"
        yield run(title, long, (5, slots - 9), slots + 72, sampled)
    yield run("prompts longer than a block of 12", few, (1, 12, 13, 40), 30, sampled)
    for lengths in case.at(None, ((3, 1),), ((3, 1), (2,))):
        if skipped := lacking("sizes", "generation until the end of text", (candidate, STOPPING)):
            yield skipped
        else:
            yield _until_end_of_text(candidate, reference, few, lengths, 30)
    one = dataclasses.replace(few, block_size=1)
    yield run("a block of one token", one, (1, 3), 6, sampled)
    # Rows that pad the vocabulary are zero: where all logits are negative they would be the largest.
    padded = dataclasses.replace(few, vocab_size=130)
    yield run("negative logits, a vocabulary of 130 in 256 rows", padded, (3, 1), 4, Sampling(greedy=True), -9.0)


def _generated(
    candidate: Adapter,
    reference: Adapter,
    title: str,
    model: ModelConfig,
    lengths: tuple[int, ...],
    count: int,
    sampling: Sampling,
    shift: float = 0.0,
) -> Result:
    weights = _with_logits_shifted(random_weights(model, dtype=np.float64), shift)
    prompts, numbers = _prompts(model, lengths), np.stack([uniforms(0, row, count) for row in range(len(lengths))])
    a, b = (x.make(weights).generate(prompts, numbers, sampling) for x in (candidate, reference))
    differing = np.argwhere(a != b) if a.shape == b.shape else np.zeros((a.size, 2), int)
    where = ""
    if len(differing):
        row, token = differing[np.argmin(differing[:, 1])]
        where = f"first at prompt {row}, token {token}, the context then {lengths[row] + token} long"
    title = f"{title}: {len(prompts)} prompts x {count} tokens"
    return Result("sizes", title, float(len(differing)), limits.TOKENS, where)


def _until_end_of_text(
    candidate: Adapter, reference: Adapter, model: ModelConfig, lengths: tuple[int, ...], count: int
) -> Result:
    """The candidate stops when every prompt has had its end of text, wherever in a chunk, and not before."""
    weights = random_weights(model, dtype=np.float64)
    prompts, numbers = _prompts(model, lengths), np.stack([uniforms(1, row, count) for row in range(len(lengths))])
    sampling = Sampling(temperature=1.5)
    expected = reference.make(weights).generate(prompts, numbers, sampling)
    # The token whose last first appearance is latest, but before the end, and not in every prompt's text at once.
    firsts = {token: [int((row == token).argmax()) for row in expected] for token in set(expected[0].tolist())}
    firsts = {
        token: found
        for token, found in firsts.items()
        if all((row == token).any() for row in expected)
        and (len(found) == 1 or not (expected[:, max(found)] == token).all())
    }
    end = max(firsts, key=lambda token: max(firsts[token]))
    found = candidate.make(weights).generate_until(prompts, numbers, sampling, end)
    due = 1 + max(firsts[end])
    differing = [
        (row, n)
        for row, first in enumerate(firsts[end])
        for n in range(first + 1)
        if n >= found.shape[1] or found[row, n] != expected[row, n]
    ]
    wrong = len(differing) + abs(found.shape[1] - due)
    where = f"stops after {found.shape[1]} tokens where {due} are due" + (f"; {differing[0]}" if differing else "")
    title = f"generation until the end of text: {len(prompts)} prompts, at tokens {sorted(map(int, firsts[end]))}"
    return Result("sizes", title, float(wrong), limits.TOKENS, where if wrong else "")


def _prompts(model: ModelConfig, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, model.vocab_size, length).tolist() for length in lengths]


def _with_logits_shifted(weights: Weights, shift: float) -> Weights:
    """The same logits and `shift` added to each, by an embedding with a common component."""
    ones = np.ones(weights.config.n_embd) / np.sqrt(weights.config.n_embd)
    bias = weights.arrays["ln_f.bias"] + shift * ones
    return dataclasses.replace(
        weights, arrays={**weights.arrays, "ln_f.bias": bias, "wte.weight": weights.arrays["wte.weight"] + ones}
    )


# --- positions beyond the 1,024 of the published models


def _long(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    T, few = 1030, 3
    for position in case.at(("rope",), ("rope", "learned"), ("rope", "learned", "alibi")):
        model = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=T, vocab_size=7, mlp_width=8, position=position)
        weights = random_weights(model, dtype=np.float64)
        ours, theirs = candidate.make(weights), reference.make(weights)
        tokens_BT = (case.tokens[:T] % model.vocab_size)[None]
        expected = theirs.logits(tokens_BT)
        whole = {
            "at once": ours.logits(tokens_BT),
            "by the cache": ours.decoded_logits(tokens_BT, [T - few, *[1] * few]),
        }
        for how, logits in whole.items():
            by_position = np.abs(logits - expected).max(axis=(0, 2)) / np.abs(expected).max()
            beyond = np.flatnonzero(~(by_position <= limits.FORWARD))
            where = f"first at position {beyond[0]}" if len(beyond) else ""
            title = f"{T} positions, {position}, {how}"
            yield Result("sizes", title, float(by_position.max()), limits.FORWARD, where)


# --- training: many layers, and the smallest of everything


def _training(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    # Sorted as text, h.10 comes before h.2.
    deep = ModelConfig(n_layer=11, n_head=2, n_embd=8, block_size=6, vocab_size=128, bias=False, mlp_width=8)
    odd = ModelConfig(n_layer=1, n_head=3, n_embd=15, block_size=9, vocab_size=129)
    small = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=1, vocab_size=2)
    scanned, unrolled = {"mesh": 1, "scan_layers": True}, {"mesh": 1}
    cases = {
        "11 layers, scanned": (deep, scanned, 8),
        "an odd head size, sequences one by one": (odd, {"mesh": 1, "accumulation": 8}, 8),
        "one token, one sequence, a vocabulary of 2": (small, unrolled, 1),
        "11 layers": (deep, unrolled, 8),
    }
    for name in case.at(list(cases)[:1], list(cases)[:3], cases):
        model, settings, batch_size = cases[name]
        config = TrainConfig(
            model=model,
            # Where gradients are no more than rounding, as those of keys' biases are, Adam would divide it by itself.
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, epsilon=1e-3),
            steps=2,
            batch_size=batch_size,
            precision="float64",
            **settings,
        )
        weights = random_weights(model, seed=case.seed, dtype=np.float64)
        batches = [Batch(*(x[-batch_size:] for x in uneven_batch(case, model, step))) for step in range(config.steps)]
        ours, theirs = candidate.make(weights), reference.make(weights)
        a, b = ours.train(config, batches), theirs.train(config, batches)
        measured, where = first_difference(a, b, limits.STEP)
        if not measured <= limits.STEP:
            where += explained(case, ours, theirs)
        yield Result("sizes", f"{name}: {config.steps} training steps", measured, limits.STEP, where)


# --- comparing


def _paired(names: Sequence[str], ours: Sequence[np.ndarray], theirs: Sequence[torch.Tensor]) -> Compared:
    return {n: (a, b.detach().numpy()) for n, a, b in zip(names, ours, theirs, strict=True)}


def _compared(title: str, found: Compared, limit: float = limits.FUNCTION) -> Result:
    differences = {name: relative_norm(a, b) if a.shape == b.shape else np.nan for name, (a, b) in found.items()}
    first = next((name for name, difference in differences.items() if not difference <= limit), None)
    where = "" if first is None else f"{first}: relative difference {differences[first]:.1e}"
    return Result("sizes", title, float(np.max(list(differences.values()))), limit, where)
