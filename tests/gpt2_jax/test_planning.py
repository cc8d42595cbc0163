"""The formulas of scripts/plan.py, against what JAX shards and what the compiler says of the program for a GPU."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax
import pytest
from rich.console import Console

from benchmarks.compiled import compile_program
from benchmarks.hlo_account import account
from gpt2_commands.plan import main, recipe_rows
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig, resolved
from gpt2_core.errors import UserError
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.planning import gpus
from gpt2_jax.planning.meshes import (
    USABLE,
    Cluster,
    best_plan,
    exchanges,
    largest_device_batch,
    memory,
    plan,
    step_flops,
)
from gpt2_jax.train_step import make_program

H200 = Cluster(gpus.load("h200"), devices_per_node=8, interconnect=50e9)
SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=257)


def config_of(mesh="1", preset="gpt2", batch_size=32, **options) -> TrainConfig:
    model = ModelConfig(**PRESETS[preset] | options.pop("model", {}))
    kernels = {"attention": "cudnn", "norm_kernel": "triton"}
    return TrainConfig(model=model, precision="bfloat16", mesh=mesh, batch_size=batch_size, **kernels, **options)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=4,data=2", "fsdp=2,tensor=2,data=2"])
@pytest.mark.parametrize("model", [SMALL, dataclasses.replace(SMALL, tie_embeddings=False, mlp="swiglu", bias=False)])
def test_the_state_of_a_device_is_what_jax_shards(mesh, model):
    config = TrainConfig(model=model, batch_size=8, mesh=mesh)
    program = make_program(resolved(config, precision="bfloat16", attention="xla", norm_kernel="xla"))
    leaves = jax.tree.leaves(program.abstract_state)
    sharded = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    found = memory(config, parse_mesh(mesh), 1, 1)
    # Vectors that a mesh can't split are on every device.
    assert found.parameters + found.optimizer == pytest.approx(sharded, rel=0.03)


COMPILED = [
    config_of(),
    config_of(batch_size=16, model={"mlp_width": 1536}),
    config_of(remat=True),
    config_of(accumulation=4),
    config_of("fsdp=8", batch_size=256),
    config_of("data=8", batch_size=64),
    config_of("fsdp=4", accumulation=4),
    config_of("data=2,tensor=2"),
    config_of("data=2,fsdp=4", "gpt2-medium", 64),
    config_of(batch_size=16, model={"mlp": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize("config", COMPILED, ids=range(len(COMPILED)))
def test_the_compiled_program_needs_within_a_tenth_what_the_formulas_say(config):
    mesh = parse_mesh(config.mesh)
    program = compile_program(config, "h200", [], Console(quiet=True))
    found = account(program.text, H200.gpu)
    device_batch = config.microbatch_size // (mesh["data"] * mesh["fsdp"])
    held = memory(config, mesh, device_batch, config.accumulation)
    assert held.total == pytest.approx(program.argument_bytes + program.temp_bytes, rel=0.1)
    sent = sum(one.seconds for one in exchanges(config, mesh, device_batch, config.accumulation, H200))
    assert 1e3 * sent == pytest.approx(found.exchange_ms, rel=0.1)
    one = plan(config, mesh, H200)
    assert one.accumulation <= config.accumulation
    assert 1e3 * one.compute_seconds == pytest.approx(found.parts_ms["products"] + found.parts_ms["attention"], rel=0.1)


@pytest.mark.parametrize(("preset", "devices"), list(itertools.product(PRESETS, [1, 8, 64, 512])))
@pytest.mark.parametrize("target", ["h200", "a100"])
def test_the_chosen_mesh_fits_and_no_other_is_much_faster(preset, devices, target):
    config = config_of(None, preset, 1024)
    cluster = dataclasses.replace(H200, gpu=gpus.load(target))
    best = best_plan(config, devices, cluster)
    assert best.devices == devices
    assert best.memory.total <= USABLE * cluster.gpu.memory
    assert best.device_batch * best.accumulation * best.mesh["data"] * best.mesh["fsdp"] == 1024
    for mesh in ({"data": devices, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": devices, "tensor": 1}):
        other = plan(config, mesh, cluster) if config.model.n_embd % mesh["fsdp"] == 0 else None
        assert other is None or best.seconds <= 1.01 * other.seconds


def test_a_model_that_fits_no_device_is_split_over_them():
    large = config_of(None, batch_size=64, model={"n_layer": 96, "n_head": 64, "n_embd": 8192})  # 77 billion parameters
    assert best_plan(large, 1, H200) is None
    assert best_plan(large, 8, H200) is None
    chosen = best_plan(large, 64, H200)
    assert chosen.mesh["fsdp"] * chosen.mesh["tensor"] >= 16


def test_the_largest_batch_fits_and_the_next_does_not():
    config, mesh = config_of(), parse_mesh("1")
    most = largest_device_batch(config, mesh, False, H200.gpu)
    usable = USABLE * H200.gpu.memory
    assert memory(config, mesh, most, 1).total <= usable < memory(config, mesh, most + 1, 1).total


def test_what_crosses_nodes_takes_the_slower_way_and_is_shared_by_a_nodes_devices():
    def seconds(mesh: str, **changes) -> float:
        cluster = dataclasses.replace(H200, **changes)
        return sum(one.seconds for one in exchanges(config_of(), parse_mesh(mesh), 1, 1, cluster))

    inside, between = seconds("data=8"), seconds("data=8", devices_per_node=1)
    assert between == pytest.approx(inside * 450 / 50)
    # Sixteen on two nodes: each of a node's eight sends an eighth of what crosses, half the gradients twice.
    size = 4 * config_of().model.parameter_count
    assert seconds("data=16") == pytest.approx(max(2 * size * 7 / 8 / 450e9, 2 * size / 2 / 8 / 50e9), rel=0.01)


def test_the_arithmetic_is_that_of_the_model_without_what_the_causal_mask_leaves_out():
    config = config_of()
    products, attention = step_flops(config)
    # PaLM's count has the whole square of attention, and no second computation of its scores.
    square = attention * 12 / 7
    assert products + square == pytest.approx(config.tokens_per_step * config.training_flops_per_token, rel=0.01)


def test_the_command_prints_and_writes_the_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(["--preset", "gpt2-xl", "--mesh", "data=8,fsdp=8", "--batch_tokens", "1048576", "--json", str(file)])
    said = capsys.readouterr().out
    assert "--mesh data=8,fsdp=8,tensor=1 --batch_size 1024 --accumulation 1: 16 sequences on a device at once" in said
    results = json.loads(file.read_text())["results"]
    assert results["mesh"]["memory_bytes"] == sum(results["mesh"]["memory"].values())
    assert set(results["chosen"]) == {"1", "8", "64", "512"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "8,x"], "--devices 8,x: expected numbers of devices"),
        (["--target", "h900"], "--target h900: no such GPU; use h200"),
        (["--mesh", "data=7"], "--mesh data=7: batch_size 512 is not divisible by data = 7; use 1, 2, 4"),
        (["--batch_tokens", "1000"], "--batch_tokens 1000: not a multiple of the sequence length 1024"),
        (["--model.n_layer=200", "--model.n_embd=12288", "--mesh", "8"], "not even one sequence fits"),
        (["--model.position", "alibi"], "planned for cuDNN's attention"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        main(arguments)


def test_the_table_of_the_recipes_page_is_what_the_command_prints(capsys):
    rows = recipe_rows()
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [row for row in rows if f"| {' | '.join(row)} |" not in page] == []
    main(["--recipes", "true"])
    printed = capsys.readouterr().out
    assert all(row[0] in printed for row in rows)
    fits = {row[0]: row[2:5] for row in rows}
    # Four hundred sequences of 1024 tokens don't fit at once, and 32 do.
    assert fits["`fineweb_gpt2_124m`"][2].endswith(" of 512") and fits["`shakespeare_overfit`"] == ("all 128",) * 3
