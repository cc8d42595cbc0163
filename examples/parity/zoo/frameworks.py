"""Layers of the four frameworks with given weights: explicit, in float64, with nothing drawn at random by a framework.

Weights are written over by name: {"kernel": array, "dense_i.bias": array}. NNX and Linen call their tensors the same.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

KEY = jax.random.key(0)  # of layers whose weights are then written over


def data(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normally distributed numbers, the same in every run."""
    return np.random.default_rng(seed).normal(size=shape) * scale


def filled(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The module in float64, evaluating, every tensor filled with numbers of its own; variances are positive."""
    module = module.double().eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                values = generator.normal(size=tuple(tensor.shape)) * 0.5
                tensor.copy_(torch.from_numpy(np.abs(values) + 0.5 if name.endswith("var") else values))
    return module


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, as numpy arrays of their own."""
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def torch_call(module, *inputs: np.ndarray) -> torch.Tensor:
    """What a module or function of PyTorch makes of numpy arrays."""
    return module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs))


def with_values(layer: nnx.Module, values: dict[str, np.ndarray]) -> nnx.Module:
    """The NNX layer with its variables written over. The variables take the values' dtype."""
    for name, value in values.items():
        owner = layer
        for part in name.split("."):
            owner = getattr(owner, part)
        assert owner.shape == value.shape, f"{name}: {owner.shape} in the layer, {value.shape} given"
        owner.set_value(jnp.asarray(value))
    return layer


def nested(values: dict[str, np.ndarray]) -> dict:
    """Linen's nested dictionary of dotted names."""
    tree: dict = {}
    for name, value in values.items():
        *folders, last = name.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = jnp.asarray(value)
    return tree


def linen_call(layer, values: dict[str, np.ndarray], *inputs, **keywords):
    """What a Linen layer makes of the inputs, with these parameters."""
    return layer.apply({"params": nested(values)}, *inputs, **keywords)


def equinox_with(layer, values: dict[str, np.ndarray]):
    """The Equinox layer with its arrays written over; a bias gets the shape it has in the layer."""
    for name, value in values.items():

        def leaf(tree, name=name):
            for part in name.split("."):
                tree = getattr(tree, part)
            return tree

        layer = eqx.tree_at(leaf, layer, jnp.asarray(value).reshape(leaf(layer).shape))
    return layer


def equinox_call(layer, values: dict[str, np.ndarray], batch, *, axes: int = 1):
    """What an Equinox layer makes of every example of a batch (Equinox's layers see one example)."""
    call = equinox_with(layer, values)
    for _ in range(axes):
        call = jax.vmap(call)
    return call(jnp.asarray(batch))


def flax_calls(nnx_layer, linen_layer, values: dict[str, np.ndarray], *inputs, **keywords) -> list:
    """What the two layers of Flax make of the same inputs with the same weights: NNX's result, Linen's result."""
    inputs = tuple(jnp.asarray(value) for value in inputs)
    return [
        with_values(nnx_layer, values)(*inputs, **keywords),
        linen_call(linen_layer, values, *inputs, **keywords),
    ]
