"""What the compiled train step holds and exchanges, read off the program itself; nothing is run."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from gpt2_core.config import ModelConfig
from gpt2_jax import loss
from gpt2_jax.train_step import make_program

# Sizes of which no two products are alike, so that an array is known by its size.
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=1000)


@pytest.fixture
def program(mesh_config):
    """The program of a train step: (name of the operation, dtype, shape) of each of its instructions."""

    def program(**how) -> list[tuple[str, str, tuple[int, ...]]]:
        config = mesh_config(model=MODEL, batch_size=8, **how)
        text = make_program(config).compile_train_step().as_text()
        return [
            (operation, dtype, tuple(int(n) for n in dims.split(",") if n))
            for results, operation in re.findall(r"= (\(.*?\)|\S+) ([a-z][\w-]*)\(", text)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", results)
        ]

    return program


def elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"remat": True, "scan_layers": True}, {"mesh": "tensor=2"}])
def test_no_array_of_the_step_holds_all_logits(program, monkeypatch, how):
    logits = 8 * 64 * 1024
    assert max(elements(shape) for _, _, shape in program(**how)) >= logits // 2  # chunks of 512 MB: all fit in one
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * logits // 8)
    assert max(elements(shape) for _, _, shape in program(**how)) <= logits // 4


@pytest.mark.long
def test_parts_of_a_batch_add_their_gradients_up_in_place(mesh_config):
    model = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=16, vocab_size=128)
    gradients = 4 * model.parameter_count

    def temporary(parts: int) -> int:
        config = mesh_config(model=model, batch_size=parts, accumulation=parts)
        step = make_program(config).compile_train_step()
        return step.memory_analysis().temp_size_in_bytes

    # A sequence at a time: hardly anything but gradients. With a buffer for their sum and another for a part's own it
    # would be twice as much. c_attn's is put together from three products, which exist beside it.
    one, two = map(temporary, (1, 2))
    side_by_side = 4 * model.n_layer * 3 * model.n_embd**2
    assert gradients <= one < two < 1.4 * gradients + side_by_side


def exchanged(instructions) -> dict[str, int]:
    """Elements that devices exchange, by the kind of exchange."""
    found: dict[str, int] = {}
    for operation, _, shape in instructions:
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            if operation in (kind, kind + "-start"):
                found[kind] = found.get(kind, 0) + elements(shape)
    return found


def parameters() -> int:
    padded = (1024 - MODEL.vocab_size) * MODEL.n_embd
    return MODEL.parameter_count + padded


def test_one_device_exchanges_nothing(program):
    assert exchanged(program(mesh=1)) == {}


@pytest.mark.long
def test_data_parallel_devices_exchange_the_gradients_once_and_nothing_else(program):
    found = exchanged(program(mesh=4))
    assert set(found) == {"all-reduce"}
    # Besides, the loss and the count of targets.
    assert parameters() <= found["all-reduce"] <= parameters() + 10


@pytest.mark.long
def test_fully_sharded_devices_gather_each_parameter_once_and_exchange_its_gradient_once(program):
    found = exchanged(program(mesh="fsdp=4"))
    # A reduce-scatter where the compiler knows it; the CPU's takes what it needs from an all-reduce. The rest: the
    # loss, the count of targets, and of each array the sum that the gradients' norm is made of.
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == parameters()
    assert parameters() <= found["all-reduce"] + 4 * found.get("reduce-scatter", 0) <= parameters() + 50


@pytest.mark.long
def test_tensor_parallel_devices_exchange_activations_alone(program):
    instructions = program(mesh="tensor=2")
    tokens = 8 * 64
    activations = tokens * MODEL.n_embd
    sizes = [elements(shape) for operation, _, shape in instructions if operation.startswith("all-reduce")]
    # Attention and MLP of each layer, each forward and backward; the embeddings forward, the head backward.
    assert sizes.count(activations) == 4 * MODEL.n_layer + 2
    # Each token's largest logit, the sum of its exponentials and its target's own, and what is left is scalars.
    assert sizes.count(tokens) == 3
    assert set(exchanged(instructions)) == {"all-reduce"}
    assert sum(sizes) <= sizes.count(activations) * activations + 3 * tokens + 50


@pytest.mark.long
def test_on_a_mesh_of_all_axes_a_device_sees_its_share_of_each_parameter(program):
    found = exchanged(program(mesh="data=2,fsdp=2,tensor=2"))
    assert parameters() / 2 <= found["all-gather"] < 0.6 * parameters()


@pytest.mark.parametrize(("exchange", "dtype"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_are_exchanged_in_the_dtype_asked_for(mesh_config, exchange, dtype):
    config = mesh_config(
        model=MODEL, batch_size=8, mesh="data=2,fsdp=2", precision="bfloat16", gradient_exchange=exchange
    )
    lowered = lower(config).as_text()
    exchanges = r'"stablehlo\.(all_reduce|reduce_scatter)".*?\(tensor<(.*?)>\) -> tensor'
    found = [(kind, elements_of(array)) for kind, array in re.findall(exchanges, lowered, re.DOTALL) if "x" in array]
    # The rest are scalars: the loss, the count of targets.
    total = {kind: sum(size for of_kind, (size, _) in found if of_kind == kind) for kind, _ in found}
    # Each gradient is scattered over fsdp, and each device's share then summed over data.
    assert total == {"reduce_scatter": parameters(), "all_reduce": parameters() // 2}
    assert {given for _, (_, given) in found} == {dtype}


def elements_of(array: str) -> tuple[int, str]:
    """Number and dtype of the elements of an array as StableHLO writes it: "8x64xf32"."""
    *sizes, dtype = array.split("x")
    return math.prod(map(int, sizes)), dtype


def lower(config, platform: str = "cpu"):
    """A train step lowered for a platform, which need not be here."""
    program = make_program(config)
    shape = (config.accumulation, config.microbatch_size, config.model.block_size)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=program.batch_sharding)
    with jax.set_mesh(program.mesh):
        traced = program.train_step.trace(program.abstract_state, tokens, tokens, jax.ShapeDtypeStruct((), np.float32))
        return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("mesh", [1, "data=2", "fsdp=2,tensor=2"])
@pytest.mark.parametrize(("kernel", "calls"), [("cudnn", 1), ("xla", 0)])
def test_lowered_for_an_nvidia_gpu_each_layer_calls_the_kernel_asked_for(mesh_config, monkeypatch, mesh, kernel, calls):
    # No GPU here, and none needed to lower: only what asks for its driver and its generation is answered for it.
    attention = jax._src.cudnn.fused_attention_stablehlo
    monkeypatch.setattr(attention, "check_cudnn_version", lambda: 91001)
    monkeypatch.setattr(attention, "check_compute_capability", lambda capability: None)
    config = mesh_config(model=MODEL, batch_size=8, mesh=mesh, precision="bfloat16")
    config = dataclasses.replace(config, attention=kernel)
    lowered = lower(config, "cuda").as_text()
    # On more than one device the kernel stands inside a call that says how it is split.
    found = re.findall(r"custom_call @(__cudnn\$fmha\w*|CustomSPMDPartitioning)", lowered)
    assert len(found) == 2 * calls * MODEL.n_layer  # forward and backward
