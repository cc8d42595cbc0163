"""Negative controls: real mistakes, each a small patch of one side, and where each must be found.

`python parity/compare.py --prove` injects them one at a time. A suite that lets one of them pass would let a port with
that mistake pass.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import gpt2_convert.hugging_face
import gpt2_convert.llmc
import gpt2_core.batches
import gpt2_core.run_folder
import gpt2_jax.attention
import gpt2_jax.dropout
import gpt2_jax.generate
import gpt2_jax.layers
import gpt2_jax.loss
import gpt2_jax.model
import gpt2_jax.optimizer
import gpt2_jax.train
import gpt2_jax.train_step
import gpt2_torch.checkpoints
import gpt2_torch.model
import gpt2_torch.train
import gpt2_torch.weights
import parity.sides
from gpt2_core.batches import IGNORED
from gpt2_core.config import ModelConfig, OptimizerConfig
from gpt2_jax.capture import tap
from parity.compiling import compiled_quickly
from parity.subjects import random_weights, real_text
from parity.suite import Result, Subject, in_words, load

Patch = Callable[[], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake, who makes it, and the check and the place that must find it."""

    name: str
    story: str
    check: str
    place: str
    """Part of the failing case's name or of its `where`."""
    patch: Patch
    model: ModelConfig | None = None
    """The architecture it shows in, where it isn't GPT-2's own."""
    prepare: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
    """Changes the weights so that the mistake shows."""

    def __reduce__(self):
        # Its functions can't be sent to another process; its name can.
        return _called, (self.name,)


def _called(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one fault."""

    fault: Fault
    caught: bool
    in_place: bool
    orders: float
    """Orders of magnitude by which the failing case exceeds its limit; the least of them in the right place."""
    where: str


MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)


def subject_of(fault: Fault | None = None) -> Subject:
    """The smallest thing on which the fault can show: one layer, two heads."""
    weights = random_weights((fault and fault.model) or MODEL)
    if fault is not None:
        arrays = {n: fault.prepare(n, a).astype(np.float32) for n, a in weights.arrays.items()}
        weights = dataclasses.replace(weights, arrays=arrays)
    return Subject(weights, real_text(weights, 20_000), level="quick", steps=12)


def judge(fault: Fault) -> Verdict:
    """Inject the fault and run the check that should catch it."""
    failed, placed = [], []
    try:
        subject = subject_of(fault)
        with fault.patch(), compiled_quickly(), parity.sides.on_one_thread():
            for result in load(fault.check)(subject):
                if isinstance(result, Result) and not result.passed:
                    failed.append(result)
                    if fault.place in f"{result.case} {result.where}":
                        placed.append(result)
                        break  # what is found is found, and each further case is compiled for
    except Exception as error:
        # The code that the fault was written for is no longer what it was.
        return Verdict(fault, False, False, 0.0, f"can't be planted: {in_words(error)}")
    shown = (placed or failed or [None])[0]
    return Verdict(
        fault,
        caught=bool(failed),
        in_place=bool(placed),
        orders=_orders(shown) if shown else 0.0,
        where=f"{shown.case}: {shown.where}".removesuffix(": ") if shown else "",
    )


def _orders(result: Result) -> float:
    if not math.isfinite(result.measured):
        return math.inf
    # Counts have a limit of zero: one too many is as plain as it can be.
    return math.log10(result.measured / result.limit) if result.limit > 0 else math.inf


def replacing(target: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Put `make(original)` in the place of an attribute."""
    return lambda: mock.patch.object(target, name, make(getattr(target, name)))


def weights_changed(change: Callable[[str, np.ndarray], np.ndarray]) -> Patch:
    """The conversion to JAX gets a tensor wrong."""

    def make(convert):
        def wrong(weights, dtype):
            return {name: change(name, array) for name, array in convert(weights, dtype).items()}

        return wrong

    return replacing(parity.sides, "from_canonical", make)


# --- attention and blocks


def _mask(offset: int) -> Patch:
    def make(causal_mask):
        return lambda T: jnp.tril(jnp.ones((T, T), bool), offset).at[0, 0].set(True)

    return replacing(gpt2_jax.attention, "_causal_mask", make)


def _additive_mask(weights):
    def wrong(q, k, mask, *_):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
        return jax.nn.softmax(scores + jnp.where(mask, 0.0, -1e4), axis=-1)

    return wrong


def _post_norm(call):
    def wrong(self, x, branch, positions, *, cache=None, key=None):
        out, cache = self.attn(x, cache=cache, positions=positions, key=None)
        x = tap("residual_1", tap("ln_1", self.ln_1(x + out)))
        return tap("residual_2", tap("ln_2", self.ln_2(x + self.mlp(x, key=None)))), None, cache

    return wrong


def _residual_after_norm(call):
    def wrong(self, x, branch, positions, *, cache=None, key=None):
        a = tap("ln_1", self.ln_1(x))
        out, cache = self.attn(a, cache=cache, positions=positions, key=None)
        x = tap("residual_1", a + out)
        return tap("residual_2", x + self.mlp(tap("ln_2", self.ln_2(x)), key=None)), None, cache

    return wrong


class _NoNorm(gpt2_jax.layers.LayerNorm):
    def __call__(self, x):
        return x


def _without_ln_f(init):
    def wrong(self, *args):
        init(self, *args)
        self.ln_f.__class__ = _NoNorm

    return wrong


def _wrong_epsilon(init):
    return lambda self, size, **options: init(self, size, **options | {"epsilon": 1e-6})


def _fast_variance(call):
    def wrong(self, x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
        out = (x - mean) * jax.lax.rsqrt(variance + self.epsilon) * self.weight[...] + self.bias[...]
        return out.astype(self.dtype)

    return wrong


def _bfloat16_norm(call):
    def wrong(self, x):
        x = x.astype(jnp.dtype(self.dtype))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return centred * jax.lax.rsqrt(variance + self.epsilon).astype(x.dtype) * weight + bias

    return wrong


def _tf32(call):
    def rounded(x):
        # Ten of float32's 23 bits of mantissa, as a tensor core takes them.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return jax.lax.bitcast_convert_type((bits + 0x1000) & jnp.uint32(0xFFFFE000), jnp.float32)

    def wrong(self, x):
        if x.dtype != jnp.float32:
            return call(self, x)
        weight = self.weight[...]
        out = jnp.tensordot(rounded(x), rounded(weight), axes=1)
        return out + self.bias[...]

    return wrong


def _narrow_residual(add_norm):
    def wrong(norm, x, branch):
        x, _ = add_norm(norm, x, branch)
        x = x.astype(jnp.dtype(norm.dtype)).astype(x.dtype)
        return x, norm(x)

    return wrong


def _narrow_softmax(weights):
    def wrong(q, k, mask, *_):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * (q.shape[-1] ** -0.5)
        return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)

    return wrong


def _left_to_autodiff(project):
    def wrong(x, w, b):
        outs = [x @ w[:, n].astype(x.dtype) for n in range(w.shape[1])]
        return outs if b is None else [out + b[n].astype(out.dtype) for n, out in enumerate(outs)]

    return wrong


def _kept_in_bfloat16(block_function):
    def wrong(self, graph):
        apply = block_function(self, graph)

        def rounded(*inputs):
            x, branch = apply(*inputs)
            return (x.astype(jnp.bfloat16).astype(x.dtype) if self.execution.remat else x), branch

        return rounded

    return wrong


def _narrow_parts(sum_over_parts):
    def wrong(of_part, parts):
        def narrow(part):
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), of_part(part))

        return jax.tree.map(lambda x: x.astype(jnp.float32), sum_over_parts(narrow, parts))

    return wrong


def _heads_as_columns(name: str, array: np.ndarray) -> np.ndarray:
    if ".c_attn." not in name:
        return array
    heads = array.reshape(*array.shape[:-1], MODEL.head_size, MODEL.n_head)
    return heads.swapaxes(-1, -2).reshape(array.shape)


def _gate_and_value_swapped(call):
    def wrong(self, x, *, key):
        value, gate = tap("mlp.c_fc", self.c_fc(x)), tap("mlp.c_gate", self.c_gate(x))
        return tap("mlp.c_proj", self.c_proj(tap("mlp.activation", jax.nn.silu(value) * gate)))

    return wrong


# --- loss, head


def _untied(head):
    def wrong(self):
        tied = head(self)
        return tied + 0.02 * jax.random.normal(jax.random.key(7), tied.shape, tied.dtype)

    return wrong


def _shifted_twice(loss):
    def wrong(self, tokens, targets, **options):
        again = jnp.concatenate([targets[:, 1:], jnp.full_like(targets[:, :1], IGNORED)], axis=1)
        return loss(self, tokens, again, **options)

    return wrong


def _mean_of_means(accumulate):
    def wrong(model, inputs, targets, *, accumulation=1, autocast=None):
        total = 0.0
        for i, t in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            loss = model(i, t) / (t != IGNORED).sum() / accumulation
            loss.backward()
            total = total + loss.detach()
        return total

    return wrong


def _sum_over_shards(loss_and_grads):
    def wrong(definition, *arguments, **options):
        loss, grads = loss_and_grads(definition, *arguments, **options)
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        return loss, jax.tree.map(lambda g: g * shards, grads)

    return wrong


# --- optimizer


def _optimizer(make: Callable) -> Patch:
    return replacing(gpt2_jax.train_step, "make_optimizer", lambda _: make)


def _decay_where(mask: Callable[[str, tuple[int, ...]], bool]):
    def make(config, model):
        return optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            optax.add_decayed_weights(
                config.weight_decay, mask={n: mask(n, s) for n, s in model.parameter_shapes.items()}
            ),
        )

    return make


def _adam(**changes):
    def make(config, model):
        options = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
        options |= {name: change(config) for name, change in changes.items()}
        mask = {n: len(s) >= 2 for n, s in model.parameter_shapes.items()}
        return optax.chain(optax.scale_by_adam(**options), optax.add_decayed_weights(config.weight_decay, mask=mask))

    return make


def _l2(config, model):
    mask = {n: len(s) >= 2 for n, s in model.parameter_shapes.items()}
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
    joined = optax.chain(decay, adam)

    def update(grads, state, params):
        updates, (first, second) = joined.update(grads, state[::-1], params)
        return updates, (second, first)

    return optax.GradientTransformation(lambda params: joined.init(params)[::-1], update)


def _no_bias_correction(config, model):
    right = gpt2_jax.optimizer.make_optimizer(config, model)

    def update(grads, state, params):
        updates, state = right.update(grads, state, params)
        adam = state[0]
        plain = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), adam.mu, adam.nu)
        decay = {n: config.weight_decay * params[n] if len(s) >= 2 else 0.0 for n, s in model.parameter_shapes.items()}
        return {n: plain[n] + decay[n] for n in plain}, state

    return optax.GradientTransformation(right.init, update)


def _clip_updates(config, model):
    right = gpt2_jax.optimizer.make_optimizer(config, model)
    clip = optax.clip_by_global_norm(config.clip_norm or math.inf)

    def update(grads, state, params):
        updates, state = right.update(grads, state, params)
        return clip.update(updates, None)[0], state

    return optax.GradientTransformation(right.init, update)


@contextlib.contextmanager
def _clipping_after_the_optimizer():
    with (
        mock.patch.object(gpt2_jax.train_step, "clip_by_global_norm", lambda g, c: (g, optax.tree.norm(g))),
        mock.patch.object(gpt2_jax.train_step, "make_optimizer", _clip_updates),
    ):
        yield


def _clip_per_tensor(clip):
    def wrong(grads, clip_norm):
        _, norm = clip(grads, clip_norm)
        return {n: clip({n: g}, clip_norm)[0][n] for n, g in grads.items()}, norm

    return wrong


def _clip_as_optax(clip):
    def wrong(grads, clip_norm):
        return optax.clip_by_global_norm(clip_norm).update(grads, None)[0], optax.tree.norm(grads)

    return wrong


def _rate(change: Callable) -> Patch:
    return replacing(gpt2_jax.train, "learning_rate", change)


def _warmup_from_zero(rate):
    def wrong(step, steps, config):
        return (
            config.learning_rate * step / config.warmup_steps
            if step < config.warmup_steps
            else rate(step, steps, config)
        )

    return wrong


def _cosine_to_zero(rate):
    return lambda step, steps, config: rate(step, steps, dataclasses.replace(config, final_fraction=0.0))


# --- the trainers' loops


def _mean_of_batch_means(evaluate):
    def wrong(model, batches, device, autocast):
        return float(np.mean([evaluate(model, [batch], device, autocast) for batch in batches]))

    return wrong


def _left_in_evaluation(evaluate):
    def wrong(model, *arguments):
        loss = evaluate(model, *arguments)
        model.eval()
        return loss

    return wrong


def _last_part_only(accumulate):
    def wrong(model, inputs, targets, *, accumulation=1, autocast=None):
        accumulate(model, inputs, targets, accumulation=accumulation, autocast=autocast)
        inputs, targets = inputs.chunk(accumulation)[-1], targets.chunk(accumulation)[-1]
        return model(inputs, targets).detach() / (targets != IGNORED).sum()

    return wrong


def _norm_after_clipping(step):
    def wrong(*arguments, clip_norm, **options):
        loss, norm = step(*arguments, clip_norm=clip_norm, **options)
        return loss, norm.clamp(max=clip_norm)

    return wrong


def _model_alone(restore):
    def wrong(checkpoint, model, optimizer):
        restore(checkpoint, model, gpt2_torch.train.make_optimizer(model, OptimizerConfig()))

    return wrong


def _batches_from_the_start(run):
    def wrong(self, state, plan):
        put = self.put
        self.put = lambda step: put(step - plan.step)
        run(self, state, plan)

    return wrong


def _schedule_from_the_start(run):
    def wrong(self, state, plan):
        def restarted(rate):
            return lambda step, steps, config: rate(step - plan.step, steps, config)

        with replacing(gpt2_jax.train, "learning_rate", restarted)():
            run(self, state, plan)

    return wrong


def _largest_loss(best_step):
    def wrong(self):
        losses = {r["step"]: r["loss"] for r in gpt2_core.run_folder.read_metrics(self.metrics) if r["split"] == "val"}
        return max(self.steps(), key=losses.__getitem__, default=None)

    return wrong


def _validation_is_training(open_tokens):
    def wrong(config):
        tokens = open_tokens(config)
        return dataclasses.replace(tokens, val=tokens.train)

    return wrong


# --- dropout, cache, sampler


def _always_training(evaluate):
    return lambda self: self.train()


def _cache_shifted(write):
    return lambda cache, k, v, start: write(cache, k, v, start + 1)


def _cache_stale(write):
    return lambda cache, k, v, start: cache if k.shape[2] == 1 else write(cache, k, v, start)


def _sampler(kind: str):
    def make(sample):
        def wrong(logits, uniforms, sampling):
            if sampling.greedy:
                return sample(logits, uniforms, sampling)
            tempered = logits / sampling.temperature
            ranked = logits if kind == "temperature last" else tempered
            order = jnp.argsort(ranked, axis=-1, descending=True, stable=True)
            by_rank = jnp.take_along_axis(ranked, order, axis=-1)
            place = jnp.arange(order.shape[-1])
            top_k = sampling.top_k or order.shape[-1]
            # Filtering to zero in the place of -inf leaves the filtered tokens a share of the probability.
            by_rank = jnp.where(place < top_k, by_rank, 0.0 if kind == "leak" else -jnp.inf)
            p = jax.nn.softmax(by_rank, axis=-1)
            if sampling.top_p is not None:
                cumulative = jnp.cumsum(p, axis=-1)
                edge = cumulative if kind == "crossing" else cumulative - p
                keep = (edge < sampling.top_p) | (place == 0)
                p = jnp.where(keep, p, 0.0)
            if kind == "temperature last":
                p = jnp.where(p > 0, p ** (1 / sampling.temperature), 0.0)
            cumulative = jnp.cumsum(p, axis=-1)
            chosen = jnp.argmax(cumulative > uniforms[:, None] * cumulative[:, -1:], axis=-1)
            return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)

        return wrong

    return replacing(gpt2_jax.generate, "sample", make)


# --- values that can't be compared, and differences that begin later


def _row_without_a_key(causal_mask):
    return lambda T: causal_mask(T).at[0, 0].set(False)


def _tensor_left_out(convert):
    return lambda weights, dtype: {n: a for n, a in convert(weights, dtype).items() if n != "h.0.mlp.c_fc.bias"}


def _last_position_only(logits):
    return lambda self, x: logits(self, x[:, -1:])


def _restarted(step: int):
    return lambda rate: lambda now, steps, config: rate(now if now < step else now - step, steps, config)


# --- settings, sizes, combinations, formats


def _one_key_when_scanned(site):
    def wrong(keys, number):
        return site(keys, 1 if isinstance(number, jax.core.Tracer) else number)

    return wrong


def _default_base_when_decoding(rotate):
    def wrong(x, positions, config):
        return rotate(x, positions, dataclasses.replace(config, rope_theta=1e4) if positions.ndim == 2 else config)

    return wrong


def _slopes_of_the_first_shard(slopes):
    def wrong(n_head):
        shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
        return slopes(n_head // shards) * shards

    return wrong


def _clip_to_nothing(clip):
    def wrong(grads, clip_norm):
        norm = optax.tree.norm(grads)
        return jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / (norm + 1e-6)), grads), norm

    return wrong


def _chunks_without_remainder(chunks):
    def wrong(x, targets, rows):
        targets = jnp.asarray(targets)
        C = gpt2_jax.loss._chunk_length(*targets.shape, rows * x.dtype.itemsize)
        whole = targets.shape[1] // C * C
        return chunks(x, targets.at[:, whole:].set(IGNORED), rows)

    return wrong


def _cache_grown_empty(grow):
    return lambda caches, slots: jax.tree.map(jnp.zeros_like, grow(caches, slots))


def _last_of_equals(sample):
    def wrong(logits, uniforms, sampling):
        if sampling.greedy:
            return logits.shape[-1] - 1 - sample(logits[:, ::-1], uniforms, sampling)
        return sample(logits, uniforms, sampling)

    return wrong


def _layers_by_name(scan):
    def wrong(self, *inputs):
        blocks = list(self.h)
        self.h = type(self.h)([blocks[number] for number in sorted(range(len(blocks)), key=str)])
        return scan(self, *inputs)

    return wrong


def _through_float32(convert):
    return lambda array: convert(array.astype(np.float32).astype(array.dtype))


def _layers_of_a_file_by_name(order):
    def wrong(config):
        layers = sorted(range(config.n_layer), key=str)
        yield from ("wte.weight", "wpe.weight")
        for name in gpt2_convert.llmc.BLOCK_ORDER:
            yield from (f"h.{layer}.{name}" for layer in layers)
        yield from ("ln_f.weight", "ln_f.bias")

    return wrong


# --- masks and initial weights


def _one_key(keys):
    return lambda seed, step, shape: jnp.broadcast_to(keys(seed, step, (1, 1)), shape)


def _one_mask_for_all_heads(draw):
    def wrong(keys, shape, rate):
        B, H, *rest = shape
        return jnp.repeat(draw(keys, (B, 1, *rest), rate), H, axis=1)

    return wrong


def _key_of_the_dtype(dropout):
    return lambda x, rate, keys: dropout(x, rate, gpt2_jax.dropout.site(keys, x.dtype.itemsize))


def _uniform(normal):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -_sqrt(3), _sqrt(3))


def _truncated(normal):
    # What jax.nn.initializers.truncated_normal and Flax's default initialisers draw: cut at two standard deviations.
    return lambda key, shape, dtype: jax.random.truncated_normal(key, -2, 2, shape, dtype) / 0.87962566


def _layers_alike(init):
    def wrong(self, config, execution, rngs):
        init(self, config, execution, nnx.Rngs(params=jax.random.fold_in(rngs.params.key[...], 1)))

    return wrong


_ROPE = dataclasses.replace(MODEL, position="rope")
_ALIBI = dataclasses.replace(MODEL, position="alibi")
_SWIGLU = dataclasses.replace(MODEL, mlp="swiglu")
_sqrt = math.sqrt

FAULTS = (
    Fault(
        "erf GELU",
        "torch.nn.GELU() is the erf form, GPT-2's is tanh; nanoGPT's model.py has nn.GELU() "
        "(github.com/karpathy/nanoGPT)",
        "forward",
        "block 0, mlp activation",
        replacing(jax.nn, "gelu", lambda gelu: lambda x, approximate: gelu(x, approximate=False)),
    ),
    Fault(
        "sigmoid GELU",
        "CLIP's quick_gelu, x sigmoid(1.702 x), taken over with its code",
        "forward",
        "block 0, mlp activation",
        replacing(jax.nn, "gelu", lambda gelu: lambda x, approximate: x * jax.nn.sigmoid(1.702 * x)),
    ),
    Fault(
        "epsilon 1e-6",
        "flax.linen.LayerNorm's default where GPT-2 has 1e-5",
        "forward",
        "block 0, ln_1",
        replacing(gpt2_jax.layers.LayerNorm, "__init__", _wrong_epsilon),
    ),
    Fault(
        "unscaled attention",
        "the division by sqrt(head size) forgotten, as in T5, where the initialisation absorbs it",
        "forward",
        "block 0, attn out",
        lambda: mock.patch.object(gpt2_jax.attention, "math", SimpleNamespace(sqrt=lambda k: 1.0)),
    ),
    Fault(
        "scale by n_embd",
        "attention divided by the root of the embedding's width in the place of the head's",
        "forward",
        "block 0, attn out",
        lambda: mock.patch.object(gpt2_jax.attention, "math", SimpleNamespace(sqrt=lambda k: _sqrt(k * MODEL.n_head))),
    ),
    Fault(
        "softmax over the queries",
        "the wrong one of two axes of equal length: shapes agree, rows don't sum to one",
        "forward",
        "block 0, attn out",
        replacing(jax.nn, "softmax", lambda softmax: lambda x, axis: softmax(x, axis=-2)),
    ),
    Fault(
        "mask sees the next token",
        "tril(ones, 1): the model reads the answer, and trains to a loss near zero",
        "forward",
        "block 0, attn out",
        _mask(1),
    ),
    Fault("mask hides the token itself", "tril(ones, -1)", "forward", "block 0, attn out", _mask(-1)),
    Fault(
        "additive mask of -1e4",
        "a large constant in the place of -inf: scores beyond it shine through, as TransformerLens saw on real text "
        "(github.com/TransformerLensOrg/TransformerLens/issues/318)",
        "forward",
        "block 0, attn out",
        replacing(gpt2_jax.attention, "_weights", _additive_mask),
        prepare=lambda name, a: 100 * a if name.endswith("c_attn.weight") else a,
    ),
    Fault(
        "queries and keys swapped",
        "the parts of the fused projection taken in the order k, q, v",
        "forward",
        "block 0, attn out",
        replacing(gpt2_jax.model, "causal_attention", lambda attend: lambda q, k, v, **o: attend(k, q, v, **o)),
    ),
    Fault(
        "heads interleaved wrongly",
        "the projection reshaped to (head size, heads) in the place of (heads, head size)",
        "forward",
        "block 0, attn q",
        weights_changed(_heads_as_columns),
    ),
    Fault(
        "missing projection bias",
        "use_bias=False taken over from another model",
        "forward",
        "block 0, attn c_proj",
        weights_changed(lambda name, a: 0 * a if name.endswith("attn.c_proj.bias") else a),
    ),
    Fault(
        "transposed square matrix",
        "Conv1D stores (in, out), nn.Linear (out, in); on a square matrix no shape complains "
        "(nanoGPT's from_pretrained transposes four by name for that reason)",
        "forward",
        "block 0, attn c_proj",
        weights_changed(lambda name, a: a.T if name.endswith("attn.c_proj.weight") else a),
    ),
    Fault(
        "untied head",
        "a head with a weight of its own, initialised apart from the embedding",
        "forward",
        "logits",
        replacing(gpt2_jax.model.GPT2, "_head", _untied),
    ),
    Fault(
        "head tied but not updated",
        "the head uses a copy of the embedding: right until the first update",
        "gradients",
        "wte weight",
        replacing(gpt2_jax.model.GPT2, "_head", lambda head: lambda self: jax.lax.stop_gradient(head(self))),
    ),
    Fault(
        "positions from one",
        "position ids that leave room for padding, as in RoBERTa",
        "forward",
        "embeddings",
        replacing(
            gpt2_jax.model.GPT2,
            "_embed",
            lambda embed: (
                lambda self, tokens, positions: embed(
                    self, tokens, jnp.minimum(positions + 1, self.config.block_size - 1)
                )
            ),
        ),
    ),
    Fault(
        "embeddings scaled by sqrt(n_embd)",
        "what the original transformer and Gemma do, and GPT-2 doesn't",
        "forward",
        "embeddings",
        replacing(
            gpt2_jax.model.GPT2,
            "_embed",
            lambda embed: lambda self, *inputs: embed(self, *inputs) * _sqrt(self.config.n_embd),
        ),
    ),
    Fault(
        "missing ln_f",
        "GPT-1 has no layer norm before the head",
        "forward",
        "ln_f",
        replacing(gpt2_jax.model.GPT2, "__init__", _without_ln_f),
    ),
    Fault(
        "post-norm",
        "GPT-1's order: the norm after the addition",
        "forward",
        "block 0",
        replacing(gpt2_jax.model.Block, "__call__", _post_norm),
    ),
    Fault(
        "residual from after the norm",
        "apply_residual_connection_post_layernorm, BLOOM's option",
        "forward",
        "block 0, residual_1",
        replacing(gpt2_jax.model.Block, "__call__", _residual_after_norm),
    ),
    Fault(
        "loss over targets shifted twice",
        "the data is shifted, and the model's loss shifts again (Hugging Face's does)",
        "gradients",
        "ln_f",
        replacing(gpt2_jax.model.GPT2, "loss", _shifted_twice),
    ),
    Fault(
        "mean of means",
        "each accumulated part averaged over its own targets; transformers mended it in October 2024 "
        "(github.com/huggingface/transformers/pull/34191)",
        "gradients",
        "accumulation 4",
        replacing(gpt2_torch.train, "accumulate_gradients", _mean_of_means),
    ),
    Fault(
        "padded vocabulary inside the softmax",
        "rows that pad the vocabulary take part in the normalisation",
        "gradients",
        "ln_f",
        replacing(gpt2_jax.model, "summed_cross_entropy", lambda loss: lambda x, w, t, v: loss(x, w, t, len(w))),
    ),
    Fault(
        "decay on biases and norms",
        "optax.adamw without a mask",
        "optimizer",
        "JAX: decay",
        _optimizer(_decay_where(lambda name, shape: True)),
    ),
    Fault(
        "no decay on embeddings",
        "minGPT's list of what is spared, where nanoGPT goes by dimensions",
        "optimizer",
        "JAX: decay",
        _optimizer(_decay_where(lambda name, shape: len(shape) >= 2 and name not in ("wte.weight", "wpe.weight"))),
    ),
    Fault(
        "L2 in the place of decoupled decay",
        "decay chained before Adam: Adam rescales it",
        "optimizer",
        "AdamW steps",
        _optimizer(_l2),
    ),
    Fault("no bias correction", "BERT's Adam", "optimizer", "parameter", _optimizer(_no_bias_correction)),
    Fault(
        "epsilon inside the root",
        "eps_root in the place of eps",
        "optimizer",
        "parameter",
        _optimizer(_adam(eps=lambda c: 0.0, eps_root=lambda c: c.epsilon)),
    ),
    Fault(
        "betas swapped",
        "b1 and b2 given in the wrong order",
        "optimizer",
        "moment",
        _optimizer(_adam(b1=lambda c: c.beta2, b2=lambda c: c.beta1)),
    ),
    Fault(
        "clipping after the optimizer",
        "optax.chain(adamw, clip): the update is clipped, the moments see everything",
        "optimizer",
        "clipping active",
        _clipping_after_the_optimizer,
    ),
    Fault(
        "clipping per tensor",
        "each gradient scaled to the norm by itself (optax.clip_by_block_rms and its kin)",
        "optimizer",
        "clipping active",
        replacing(gpt2_jax.train_step, "clip_by_global_norm", _clip_per_tensor),
    ),
    Fault(
        "clipping without PyTorch's 1e-6",
        "optax.clip_by_global_norm: the curves part at 1e-8",
        "loss_curve",
        "AdamW steps",
        replacing(gpt2_jax.train_step, "clip_by_global_norm", _clip_as_optax),
    ),
    Fault(
        "learning rate one step early",
        "the schedule read after the counter went up",
        "schedule",
        "JAX",
        _rate(lambda rate: lambda step, steps, config: rate(step + 1, steps, config)),
    ),
    Fault(
        "learning rate one step late",
        "scheduler.step() before optimizer.step(), or a counter that starts at -1",
        "schedule",
        "JAX",
        _rate(lambda rate: lambda step, steps, config: rate(max(0, step - 1), steps, config)),
    ),
    Fault(
        "warmup from zero",
        "optax.linear_schedule(0, peak): the first update does nothing",
        "schedule",
        "JAX",
        _rate(_warmup_from_zero),
    ),
    Fault(
        "cosine to zero",
        "optax.cosine_decay_schedule's default alpha",
        "schedule",
        "JAX",
        _rate(_cosine_to_zero),
    ),
    Fault(
        "gradient sum over shards",
        "psum in the place of pmean",
        "mesh",
        "data=2",
        replacing(gpt2_jax.train_step, "loss_and_grads", _sum_over_shards),
    ),
    Fault(
        "dropout without its scale",
        "what is kept isn't divided by 1 - rate",
        "dropout",
        "steps at rate",
        replacing(gpt2_jax.dropout, "keep_probability", lambda _: lambda rate: 1.0),
    ),
    Fault(
        "dropout in evaluation",
        "model.eval() forgotten",
        "dropout",
        "PyTorch: evaluation",
        replacing(gpt2_torch.model.GPT2, "eval", _always_training),
    ),
    Fault(
        "one dropout key for everything",
        "a key passed down without folding or splitting: every layer drops the same",
        "dropout",
        "equal ones",
        replacing(gpt2_jax.model, "site", lambda site: lambda key, number: key),
    ),
    Fault(
        "KV cache off by one",
        "a new token's keys are written one place too far",
        "generation",
        "KV cache",
        replacing(gpt2_jax.model, "_write", _cache_shifted),
    ),
    Fault(
        "stale KV cache",
        "the cache of the prefill is read for ever",
        "generation",
        "KV cache",
        replacing(gpt2_jax.model, "_write", _cache_stale),
    ),
    Fault(
        "top-p without the crossing token",
        "what is kept is where cumulative < p, not where what precedes is < p",
        "generation",
        "top-p 0.9",
        _sampler("crossing"),
    ),
    Fault(
        "temperature after the filters",
        "top-p sees the untempered distribution",
        "generation",
        "top-p 0.9",
        _sampler("temperature last"),
    ),
    Fault(
        "filtered tokens leak",
        "logits set to zero, not to -inf, by top-k",
        "generation",
        "top-k 50",
        _sampler("leak"),
    ),
    Fault(
        "TF32 in the place of float32",
        "JAX's default for float32 products on Ampere and later; emulated by rounding",
        "precision",
        "float32 logits",
        replacing(gpt2_jax.layers.Linear, "__call__", _tf32),
    ),
    Fault(
        "layer norm in bfloat16",
        "statistics taken in the compute dtype",
        "precision",
        "bfloat16 logits",
        replacing(gpt2_jax.layers.LayerNorm, "__call__", _bfloat16_norm),
        prepare=lambda name, a: a + 3.0 if name == "wpe.weight" else a,
    ),
    Fault(
        "layer norm's fast variance",
        "E[x^2] - E[x]^2, Flax's default: far from zero float32 loses its digits",
        "precision",
        "float32 logits",
        replacing(gpt2_jax.layers.LayerNorm, "__call__", _fast_variance),
        prepare=lambda name, a: a + 30.0 if name == "wpe.weight" else a,
    ),
    Fault(
        "residual stream in bfloat16",
        "a model cast as a whole, model.bfloat16() or param_dtype=bfloat16, adds each block to a rounded sum",
        "precision",
        "values of the residual stream",
        replacing(gpt2_jax.model, "add_norm", _narrow_residual),
    ),
    Fault(
        "attention's softmax in bfloat16",
        "scores left in the operands' dtype: preferred_element_type forgotten",
        "precision",
        "bfloat16 program, unrolled: softmax and loss",
        replacing(gpt2_jax.attention, "_weights", _narrow_softmax),
    ),
    Fault(
        "logits in bfloat16",
        "the head's product rounded to its operands' dtype before the loss, as PyTorch's autocast does",
        "precision",
        "bfloat16 program, unrolled: softmax and loss",
        replacing(gpt2_jax.loss, "_wide", lambda _: lambda x: x.dtype),
    ),
    Fault(
        "gradients of weights rounded to bfloat16",
        "autodiff of x @ w.astype(x.dtype) makes w's gradient in x's dtype",
        "precision",
        "bfloat16 program, unrolled: gradients of parameters",
        replacing(gpt2_jax.layers, "_project", _left_to_autodiff),
    ),
    Fault(
        "gradients accumulated in bfloat16",
        "parts of a batch added up in the compute dtype",
        "precision",
        "bfloat16 program, unrolled: gradients of parameters",
        replacing(gpt2_jax.train_step, "_sum_over_parts", _narrow_parts),
    ),
    Fault(
        "what rematerialisation keeps in bfloat16",
        "a block's input rounded to save memory, in this way of executing it only",
        "precision",
        "scanned and rematerialised: values of the residual stream",
        replacing(gpt2_jax.model.GPT2, "_block_function", _kept_in_bfloat16),
    ),
    Fault(
        "gradients exchanged as they are computed",
        "the dtype of the run in the place of the one that was asked for",
        "precision",
        "gradients exchanged in another dtype than float32",
        replacing(
            gpt2_jax.train_step,
            "_exchange_dtype",
            lambda _: lambda config: "bfloat16" if config.precision == "bfloat16" else None,
        ),
    ),
    Fault(
        "a product at JAX's default precision",
        "precision=DEFAULT written at one product: TF32 on a GPU, and nothing to see on a CPU",
        "precision",
        "products that may be done in TF32",
        replacing(
            gpt2_jax.model,
            "wide_einsum",
            lambda _: (
                lambda spec, x, y: jnp.einsum(
                    spec, x, y, precision="default", preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
                )
            ),
        ),
    ),
    Fault(
        "projections into the residual stream unscaled",
        "0.02 everywhere: the 1/sqrt(2 layers) forgotten",
        "initialization",
        "c_proj.weight",
        replacing(gpt2_jax.model, "_residual_std", lambda std: lambda config: 0.02),
    ),
    Fault(
        "rotary pairs mixed up",
        "weights of one convention (half, interleaved) run with the other, as when LLaMA's are loaded unpermuted",
        "forward",
        "block 0, attn q",
        replacing(
            gpt2_jax.model,
            "rotate",
            lambda rotate: lambda x, p, c: rotate(x, p, dataclasses.replace(c, rope_pairs="interleaved")),
        ),
        model=_ROPE,
    ),
    Fault(
        "ALiBi's slopes from one",
        "2^(-8h/n) for heads counted from zero, where the paper's first slope is 2^(-8/n) "
        "(github.com/paiml/aprender/pull/2143)",
        "forward",
        "block 0, attn out",
        replacing(gpt2_jax.model, "alibi_slopes", lambda _: lambda n: tuple(2.0 ** (-8 * h / n) for h in range(n))),
        model=_ALIBI,
    ),
    Fault(
        "ALiBi's slopes by the rule for powers of two",
        "one geometric sequence whatever the number of heads (github.com/ml-explore/mlx/pull/3071)",
        "forward",
        "block 0, attn out",
        replacing(
            gpt2_jax.model, "alibi_slopes", lambda _: lambda n: tuple(2.0 ** (-8 * h / n) for h in range(1, n + 1))
        ),
        model=dataclasses.replace(_ALIBI, n_head=3, n_embd=18),
    ),
    Fault(
        "ALiBi's biases with the wrong sign",
        "key minus query or query minus key: the farther token counts more",
        "forward",
        "block 0, attn out",
        replacing(gpt2_jax.attention, "alibi_bias", lambda bias: lambda *given: -bias(*given)),
        model=_ALIBI,
    ),
    Fault(
        "ALiBi's slopes of the first shard's heads on every shard",
        "slopes made for the heads that a device holds, and not cut out of those of all heads",
        "mesh",
        "data=2, fsdp=2, tensor=2",
        replacing(gpt2_jax.model, "alibi_slopes", _slopes_of_the_first_shard),
        model=_ALIBI,
    ),
    Fault(
        "decoding without ALiBi's biases",
        "the attention that trains adds them, the one that reads the KV cache is other code",
        "generation",
        "block 0, attn out",
        replacing(gpt2_jax.model, "cached_attention", lambda attend: lambda q, k, v, p, slopes: attend(q, k, v, p)),
        model=_ALIBI,
    ),
    Fault(
        "SwiGLU's gate and value swapped",
        "which of the two projections goes through the sigmoid",
        "forward",
        "block 0, mlp activation",
        replacing(gpt2_jax.model.MLP, "__call__", _gate_and_value_swapped),
        model=_SWIGLU,
    ),
    # Naming the place.
    Fault(
        "exact GELU asked for, tanh GELU computed",
        "a setting that one side reads and the other ignores: the side that ignores it is to blame",
        "forward",
        "JAX looks like tanh GELU, and the configuration asks for mlp gelu_exact",
        replacing(jax.nn, "gelu", lambda gelu: lambda x, approximate: gelu(x, approximate=True)),
        model=dataclasses.replace(MODEL, mlp="gelu_exact"),
    ),
    Fault(
        "a mean over every target",
        "the train step divides by the size of the batch, padding too: every gradient is too small by one factor",
        "gradients",
        "ln_f: relative difference 2.8e-01, 0.71875 times as large in JAX as in PyTorch",
        lambda: mock.patch.object(gpt2_jax.train_step, "IGNORED", -math.inf),
    ),
    Fault(
        "a row without a key",
        "a mask of -inf in every column of a row: its softmax is 0/0, and NaN spreads from there",
        "forward",
        "block 0, attn out: JAX has nan at [0, 0, 0]",
        replacing(gpt2_jax.attention, "_causal_mask", _row_without_a_key),
    ),
    Fault(
        "a tensor left out by the conversion",
        "a list of names that is one short, and a loader that isn't strict: an exception is a failed case",
        "forward",
        "exceptions",
        replacing(parity.sides, "from_canonical", _tensor_left_out),
    ),
    Fault(
        "logits of the last position only",
        "what decoding needs, returned where all are asked for: numpy would repeat it and compare",
        "forward",
        "logits: shape (1, 1, 257) in JAX, (1, 16, 257) in PyTorch",
        replacing(gpt2_jax.model.GPT2, "logits", _last_position_only),
    ),
    Fault(
        "a schedule that starts again",
        "an optimizer made anew in the middle of a run, whose counter begins at zero",
        "loss_curve",
        "step 5: parameter of",
        _rate(_restarted(5)),
    ),
    Fault(
        "one mask for every sequence",
        "dropout without a batch axis, broadcast: no two masks are equal as wholes, and every sequence loses the same",
        "dropout",
        "sequence 0 with embeddings of step 0, part 0, sequence 1",
        replacing(gpt2_jax.train_step, "dropout_keys", _one_key),
    ),
    Fault(
        "one mask for all heads",
        "broadcast_dropout=True, the default of Flax's attention",
        "dropout",
        "block 0, attn weights with block 0, attn weights, displaced by [0, 1, 0, 0]",
        replacing(gpt2_jax.attention, "dropout_mask", _one_mask_for_all_heads),
    ),
    Fault(
        "attention's dropout forgotten",
        "a kernel that takes no rate: two sites of three drop out",
        "dropout",
        "(4, 68, 36) where (4, 2, 68, 68) of block 0, attn weights is due",
        replacing(
            gpt2_jax.attention,
            "_dropout_masks",
            lambda _: lambda shape, *_: [None] * len(gpt2_jax.attention._blocks(shape[2])),
        ),
    ),
    Fault(
        "the rate kept in the place of dropped",
        "bernoulli(rate) taken for what is kept, at one of the sites",
        "dropout",
        "block 0, attn weights",
        replacing(
            gpt2_jax.attention, "dropout_mask", lambda draw: lambda keys, shape, rate: draw(keys, shape, 1 - rate)
        ),
    ),
    Fault(
        "masks that depend on the precision",
        "jax.random.bernoulli draws others in float64: no run in one precision can be held against another",
        "dropout",
        "bfloat16, part 0, embeddings",
        replacing(gpt2_jax.model, "dropout", _key_of_the_dtype),
    ),
    Fault(
        "every step seeded alike",
        "torch.manual_seed(seed) moved into the loop: each step drops the same",
        "dropout",
        "embeddings of step 0, part 0, sequence 0 with embeddings of step 1, part 0, sequence 0",
        replacing(gpt2_torch.train, "dropout_seed", lambda _: lambda seed, step, rank, processes: seed),
    ),
    Fault(
        "uniform weights of the same variance",
        "Xavier's or Kaiming's uniform form, scaled to the right standard deviation",
        "initialization",
        "JAX: mean, variance and normal shape of 10 tensors, -log10 p shape of wte.weight",
        replacing(jax.random, "normal", _uniform),
    ),
    Fault(
        "truncated normal weights",
        "the truncated_normal of JAX's and Flax's initialisers, which scale it to the variance asked for",
        "initialization",
        "JAX: mean, variance and normal shape of 10 tensors, -log10 p shape of wte.weight",
        replacing(jax.random, "normal", _truncated),
    ),
    Fault(
        "every layer begins alike",
        "one key given to each block: layers are copies, and the symmetry between them is never broken by the weights",
        "initialization",
        "h.0.attn.c_attn.weight with h.1.attn.c_attn.weight",
        replacing(gpt2_jax.model.Block, "__init__", _layers_alike),
    ),
    Fault(
        "PyTorch's own biases",
        "nn.Linear draws its bias, and GPT-2's is zero",
        "initialization",
        "PyTorch: biases that aren't 0",
        replacing(torch.nn.init, "zeros_", lambda _: lambda parameter: parameter),
    ),
    Fault(
        "windows left out",
        "range(0, len(tokens) - 2 * T, T): the last window of the text is never trained on, whichever framework",
        "trainer",
        "windows left out",
        replacing(gpt2_core.batches.Windows, "__len__", lambda length: lambda self: length(self) - 1),
    ),
    Fault(
        "validation reads the beginning only",
        "the first sequences of the split in the place of some from all over it, by both trainers",
        "trainer",
        "validation after 0 updates, loss",
        replacing(gpt2_core.batches, "_spread", lambda _: lambda count, of: list(range(min(count, of)))),
    ),
    Fault(
        "evaluation averages batches",
        "the mean of the batches' mean losses: the last, mostly padding, counts as much as a full one",
        "trainer",
        "validation after 0 updates, loss",
        replacing(gpt2_torch.train, "evaluate", _mean_of_batch_means),
    ),
    Fault(
        "padding counts in the mean",
        "the summed loss over the number of targets, those that are ignored included",
        "trainer",
        "JAX, interrupted and resumed: figures validation after 0 updates",
        replacing(gpt2_jax.train, "IGNORED", lambda _: IGNORED - 1),
    ),
    Fault(
        "validation on the training text",
        "one variable in the place of another: the curve looks better than it is",
        "trainer",
        "validation after 0 updates, loss",
        replacing(gpt2_torch.train, "open_tokens", _validation_is_training),
    ),
    Fault(
        "the model stays in evaluation mode",
        "model.train() forgotten after an evaluation: no dropout from then on",
        "trainer",
        "PyTorch, dropout: watched, interrupted and resumed, or neither step 1, loss",
        replacing(gpt2_torch.train, "evaluate", _left_in_evaluation),
    ),
    Fault(
        "the last part's loss is logged",
        "of an accumulated batch, as loss.item() after the loop gives it",
        "trainer",
        "step 0, loss",
        replacing(gpt2_torch.train, "accumulate_gradients", _last_part_only),
    ),
    Fault(
        "the gradient norm is logged after clipping",
        "it then never exceeds the limit, and says nothing of the run",
        "trainer",
        "step 0, gradient norm",
        replacing(gpt2_torch.train, "train_step", _norm_after_clipping),
    ),
    Fault(
        "the optimizer isn't restored",
        "a run goes on with its weights and without their moments",
        "trainer",
        "PyTorch, interrupted and resumed: figures step 6",
        replacing(gpt2_torch.checkpoints, "restore", _model_alone),
    ),
    Fault(
        "a resumed run begins the text again",
        "the data loader's position isn't part of the checkpoint",
        "trainer",
        "JAX, interrupted and resumed: figures step 6",
        replacing(gpt2_jax.train._Loop, "run", _batches_from_the_start),
    ),
    Fault(
        "a resumed run begins the schedule again",
        "a counter of its own: a second warmup",
        "trainer",
        "step 6, learning rate",
        replacing(gpt2_jax.train._Loop, "run", _schedule_from_the_start),
    ),
    Fault(
        "a resumed run keeps what it does again in the log",
        "steps after the checkpoint are there twice",
        "trainer",
        "logged steps",
        replacing(gpt2_core.run_folder, "_cut_metrics", lambda _: lambda *arguments, **options: None),
    ),
    Fault(
        "the best checkpoint is the one with the largest loss",
        "max in the place of min, as for an accuracy",
        "trainer",
        "best 12, where [5, 12] and 5 are due",
        replacing(gpt2_core.run_folder.RunFolder, "best_step", _largest_loss),
    ),
    Fault(
        "checkpoints are never removed",
        "the disk fills up some days into the run",
        "trainer",
        "kept [5, 10, 12]",
        replacing(gpt2_core.run_folder.RunFolder, "remove_obsolete", lambda _: lambda self, keep: None),
    ),
    Fault(
        "the same masks at every step",
        "the generator seeded alike before each step, so that dropout is reproducible",
        "trainer",
        "PyTorch, dropout: every step has masks of its own",
        replacing(torch, "manual_seed", lambda seed: lambda _: seed(0)),
    ),
    Fault(
        "every sample from the same numbers",
        "a generator seeded anew for each sample",
        "trainer",
        "samples",
        replacing(gpt2_torch.train, "uniforms", lambda draw: lambda seed, sample, count: draw(seed, 0, count)),
    ),
    # --- what shows at no default, at one size or in one combination only
    Fault(
        "beta2 written into the code",
        "optax's own b2, or the recipe's, in the place of the configuration's",
        "settings",
        "layer norm, warmup, clipping",
        _optimizer(_adam(b2=lambda c: 0.95)),
    ),
    Fault(
        "RMS norm's epsilon written into the code",
        "LayerNorm takes the configured one and RMSNorm, added later, has a constant",
        "settings",
        "forward: block 0, ln_1",
        replacing(
            gpt2_jax.layers.RMSNorm,
            "__init__",
            lambda init: lambda self, size, **options: init(self, size, **options | {"epsilon": 1e-5}),
        ),
    ),
    Fault(
        "clipping to a norm of zero",
        "0 means no clipping, and the formula is applied all the same: nothing is learned",
        "settings",
        "no warmup, no clipping",
        replacing(gpt2_jax.train_step, "clip_by_global_norm", _clip_to_nothing),
    ),
    Fault(
        "last tokens of a sequence left out of the loss",
        "a length that the chunks don't divide, cut down to what they do",
        "sizes",
        "chunks with a remainder",
        replacing(gpt2_jax.loss, "_chunks", _chunks_without_remainder),
    ),
    Fault(
        "KV cache grown empty",
        "a larger cache is allocated, and what was in the smaller isn't copied",
        "sizes",
        "a cache that grows",
        replacing(gpt2_jax.generate, "_grow", _cache_grown_empty),
    ),
    Fault(
        "the last of equal logits",
        "numpy's argsort read from its end, where argmax takes the first",
        "sizes",
        "equal logits, greedy",
        replacing(gpt2_jax.generate, "sample", _last_of_equals),
    ),
    Fault(
        "layers in the order of their names",
        "sorted as text, h.10 comes before h.2: right up to ten layers",
        "sizes",
        "11 layers, scanned",
        replacing(gpt2_jax.model.GPT2, "_scan_blocks", _layers_by_name),
    ),
    Fault(
        "one dropout key for all scanned layers",
        "the key closed over by the scanned function in the place of one for each layer",
        "combinations",
        "row 1",
        replacing(gpt2_jax.model, "site", _one_key_when_scanned),
    ),
    Fault(
        "rotary base of the default in the decoder",
        "training reads the configuration, decoding has a table of its own",
        "combinations",
        "KV cache against PyTorch",
        replacing(gpt2_jax.model, "rotate", _default_base_when_decoding),
    ),
    Fault(
        "float64 weights through float32",
        "a conversion with a dtype of its own on the way: the dtype is right, the digits are gone",
        "weights",
        "11 layers in float64",
        replacing(gpt2_torch.weights, "to_tensor", _through_float32),
    ),
    Fault(
        "a file's layers in the order of their names",
        "reader and writer sort alike: the round trip is bitwise, and llm.c reads other weights",
        "weights",
        "llmc: the tensors",
        replacing(gpt2_convert.llmc, "_order", _layers_of_a_file_by_name),
    ),
    Fault(
        "layer norm's epsilon not read from config.json",
        "a setting that a format says and its reader leaves at the default",
        "weights",
        "layer_norm_epsilon 0.03 becomes 1e-05",
        replacing(
            gpt2_convert.hugging_face,
            "_SETTINGS",
            lambda settings: {n: v for n, v in settings.items() if n != "layer_norm_epsilon"},
        ),
    ),
)


def prove() -> Iterator[Verdict]:
    """Judge every fault, one after the other."""
    for fault in FAULTS:
        yield judge(fault)
