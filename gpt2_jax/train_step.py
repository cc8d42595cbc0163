"""A training on a mesh: its state, how that is sharded from the start, and the compiled steps that read and update it.

Shapes: A accumulation, B sequences computed at once, T time.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_core.config import IGNORE_INDEX, ResolvedConfig, dtype_of
from gpt2_core.data.batches import Batch
from gpt2_core.spikes import NO_LOSS, WINDOW
from gpt2_jax.definition import Definition, Params, define
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.model import Execution
from gpt2_jax.optimizer import clip_by_global_norm, make_optimizer
from gpt2_jax.sharding import (
    Axes,
    batch_is_sharded,
    exchange,
    exchanged_axes,
    gather,
    make_mesh,
    per_shard,
    sharding,
    sum_over_shards,
)
from gpt2_jax.spikes import loss_limit, with_loss

T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step", "losses"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `step` counts the steps made, int32, those whose update was left out too."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    losses: jax.Array | None = None
    """Of the steps before, as `gpt2_jax.spikes` compares the next loss with them; None where spikes aren't left out."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step: the mean loss, the gradient norm before clipping, and the highest loss that isn't a spike.

    The last is None where spikes aren't left out."""

    loss: jax.Array
    grad_norm: jax.Array
    loss_limit: jax.Array | None = None


jax.tree_util.register_dataclass(Metrics, data_fields=["loss", "grad_norm", "loss_limit"], meta_fields=[])


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a resolved configuration determines on a mesh, made once: model, optimizer, shardings, and the steps."""

    config: ResolvedConfig
    mesh: Mesh
    definition: Definition
    optimizer: optax.GradientTransformationExtraArgs

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """The sharding of each array of the state: a TrainState of NamedShardings. Moments have their parameter's."""
        params = {name: sharding(self.mesh, axes) for name, axes in self.definition.logical_axes.items()}
        opt_state = optax.tree.map_params(
            self.optimizer,
            lambda _, where: where,
            jax.eval_shape(self.optimizer.init, dict(self.definition.abstract)),
            params,
            transform_non_params=lambda _: self._replicated,
        )
        return TrainState(params, opt_state, self._replicated, self._if_spikes(self._replicated))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without any array."""
        state = jax.eval_shape(self._new_state, dict(self.definition.abstract))
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, self.state_shardings
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of a training batch (A, B, T): the sequences of each part are split over `data` and `fsdp`."""
        return sharding(self.mesh, (None, "batch", None))

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def initial_state(self, params: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """A state before its first step, sharded from the start: no device ever holds a whole array.

        `params`, as numpy arrays in this package's shapes, are used instead of random ones.
        """
        shardings = self.state_shardings
        with jax.set_mesh(self.mesh):
            if params is not None:
                return jax.jit(self._new_state, out_shardings=shardings)(self.put_params(params))
            create = jax.jit(
                lambda: self._new_state(self.definition.initialize(jax.random.key(self.config.seed))),
                out_shardings=shardings,
            )
            return create()

    def put_params(self, params: Mapping[str, np.ndarray]) -> Params:
        """Parameters in this package's shapes as device arrays; each device gets its own part only."""
        return {name: _put(np.asarray(params[name]), self.state_shardings.params[name]) for name in params}

    def _new_state(self, params: Params) -> TrainState:
        losses = self._if_spikes(jnp.full(WINDOW, NO_LOSS, self.definition.execution.param_dtype))
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32), losses)

    def _if_spikes(self, value: T) -> T | None:
        """The value, where updates of spikes are left out."""
        return None if self.config.skip_spikes is None else value

    @functools.cached_property
    def rows(self) -> list[int]:
        """Places in a batch (A*B) of the sequences that this process's devices compute, all of them in one process.

        Several processes have the same where a `tensor` axis goes across them.
        """
        parts, size = self.config.accumulation, self.config.microbatch_size
        return [part * size + row for part in range(parts) for row in self._rows_of_part]

    @functools.cached_property
    def _rows_of_part(self) -> list[int]:
        size = self.config.microbatch_size
        slices = sharding(self.mesh, ("batch",)).addressable_devices_indices_map((size,)).values()
        return sorted({row for (rows,) in slices for row in range(size)[rows]})

    def put_batch(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """This process's `rows` of a batch as device arrays (A, B, T) of the whole batch; each device gets its own
        sequences only."""
        parts, size = self.config.accumulation, self.config.microbatch_size
        return tuple(
            jax.make_array_from_process_local_data(
                self.batch_sharding, x.reshape(parts, -1, x.shape[-1]), (parts, size, x.shape[-1])
            )
            for x in batch
        )

    def put_evaluation(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """A batch (B, T) that every process has read, as device arrays."""
        return tuple(_put(x, sharding(self.mesh, ("batch", None))) for x in batch)

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """The jitted step (state, inputs_ABT, targets_ABT, learning_rate) -> (state, metrics), donating its state.

        The loss is the mean over the targets that count of all A parts together, so accumulation changes memory only.
        """
        config, axes = self.config, self.definition.logical_axes
        tokens, dropout = (None, "batch", None), config.model.dropout > 0
        sharded_loss_and_grads = per_shard(
            functools.partial(loss_and_grads, self.definition, exchange_dtype=_exchange_dtype(config)),
            self.mesh,
            (_whole(axes), tokens, tokens, (None, "batch") if dropout else None),
            ((), {name: exchanged_axes(of_parameter, self.mesh) for name, of_parameter in axes.items()}),
        )

        def step(state: TrainState, inputs_ABT: jax.Array, targets_ABT: jax.Array, learning_rate: jax.Array):
            keys_AB = dropout_keys(config.seed, state.step, inputs_ABT.shape[:2]) if dropout else None
            loss, grads = sharded_loss_and_grads(self._gather(state.params), inputs_ABT, targets_ABT, keys_AB)
            grads = jax.lax.with_sharding_constraint(grads, self.state_shardings.params)
            grads, grad_norm = clip_by_global_norm(grads, config.optimizer.clip_norm)
            # Decided on the device, so that the host needn't wait.
            is_update, limit, losses = jnp.isfinite(loss) & jnp.isfinite(grad_norm), None, None
            if state.losses is not None:
                limit, losses = loss_limit(state.losses, config.skip_spikes), with_loss(state.losses, loss)
                is_update &= loss <= limit
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, is_update=is_update)
            params = jax.tree.map(
                lambda p, u: jnp.where(is_update, p - (learning_rate * u).astype(p.dtype), p), state.params, updates
            )
            return TrainState(params, opt_state, state.step + 1, losses), Metrics(loss, grad_norm, limit)

        return jax.jit(
            step,
            in_shardings=(self.state_shardings, self.batch_sharding, self.batch_sharding, self._replicated),
            out_shardings=(self.state_shardings, self._replicated),
            donate_argnums=0,
        )

    @functools.cached_property
    def eval_step(self) -> Callable[..., jax.Array]:
        """The jitted function (params, inputs_BT, targets_BT) -> summed loss of the targets that count."""
        tokens = ("batch", None)
        sharded_loss = per_shard(
            lambda params, *batch: sum_over_shards(self.definition.merge(params).loss(*batch)),
            self.mesh,
            (_whole(self.definition.logical_axes), tokens, tokens),
            (),
        )
        return jax.jit(
            lambda params, *batch: sharded_loss(self._gather(params), *batch),
            in_shardings=(self.state_shardings.params, *2 * [sharding(self.mesh, tokens)]),
            out_shardings=self._replicated,
        )

    @functools.cached_property
    def score_step(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The jitted function (params, inputs_BT, targets_BT) -> of each target (B, T) its log-probability, and whether
        it is the likeliest token. It compiles for each shape."""
        tokens = ("batch", None)
        sharded_scores = per_shard(
            lambda params, *batch: self.definition.merge(params).log_probabilities(*batch),
            self.mesh,
            (_whole(self.definition.logical_axes), tokens, tokens),
            (tokens, tokens),
        )
        return jax.jit(
            lambda params, *batch: sharded_scores(self._gather(params), *batch),
            in_shardings=(self.state_shardings.params, *2 * [sharding(self.mesh, tokens)]),
            out_shardings=(self._replicated, self._replicated),
        )

    @functools.cached_property
    def is_finite(self) -> Callable[[TrainState], jax.Array]:
        """The jitted function (state) -> whether every number of the state is finite."""
        return jax.jit(
            lambda state: jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)])),
            out_shardings=self._replicated,
        )

    def compile_train_step(self, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """The train step, compiled from shapes alone, in any thread, with these of XLA's options."""
        config = self.config
        with self._own_x64():
            # Not inside `set_mesh`: optax computes a scalar eagerly, and the devices of a topology description can't.
            state = self.abstract_state
            shape = (config.accumulation, config.microbatch_size, config.tokens_per_sequence)
            tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self.batch_sharding)
            rate = jax.ShapeDtypeStruct((), self.definition.execution.param_dtype)
            with jax.set_mesh(self.mesh):
                return self.train_step.lower(state, tokens, tokens, rate).compile(options and dict(options))

    def compile_eval_step(self) -> jax.stages.Compiled:
        """The evaluation of as many sequences as a train step computes at once, compiled likewise."""
        config = self.config
        with self._own_x64(), jax.set_mesh(self.mesh):
            tokens = jax.ShapeDtypeStruct((config.microbatch_size, config.tokens_per_sequence), np.int32)
            return self.eval_step.lower(dict(self.definition.abstract), tokens, tokens).compile()

    def _own_x64(self) -> contextlib.AbstractContextManager:
        # A context manager's setting in one thread doesn't hold in another.
        return jax.enable_x64(self.definition.execution.param_dtype == "float64")

    def _gather(self, params: Params) -> Params:
        """The parameters as every batch shard computes with them."""
        definition = self.definition
        return gather(params, definition.logical_axes, self.mesh, definition.narrow, definition.execution.dtype)


def make_program(config: ResolvedConfig, devices: Sequence[jax.Device] | None = None) -> Program:
    """The program of a resolved configuration, on these devices (None: this machine's)."""
    execution = Execution(
        dtype_of(config.precision), config.attention, config.scan_layers, config.remat, config.norm_kernel
    )
    return Program(
        config,
        make_mesh(parse_mesh(config.mesh), devices),
        define(config.model, execution),
        optax.with_extra_args_support(make_optimizer(config.optimizer, config.model)),
    )


def _exchange_dtype(config: ResolvedConfig) -> str | None:
    return "bfloat16" if config.gradient_exchange == "bfloat16" else None


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
    count = sum_over_shards(jnp.sum(targets_ABT != IGNORE_INDEX))

    def part_loss(params: Params, part: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        inputs_BT, targets_BT, keys_B = part
        return definition.merge(params).loss(inputs_BT, targets_BT, dropout_keys_B=keys_B) / count

    parts = (inputs_ABT, targets_ABT, dropout_keys_AB)
    loss, grads = _sum_over_parts(functools.partial(jax.value_and_grad(part_loss), params), parts)
    # The backward pass ends with the first block: its gradients and the embeddings' come last.
    first_block = [name for name in grads if name.startswith("h.0.")]
    return sum_over_shards(loss), exchange(grads, definition.logical_axes, exchange_dtype, last=first_block)


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


def _put(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """An array that every process has, sharded: a device gets its own part only."""
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def _whole(logical_axes: Mapping[str, Axes]) -> dict[str, Axes]:
    """The axes of gathered parameters inside `per_shard`."""
    return {name: (None,) * len(axes) for name, axes in logical_axes.items()}
