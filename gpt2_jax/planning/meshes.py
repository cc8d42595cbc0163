"""What training a model on a mesh of GPUs takes (memory, arithmetic, bytes exchanged), and which mesh to use.

Everything is computed by formula, from sizes alone, for the program of `gpt2_jax` in bfloat16 with cuDNN's attention
and the Triton layer norm. The formulas follow what the compiled program keeps; tests/gpt2_jax/test_planning.py
compares them with programs that were compiled for these GPUs. Times are lower bounds.

Shapes: T tokens of a sequence, D features, F width of the MLP, V rows of the vocabulary's table.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_core.config import VOCABULARY_MULTIPLE, ModelConfig, TrainConfig, divisors
from gpt2_core.errors import UserError
from gpt2_jax.loss import CHUNK_BYTES
from gpt2_jax.mesh import MESH_AXES, check_mesh
from gpt2_jax.planning.gpus import Gpu

# Of a GPU's memory, what the trainer lets XLA have (gpt2_jax.runtime): the rest is CUDA's, its libraries' and NCCL's.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs, and how fast they exchange."""

    gpu: Gpu
    devices_per_node: int
    interconnect: float
    """Of each device to those of other nodes, in one direction, bytes/s."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step, by what they hold."""

    parameters: int
    optimizer: int
    gradients: int
    weights: int
    """Copies of the weights in bfloat16, in which they are multiplied; where fsdp splits the parameters, the gathered
    embeddings too."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Of one chunk of tokens, with their gradient, and the head's gradient."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


class Exchange(NamedTuple):
    """Collectives over one axis of the mesh, in one step."""

    axis: str
    what: str
    bytes: float
    """That a device sends."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training on a mesh."""

    mesh: dict[str, int]
    batch_size: int
    """Sequences a step, over all devices."""
    device_batch: int
    """Sequences that a device computes at once."""
    accumulation: int
    memory: Memory
    flops: float
    """Of a step, on one device."""
    compute_seconds: float
    exchanges: tuple[Exchange, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def exchange_seconds(self) -> float:
        return sum(exchange.seconds for exchange in self.exchanges)

    @property
    def seconds(self) -> float:
        """Of a step, at least: the backward pass of the last part, two thirds of its arithmetic, hides exchanges over
        `data` and `fsdp`; those over `tensor` are waited for."""
        waited = sum(e.seconds for e in self.exchanges if e.axis == "tensor")
        hidden = 2 / 3 * self.compute_seconds / self.accumulation
        return self.compute_seconds + waited + max(0.0, self.exchange_seconds - waited - hidden)


def memory(config: TrainConfig, mesh: dict[str, int], device_batch: int, accumulation: int) -> Memory:
    """Of one device, for so many sequences at once."""
    model, tensor = config.model, mesh["tensor"]
    positions = math.prod(model.parameter_shapes.get("wpe.weight", (0,)))  # which tensor doesn't split
    whole = 4 * ((_parameters(model) - positions) / tensor + positions)
    state = whole / mesh["fsdp"]
    tokens, layers = device_batch * config.tokens_per_sequence, model.n_layer
    # float32: the residual stream. bfloat16: both norms' outputs, q, k, v and the attention's output, which tensor
    # splits by heads; the MLP's values before and after its activation function. float32: a sum for each head.
    branches = 6 if model.mlp == "swiglu" else 4
    of_layer = 12 * model.n_embd + (8 * model.n_embd + branches * model.mlp_size + 4 * model.n_head) / tensor
    of_tokens = tokens * 16 * model.n_embd  # embeddings, the last norm, and the gradient that the head gives
    logits = _logits(config, device_batch) / tensor
    activations = tokens * of_layer * layers + of_tokens
    if config.remat:
        # The residual stream alone; the last block is computed again in the place of the logits.
        activations = tokens * 4 * model.n_embd * layers + of_tokens + max(0.0, tokens * of_layer - logits)
    # A layer's gradients take the place of its activations. A sum over parts is there all the time; where it is
    # exchanged, the last part's gradients are whole beside it.
    shards = mesh["data"] * mesh["fsdp"]
    gradients = max(0.0, whole - activations - logits)
    if accumulation > 1:
        gradients = whole * (2 if shards > 1 else 1)
    weights = 2 * _narrow_parameters(model) / tensor
    if mesh["fsdp"] > 1:
        weights += whole - 4 * _narrow_parameters(model) / tensor  # those that are looked up, gathered in float32
    return Memory(*map(round, (state, 2 * state, gradients, weights, activations, logits)))


def _logits(config: TrainConfig, device_batch: int) -> float:
    """Of a chunk: logits in float32, their gradient in bfloat16, and the head's gradient in float32."""
    rows, width = _rows(config.model), config.model.n_embd
    chunk = device_batch * min(config.tokens_per_sequence, max(1, CHUNK_BYTES // (4 * rows * device_batch)))
    return chunk * rows * 6 + 4 * rows * width


def _rows(model: ModelConfig) -> int:
    return math.ceil(model.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _parameters(model: ModelConfig) -> int:
    return dataclasses.replace(model, vocab_size=_rows(model)).parameter_count


def _narrow_parameters(model: ModelConfig) -> int:
    """Those of linear layers, which are multiplied in bfloat16."""
    return sum(math.prod(s) for n, s in model.parameter_shapes.items() if len(s) == 2 and n.startswith("h."))


def step_flops(config: TrainConfig) -> tuple[float, float]:
    """Floating-point operations of a step over all devices: of the products with weights, and of attention.

    Products: 6 for each weight and token. Attention: its square is causal, two products forward and five backward
    (flash attention computes the scores again). Remat computes blocks forward once more, but for the MLP's last
    product.
    """
    model, tokens = config.model, config.tokens_per_step
    blocks = _narrow_parameters(model)
    again = blocks - model.n_layer * model.mlp_size * model.n_embd if config.remat else 0
    products = (6 * (blocks + _rows(model) * model.n_embd) + 2 * again) * tokens
    halves = 9 if config.remat else 7
    return products, halves * model.n_layer * config.tokens_per_sequence * model.n_embd * tokens


def exchanges(
    config: TrainConfig, mesh: dict[str, int], device_batch: int, accumulation: int, cluster: Cluster
) -> Iterator[Exchange]:
    """The collectives of a step."""
    model, (data, fsdp, tensor) = config.model, (mesh[axis] for axis in MESH_AXES)
    count, narrow = _parameters(model) / tensor, _narrow_parameters(model) / tensor
    width = 2 if config.gradient_exchange == "bfloat16" else 4
    if fsdp > 1:
        gathered = 2 * narrow + 4 * (count - narrow)
        yield _collective("fsdp", "weights gathered", gathered, fsdp, tensor, 1, cluster)
        yield _collective("fsdp", "gradients reduce-scattered", width * count, fsdp, tensor, 1, cluster)
    if data > 1:
        yield _collective("data", "gradients all-reduced", width * count / fsdp, data, fsdp * tensor, 2, cluster)
    if tensor > 1:
        tokens = device_batch * accumulation * config.tokens_per_sequence
        # bfloat16, after attention and after the MLP, forward and backward.
        summed = 4 * model.n_layer * tokens * model.n_embd * 2
        yield _collective("tensor", "activations all-reduced", summed, tensor, 1, 2, cluster)


def _collective(axis: str, what: str, size: float, n: int, stride: int, passes: int, cluster: Cluster) -> Exchange:
    """An exchange of `size` bytes over n devices that lie `stride` apart: an all-gather or a reduce-scatter is one pass
    over the others' parts, an all-reduce two. Between nodes the devices of one node share what has to cross."""
    sent = passes * size * (n - 1) / n
    on_node = max(1, min(n, cluster.devices_per_node // stride))
    nodes = n / on_node
    inside = passes * size * (on_node - 1) / on_node / cluster.gpu.link_bandwidth
    between = passes * size * (nodes - 1) / nodes / on_node / cluster.interconnect
    return Exchange(axis, what, sent, max(inside, between))


def largest_device_batch(config: TrainConfig, mesh: dict[str, int], accumulates: bool, gpu: Gpu) -> int:
    """The most sequences that a device can compute at once; 0 if not even one fits."""
    usable = USABLE * gpu.memory

    def fits(sequences: int) -> bool:
        return memory(config, mesh, sequences, 2 if accumulates else 1).total <= usable

    if not fits(1):
        return 0
    most = 1
    while fits(2 * most):
        most *= 2
    return next(n for n in range(2 * most, 0, -1) if fits(n))


def plan(config: TrainConfig, mesh: dict[str, int], cluster: Cluster) -> Plan | None:
    """The step of `config` on a mesh, with the fewest parts that fit; None if not even one sequence fits.

    Raises UserError if the model or the batch can't be split over the mesh.
    """
    check_mesh(mesh, config)
    share = config.batch_size // (mesh["data"] * mesh["fsdp"])
    for accumulation in divisors(share):
        device_batch = share // accumulation
        held = memory(config, mesh, device_batch, accumulation)
        if held.total <= USABLE * cluster.gpu.memory:
            break
    else:
        return None
    devices = math.prod(mesh.values())
    products, attention = (flops / devices for flops in step_flops(config))
    seconds = products / cluster.gpu.product_flops + attention / cluster.gpu.attention_flops
    collectives = tuple(exchanges(config, mesh, device_batch, accumulation, cluster))
    return Plan(mesh, config.batch_size, device_batch, accumulation, held, products + attention, seconds, collectives)


def best_plan(config: TrainConfig, devices: int, cluster: Cluster) -> Plan | None:
    """The plan with the least time among all meshes of so many devices; of those within a percent, the one that splits
    the fewest things: tensor, then fsdp. None if none fits."""
    found = [one for mesh in _meshes(config, devices) if (one := plan(config, mesh, cluster)) is not None]
    if not found:
        return None
    least = min(one.seconds for one in found)
    close = [one for one in found if one.seconds <= 1.01 * least]
    return min(close, key=lambda one: (one.mesh["tensor"], one.mesh["fsdp"], one.seconds))


def _meshes(config: TrainConfig, devices: int) -> Iterator[dict[str, int]]:
    for fsdp, tensor in itertools.product(divisors(devices), repeat=2):
        if devices % (fsdp * tensor) == 0:
            mesh = dict(zip(MESH_AXES, (devices // (fsdp * tensor), fsdp, tensor), strict=True))
            try:
                check_mesh(mesh, config)
            except UserError:
                continue
            yield mesh
