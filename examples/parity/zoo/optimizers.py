"""Optimizers: parameters after ten steps, PyTorch's against Optax's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from .frameworks import data
from .rows import Pair, Row

FAMILY = "optimizers"
TITLE = "Optimizers"

LEARNING_RATE = 1e-2
STEPS = 10
START = {"matrix": data(4, 3, seed=1), "vector": data(3, seed=2)}
PULL = {name: data(*value.shape, seed=index + 5) for index, (name, value) in enumerate(START.items())}


def gradients(parameters: dict, step: int) -> dict:
    """Of a loss that changes from step to step; any framework's arrays."""
    return {name: 0.05 * ((step + 1) * value + (5 - step) * PULL[name]) for name, value in parameters.items()}


def torch_run(make: Callable, prepare: Callable | None = None, start: dict | None = None) -> tuple[torch.Tensor, ...]:
    """Ten steps; `prepare` changes the gradients before each."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in (start or START).items()}
    optimizer = make(parameters.values())
    for step in range(STEPS):
        for name, gradient in gradients(
            {name: value.detach().numpy() for name, value in parameters.items()}, step
        ).items():
            parameters[name].grad = torch.from_numpy(np.asarray(gradient))
        if prepare:
            prepare(parameters.values())
        optimizer.step()
    return tuple(parameters.values())


def optax_run(optimizer: optax.GradientTransformation, start: dict | None = None) -> tuple[jax.Array, ...]:
    parameters = {name: jnp.asarray(value) for name, value in (start or START).items()}
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(gradients(parameters, step), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return tuple(parameters.values())


def _spelled(arguments: dict) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def _row(
    torch_name: str,
    torch_arguments: dict,
    optax_name: str,
    optax_arguments: dict,
    change: dict | None = None,
    note: str = "",
    claim: str = "",
    start: dict | None = None,
) -> Row:
    """An optimizer of each side, by name and arguments; `change` is put over Optax's."""
    one = getattr(torch.optim, torch_name)
    other = functools.reduce(getattr, optax_name.split("."), optax)

    def run(**more) -> Pair:
        reference = torch_run(lambda parameters: one(parameters, lr=LEARNING_RATE, **torch_arguments), start=start)
        return reference, optax_run(other(LEARNING_RATE, **optax_arguments | more), start)

    return Row(
        FAMILY,
        f"torch.optim.{torch_name}(lr{_spelled(torch_arguments)})",
        f"optax.{optax_name}(lr{_spelled(optax_arguments)})",
        "Optax",
        run,
        None if change is None else lambda: run(**change),
        "" if change is None else f"`{_spelled(change).removeprefix(', ')}`",
        note,
        claim=claim or ("equal" if change is None else "after"),
    )


def _decayed(torch_name: str, optimizer: Callable, decayed: bool, **arguments) -> Pair:
    """PyTorch's weight_decay=0.1, as an addition to the gradient."""
    one = getattr(torch.optim, torch_name)
    reference = torch_run(lambda parameters: one(parameters, lr=LEARNING_RATE, weight_decay=0.1, **arguments))
    chain = optimizer(LEARNING_RATE, **arguments)
    return reference, optax_run(optax.chain(optax.add_decayed_weights(0.1), chain) if decayed else chain)


def _clipped(exact: bool) -> Pair:
    """Clipping by the norm of all gradients, before plain SGD."""

    def clip_as_torch(max_norm: float) -> optax.GradientTransformation:
        def update(updates, state, parameters=None):
            factor = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + 1e-6))
            return jax.tree.map(lambda value: value * factor, updates), state

        return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)

    reference = torch_run(
        lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
    )
    clip = clip_as_torch(1.0) if exact else optax.clip_by_global_norm(1.0)
    return reference, optax_run(optax.chain(clip, optax.sgd(LEARNING_RATE)))


def _clipped_values() -> Pair:
    reference = torch_run(
        lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.5),
    )
    return reference, optax_run(optax.chain(optax.clip(0.5), optax.sgd(LEARNING_RATE)))


def _dampened(by_hand: bool) -> Pair:
    """PyTorch's dampening leaves the first step's gradient whole."""

    def trace(decay: float, dampening: float) -> optax.GradientTransformation:
        def init(parameters):
            return jax.tree.map(jnp.zeros_like, parameters), jnp.zeros([], jnp.int32)

        def update(updates, state, parameters=None):
            trace, step = state
            share = jnp.where(step == 0, 1.0, 1 - dampening)
            trace = jax.tree.map(lambda t, g: decay * t + share * g, trace, updates)
            return trace, (trace, step + 1)

        return optax.GradientTransformation(init, update)

    reference = torch_run(lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, dampening=0.5))
    optimizer = optax.chain(trace(0.9, 0.5), optax.scale(-LEARNING_RATE))
    return reference, optax_run(optimizer if by_hand else optax.sgd(LEARNING_RATE, momentum=0.9))


MATRIX = {"matrix": data(4, 3, seed=1)}


def _muon(transpose: bool, torch_arguments: dict | None = None, **arguments) -> Pair:
    """On a weight (out, in), given to Optax as it is or transposed to a kernel (in, out)."""

    def turned(tree: dict) -> dict:
        return {name: value.T for name, value in tree.items()} if transpose else tree

    reference = torch_run(
        lambda parameters: torch.optim.Muon(parameters, lr=LEARNING_RATE, **(torch_arguments or {})), start=MATRIX
    )
    optimizer = optax.contrib.muon(LEARNING_RATE, **arguments)
    parameters = turned({name: jnp.asarray(value) for name, value in MATRIX.items()})
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(turned(gradients(turned(parameters), step)), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return reference, tuple(turned(parameters).values())


def _adafactor(optimizer: optax.GradientTransformation, **torch_arguments) -> Pair:
    arguments = {"lr": LEARNING_RATE} | torch_arguments
    return torch_run(lambda parameters: torch.optim.Adafactor(parameters, **arguments)), optax_run(optimizer)


def adafactor(learning_rate, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Optax's parts put together as PyTorch does, the decay rate in the parameters' dtype."""

    def decay_rate(step, exponent):
        return 1.0 - (step + 1.0) ** -exponent

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate_fn=decay_rate),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-1.0),
    )


def rprop(learning_rate: float) -> optax.GradientTransformation:
    """Optax's rule, applied in the step that it was computed in: the inner state has it."""
    inner = optax.rprop(learning_rate)

    def update(updates, state, parameters=None):
        _, state = inner.update(updates, state, parameters)
        return jax.tree.map(jnp.negative, state[0].prev_updates), state

    return optax.GradientTransformation(inner.init, update)


ROWS = [
    _row("SGD", {}, "sgd", {}),
    _row("SGD", {"momentum": 0.9}, "sgd", {"momentum": 0.9}),
    _row("SGD", {"momentum": 0.9, "nesterov": True}, "sgd", {"momentum": 0.9, "nesterov": True}),
    Row(
        FAMILY,
        "torch.optim.SGD(lr, momentum=0.9, weight_decay=0.1)",
        "optax.sgd(lr, momentum=0.9)",
        "Optax",
        lambda: _decayed("SGD", optax.sgd, False, momentum=0.9),
        lambda: _decayed("SGD", optax.sgd, True, momentum=0.9),
        "`optax.chain(optax.add_decayed_weights(0.1), optax.sgd(..))`",
        claim="after",
    ),
    Row(
        FAMILY,
        "torch.optim.SGD(lr, momentum=0.9, dampening=0.5)",
        "optax.sgd(lr, momentum=0.9)",
        "Optax",
        lambda: _dampened(by_hand=False),
        lambda: _dampened(by_hand=True),
        "a transformation of your own: `trace = 0.9 * trace + (1 if first else 0.5) * gradient`",
        "PyTorch doesn't dampen the first step",
        claim="after",
    ),
    _row("Adam", {}, "adam", {}),
    _row("Adam", {"betas": (0.8, 0.95), "eps": 1e-3}, "adam", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    Row(
        FAMILY,
        "torch.optim.Adam(lr, weight_decay=0.1)",
        "optax.adam(lr)",
        "Optax",
        lambda: _decayed("Adam", optax.adam, False),
        lambda: _decayed("Adam", optax.adam, True),
        "`optax.chain(optax.add_decayed_weights(0.1), optax.adam(lr))`",
        claim="after",
    ),
    _row("AdamW", {}, "adamw", {}, {"weight_decay": 0.01}),
    _row(
        "Adam",
        {"amsgrad": True},
        "amsgrad",
        {},
        note="PyTorch takes the largest second moment before its bias correction, Optax after",
        claim="different",
    ),
    _row("NAdam", {}, "nadam", {}, note="PyTorch's momentum has a schedule (`momentum_decay`)", claim="different"),
    _row(
        "RAdam",
        {},
        "radam",
        {},
        note="PyTorch adds epsilon before the bias correction of the second moment, Optax after",
        claim="nearly",
    ),
    _row("Adamax", {}, "adamax", {}),
    _row(
        "Adagrad",
        {},
        "adagrad",
        {},
        {"initial_accumulator_value": 0.0, "eps": 1e-20},
        "epsilon is under the root, so that its square takes its place",
        claim="nearly",
    ),
    _row("RMSprop", {}, "rmsprop", {}, {"decay": 0.99, "eps_in_sqrt": False}),
    _row("RMSprop", {"centered": True}, "rmsprop", {"centered": True}, {"decay": 0.99, "eps_in_sqrt": False}),
    _row(
        "RMSprop",
        {"momentum": 0.9},
        "rmsprop",
        {"momentum": 0.9},
        {"decay": 0.99, "eps_in_sqrt": False},
    ),
    _row("Adadelta", {}, "adadelta", {}),
    Row(
        FAMILY,
        "torch.optim.Rprop(lr)",
        "optax.rprop(lr)",
        "Optax",
        lambda: (torch_run(lambda p: torch.optim.Rprop(p, lr=LEARNING_RATE)), optax_run(optax.rprop(LEARNING_RATE))),
        lambda: (torch_run(lambda p: torch.optim.Rprop(p, lr=LEARNING_RATE)), optax_run(rprop(LEARNING_RATE))),
        "take `-state[0].prev_updates` after `update` for the update",
        "Optax applies each update a step late",
        claim="after",
    ),
    Row(
        FAMILY,
        "torch.optim.Adafactor(lr)",
        "optax.adafactor(lr)",
        "Optax",
        lambda: _adafactor(optax.adafactor(LEARNING_RATE)),
        lambda: _adafactor(optax.adafactor(LEARNING_RATE, min_dim_size_to_factor=1)),
        "`min_dim_size_to_factor=1`",
        "Optax computes its decay rate in float32",
        claim="nearly",
    ),
    Row(
        FAMILY,
        "torch.optim.Adafactor(lr)",
        "optax.adafactor(lr, min_dim_size_to_factor=1)",
        "Optax",
        lambda: _adafactor(optax.adafactor(LEARNING_RATE, min_dim_size_to_factor=1)),
        lambda: _adafactor(adafactor(LEARNING_RATE)),
        "its parts in a chain, `scale_by_factored_rms(.., decay_rate_fn=lambda i, e: 1.0 - (i + 1.0) ** -e)` first",
        claim="after",
    ),
    Row(
        FAMILY,
        "torch.optim.Adafactor(lr=0.8)",
        "the `chain` above",
        "Optax",
        lambda: _adafactor(adafactor(0.8), lr=0.8),
        lambda: _adafactor(adafactor(lambda step: jnp.minimum(0.8, (step + 1.0) ** -0.5)), lr=0.8),
        "a schedule: `lambda step: minimum(0.8, (step + 1.0) ** -0.5)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "torch.optim.Adafactor(lr, weight_decay=0.1)",
        "the chain above with `add_decayed_weights(0.1)`, as in `optax.adafactor(weight_decay_rate=0.1)`",
        "Optax",
        lambda: _adafactor(adafactor(LEARNING_RATE, 0.1), weight_decay=0.1),
        lambda: _adafactor(adafactor(LEARNING_RATE, 0.1 * LEARNING_RATE), weight_decay=0.1),
        "`0.1 * lr`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`torch.optim.Muon(lr)` on a weight (4, 3)",
        "optax.contrib.muon(lr)",
        "Optax",
        lambda: _muon(transpose=False),
        lambda: _muon(transpose=True, weight_decay=0.1, eps=1e-7),
        "`weight_decay=0.1, eps=1e-7`, on `weight.T`",
        "PyTorch orthogonalizes in bfloat16, and Nesterov's momentum has another bias correction",
        claim="different",
    ),
    Row(
        FAMILY,
        "`torch.optim.Muon(lr, nesterov=False)` on a weight (4, 3)",
        "optax.contrib.muon(lr, nesterov=False)",
        "Optax",
        lambda: _muon(False, {"nesterov": False}, nesterov=False),
        lambda: _muon(True, {"nesterov": False}, nesterov=False, weight_decay=0.1, eps=1e-7),
        "`weight_decay=0.1, eps=1e-7`, on `weight.T`",
        "what is left is bfloat16",
        claim="different",
    ),
    Row(
        FAMILY,
        "torch.nn.utils.clip_grad_norm_(parameters, 1.0)",
        "optax.clip_by_global_norm(1.0)",
        "Optax",
        lambda: _clipped(exact=False),
        lambda: _clipped(exact=True),
        "a transformation of your own: `gradients * min(1, 1.0 / (norm + 1e-6))`",
        claim="after",
    ),
    Row(
        FAMILY,
        "torch.nn.utils.clip_grad_value_(parameters, 0.5)",
        "optax.clip(0.5)",
        "Optax",
        _clipped_values,
    ),
]
