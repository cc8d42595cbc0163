"""The training state, how it is born sharded, and the one compiled step that advances it.

Shapes: A accumulation, B sequences computed at once, T time.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_core.batches import IGNORED, Batch
from gpt2_core.config import TrainConfig
from gpt2_jax.model import Definition, Params
from gpt2_jax.optimizer import clip_by_global_norm, make_optimizer
from gpt2_jax.sharding import sharding, spec


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

    def step(state: TrainState, inputs_ABT: jax.Array, targets_ABT: jax.Array, learning_rate: jax.Array):
        key = step_key(config.seed, state.step) if config.model.dropout > 0 else None
        loss, grads = loss_and_grads(definition, state.params, inputs_ABT, targets_ABT, dropout_key=key)
        grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        grads, grad_norm = clip_by_global_norm(grads, config.optimizer.clip_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), state.params, updates)
        return TrainState(params, opt_state, state.step + 1), Metrics(loss, grad_norm)

    replicated = NamedSharding(mesh, PartitionSpec())
    tokens = batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, tokens, tokens, replicated),
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


def step_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def part_key(key: jax.Array, number: int | jax.Array) -> jax.Array:
    """The key of one part of a step's batch."""
    return jax.random.fold_in(key, number)


def loss_and_grads(
    definition: Definition,
    params: Params,
    inputs_ABT: jax.Array,
    targets_ABT: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Params]:
    """Mean loss over all targets that count, and its gradient, computed one of the A parts at a time."""
    count = jnp.sum(targets_ABT != IGNORED)

    def part_loss(params: Params, part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, inputs_BT, targets_BT = part
        key = None if dropout_key is None else part_key(dropout_key, number)
        return definition.merge(params).loss(inputs_BT, targets_BT, dropout_key=key) / count

    of_part = jax.value_and_grad(part_loss)
    parts = (jnp.arange(inputs_ABT.shape[0]), inputs_ABT, targets_ABT)
    first = jax.tree.map(lambda x: x[0], parts)
    if inputs_ABT.shape[0] == 1:
        return of_part(params, first)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(params, part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, params, first))
    return jax.lax.scan(add, zeros, parts)[0]


def make_eval_step(definition: Definition, mesh: Mesh) -> Callable[..., jax.Array]:
    """The jitted function (params, inputs_BT, targets_BT) -> summed loss of the targets that count."""
    params = {name: sharding(mesh, axes) for name, axes in definition.logical_axes.items()}
    tokens = NamedSharding(mesh, spec(("batch", None)))
    return jax.jit(
        lambda params, inputs_BT, targets_BT: definition.merge(params).loss(inputs_BT, targets_BT),
        in_shardings=(params, tokens, tokens),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a training batch (A, B, T): the sequences of each part are split over `data` and `fsdp`."""
    return NamedSharding(mesh, spec((None, "batch", None)))


def put_batch(batch: Batch, accumulation: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """A host batch (A*B, T) as device arrays (A, B, T), each device getting its own sequences only."""
    where = batch_sharding(mesh)
    return tuple(jax.device_put(x.reshape(accumulation, -1, x.shape[-1]), where) for x in batch)
