"""The mesh of devices that `--mesh` describes: its sizes by axis, and whether a model and its batch fit on it."""

import re

from gpt2_core.config import VOCABULARY_MULTIPLE, TrainConfig, divisors, one_of
from gpt2_core.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")


def parse_mesh(mesh: int | str) -> dict[str, int]:
    """Sizes of all three axes from what `--mesh` takes: `8` means `data=8`, `data=2,tensor=2` names them."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    help_text = "expected a number of devices (8) or axis=n,... with the axes data, fsdp, tensor (data=4,fsdp=2)"
    text = str(mesh).strip()
    parts = [f"data={text}"] if _is_count(text) else text.split(",")
    given = set()
    for part in parts:
        axis, equals, size = part.strip().partition("=")
        if axis not in sizes or not equals or not _is_count(size):
            raise UserError(f"--mesh {mesh!s:.80}: {help_text}")
        if axis in given:
            raise UserError(f"--mesh {mesh}: the axis {axis} is named twice; name it once")
        given.add(axis)
        sizes[axis] = int(size)
    return sizes


def _is_count(text: str) -> bool:
    """Whether this is a number of devices: digits of ASCII, and no more than any cluster needs."""
    return re.fullmatch("[0-9]{1,9}", text) is not None and int(text) > 0


def format_mesh(sizes: dict[str, int]) -> str:
    """The same as `--mesh` takes it and config.yaml records it."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)


def check_option(config: TrainConfig) -> None:
    """Raise UserError for a `--mesh` that can't be right on any machine.

    With `device_batch_size` accumulation depends on the mesh that is found, and is checked with it.
    """
    if config.mesh is not None and config.device_batch_size is None:
        check_mesh(parse_mesh(config.mesh), config)


def check_mesh(sizes: dict[str, int], config: TrainConfig) -> None:
    """Raise UserError for a mesh that this model and batch can't be split over."""
    given = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "1"
    model = config.model
    num_shards = sizes["data"] * sizes["fsdp"]
    size = config.microbatch_size
    batch = f"batch_size {config.batch_size}"
    if config.accumulation > 1:
        batch += f" / accumulation {config.accumulation} = {size}"
    if size % num_shards:
        axes = "data" if sizes["fsdp"] == 1 else "data x fsdp"
        raise UserError(
            f"--mesh {given}: {batch} is not divisible by {axes} = {num_shards}; use {one_of(divisors(size))}"
        )
    if model.n_head % sizes["tensor"]:
        raise UserError(
            f"--mesh {given}: n_head {model.n_head} is not divisible by tensor = {sizes['tensor']}; "
            f"use {one_of(divisors(model.n_head))}"
        )
    if model.n_embd % (sizes["fsdp"] * sizes["tensor"]):
        axes = "fsdp" if sizes["tensor"] == 1 else "fsdp x tensor"
        raise UserError(
            f"--mesh {given}: n_embd {model.n_embd} is not divisible by {axes} = {sizes['fsdp'] * sizes['tensor']}; "
            f"use {one_of(divisors(model.n_embd))}"
        )
    if model.mlp_size % (sizes["fsdp"] * sizes["tensor"]):
        raise UserError(
            f"--mesh {given}: the MLP's width {model.mlp_size} is not divisible by fsdp x tensor = "
            f"{sizes['fsdp'] * sizes['tensor']}; give another --model.mlp_width"
        )
    # The rows of the padded vocabulary are split over this axis.
    if VOCABULARY_MULTIPLE % sizes["tensor"]:
        raise UserError(
            f"--mesh {given}: the tensor axis must divide {VOCABULARY_MULTIPLE}; "
            f"use {one_of(divisors(VOCABULARY_MULTIPLE))}"
        )
