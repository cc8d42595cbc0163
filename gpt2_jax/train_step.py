"""The training state, how it is born sharded, and the one compiled step that advances it.

Shapes: A accumulation, B sequences computed at once, T time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_core.batches import Batch
from gpt2_core.config import IGNORED, TrainConfig
from gpt2_jax.model import Definition, Params
from gpt2_jax.optimizer import clip_by_global_norm, make_optimizer
from gpt2_jax.sharding import (
    Axes,
    batch_is_sharded,
    exchange,
    exchanged_axes,
    gather,
    per_shard,
    sharding,
    spec,
    sum_over_shards,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `step` counts the updates made, int32."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step: the mean loss and the gradient norm before clipping."""

    loss: jax.Array
    grad_norm: jax.Array


jax.tree_util.register_dataclass(Metrics, data_fields=["loss", "grad_norm"], meta_fields=[])


def state_shardings(definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each array of the state lies: a TrainState of NamedShardings. Moments lie as their parameters do."""
    params = {name: sharding(mesh, axes) for name, axes in definition.logical_axes.items()}
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, dict(definition.abstract)),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params, opt_state, replicated)


def abstract_state(definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array."""
    state = jax.eval_shape(lambda params: _new_state(params, optimizer), dict(definition.abstract))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        state_shardings(definition, optimizer, mesh),
    )


def initial_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """A state before its first step, sharded from birth: no device ever holds an array whole.

    `params`, as numpy arrays in this package's shapes, take the place of the random ones.
    """
    shardings = state_shardings(definition, optimizer, mesh)
    with jax.set_mesh(mesh):
        if params is not None:
            params = {name: jax.device_put(np.asarray(params[name]), shardings.params[name]) for name in params}
            return jax.jit(lambda p: _new_state(p, optimizer), out_shardings=shardings)(params)
        create = jax.jit(
            lambda: _new_state(definition.initialize(jax.random.key(seed)), optimizer), out_shardings=shardings
        )
        return create()


def _new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    definition: Definition, config: TrainConfig, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step (state, inputs_ABT, targets_ABT, learning_rate) -> (state, metrics), donating its state.

    The loss is the mean over the targets that count of all A parts together, so accumulation changes memory only.
    """
    optimizer = make_optimizer(config.optimizer, config.model)
    shardings = state_shardings(definition, optimizer, mesh)
    tokens, dropout = (None, "batch", None), config.model.dropout > 0
    sharded_loss_and_grads = per_shard(
        functools.partial(loss_and_grads, definition, exchange_dtype=_exchange_dtype(config)),
        mesh,
        (_whole(definition), tokens, tokens, (None, "batch") if dropout else None),
        ((), {name: exchanged_axes(axes, mesh) for name, axes in definition.logical_axes.items()}),
    )

    def step(state: TrainState, inputs_ABT: jax.Array, targets_ABT: jax.Array, learning_rate: jax.Array):
        keys_AB = dropout_keys(config.seed, state.step, inputs_ABT.shape[:2]) if dropout else None
        whole = gather_parameters(definition, state.params, mesh)
        loss, grads = sharded_loss_and_grads(whole, inputs_ABT, targets_ABT, keys_AB)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        grads, grad_norm = clip_by_global_norm(grads, config.optimizer.clip_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), state.params, updates)
        return TrainState(params, opt_state, state.step + 1), Metrics(loss, grad_norm)

    replicated, where = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, where, where, replicated),
        out_shardings=(shardings, Metrics(replicated, replicated)),
        donate_argnums=0,
    )


def compile_train_step(config: TrainConfig, definition: Definition, mesh: Mesh) -> jax.stages.Compiled:
    """The train step of a resolved configuration, compiled from shapes alone, in any thread."""
    # What `with` set in another thread isn't set in this one.
    with jax.enable_x64(definition.execution.param_dtype == "float64"):
        # Not inside `set_mesh`: optax computes a scalar eagerly, which the devices of a topology description can't.
        state = abstract_state(definition, make_optimizer(config.optimizer, config.model), mesh)
        shape = (config.accumulation, config.microbatch_size, config.model.block_size)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
        rate = jax.ShapeDtypeStruct((), definition.execution.param_dtype)
        step = make_train_step(definition, config, mesh)
        with jax.set_mesh(mesh):
            return step.lower(state, tokens, tokens, rate).compile()


def compile_eval_step(config: TrainConfig, definition: Definition, mesh: Mesh) -> jax.stages.Compiled:
    """The evaluation of as many sequences as a train step computes at once, compiled likewise."""
    with jax.enable_x64(definition.execution.param_dtype == "float64"), jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((config.microbatch_size, config.model.block_size), np.int32)
        return make_eval_step(definition, mesh).lower(dict(definition.abstract), tokens, tokens).compile()


def dropout_keys(seed: int, step: int | jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The keys of a step's dropout masks, (A, B): one for each sequence, whichever device computes it."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    numbers_AB = jnp.arange(math.prod(shape)).reshape(shape)
    return jax.vmap(jax.vmap(functools.partial(jax.random.fold_in, key)))(numbers_AB)


def loss_and_grads(
    definition: Definition,
    params: Params,
    inputs_ABT: jax.Array,
    targets_ABT: jax.Array,
    dropout_keys_AB: jax.Array | None = None,
    *,
    exchange_dtype: str | None = None,
) -> tuple[jax.Array, Params]:
    """Mean loss over all targets that count, and its gradient, computed one of the A parts at a time.

    Inside `gpt2_jax.sharding.per_shard` the batch is one shard's, and loss and gradients are those of all shards.
    Gradients are exchanged after the last part, however many there are, as `exchange_dtype` (None: as they are).
    """
    count = sum_over_shards(jnp.sum(targets_ABT != IGNORED))

    def part_loss(params: Params, part: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        inputs_BT, targets_BT, keys_B = part
        return definition.merge(params).loss(inputs_BT, targets_BT, dropout_keys_B=keys_B) / count

    parts = (inputs_ABT, targets_ABT, dropout_keys_AB)
    loss, grads = _sum_over_parts(functools.partial(jax.value_and_grad(part_loss), params), parts)
    return sum_over_shards(loss), exchange(grads, definition.logical_axes, exchange_dtype)


def _sum_over_parts(of_part: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of a function of each part, one after the other.

    The last stands after the loop over the others: it is what the exchange of the sum can overlap with.
    """
    last = len(jax.tree.leaves(parts)[0]) - 1
    if last == 0:
        return of_part(jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if not batch_is_sharded():
        return jax.lax.scan(add, zeros, parts)[0]
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(lambda x: x[:last], parts))
    return add(*jax.lax.optimization_barrier((total, jax.tree.map(lambda x: x[last], parts))))[0]


def gather_parameters(definition: Definition, params: Params, mesh: Mesh) -> Params:
    """The parameters as every batch shard computes with them."""
    return gather(params, definition.logical_axes, mesh, definition.narrow, definition.execution.dtype)


def _whole(definition: Definition) -> dict[str, Axes]:
    """The axes of gathered parameters inside `per_shard`."""
    return {name: (None,) * len(axes) for name, axes in definition.logical_axes.items()}


def _exchange_dtype(config: TrainConfig) -> str | None:
    return "bfloat16" if config.gradient_exchange == "bfloat16" else None


def make_eval_step(definition: Definition, mesh: Mesh) -> Callable[..., jax.Array]:
    """The jitted function (params, inputs_BT, targets_BT) -> summed loss of the targets that count."""

    tokens = ("batch", None)
    sharded_loss = per_shard(
        lambda params, *batch: sum_over_shards(definition.merge(params).loss(*batch)),
        mesh,
        (_whole(definition), tokens, tokens),
        (),
    )
    return jax.jit(
        lambda params, *batch: sharded_loss(gather_parameters(definition, params, mesh), *batch),
        in_shardings=(
            {name: sharding(mesh, axes) for name, axes in definition.logical_axes.items()},
            *2 * [NamedSharding(mesh, spec(tokens))],
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a training batch (A, B, T): the sequences of each part are split over `data` and `fsdp`."""
    return NamedSharding(mesh, spec((None, "batch", None)))


def put_batch(batch: Batch, accumulation: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """A host batch (A*B, T) as device arrays (A, B, T), each device getting its own sequences only."""
    where = batch_sharding(mesh)
    return tuple(jax.device_put(x.reshape(accumulation, -1, x.shape[-1]), where) for x in batch)
