import json
import math
import re
from collections import Counter

import pytest
from rich.console import Console

from benchmarks import compiled
from benchmarks.compiler_env import environment
from benchmarks.hlo import parse
from benchmarks.hlo_account import Account, account
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig
from gpt2_core.errors import RunError, UserError
from gpt2_jax.loss import CHUNK_BYTES
from gpt2_jax.planning import gpus
from gpt2_jax.sharding import TABLE_PIECES

LAYERS = 2
BLOCK = 1024
GPT2 = ModelConfig(**PRESETS["gpt2"] | {"n_layer": LAYERS}, vocab_size=50304, block_size=BLOCK)
H200 = gpus.load("h200")
KERNELS = {"attention": "cudnn", "norm_kernel": "triton"}


def program(launches: int) -> str:
    lines = [f"  %n{i} = f32[1000]{{0}} negate(%x)" for i in range(launches)]
    head = "HloModule m, is_scheduled=true\n\nENTRY %main (x: f32[1000]) -> f32[1000] {"
    return "\n".join([head, "  %x = f32[1000]{0} parameter(0)", *lines, "}", ""])


def test_a_program_that_is_at_hand_is_accounted_for_and_compared_with_an_earlier_one(tmp_path, capsys):
    (tmp_path / "old.txt").write_text(program(2))
    (tmp_path / "new.txt").write_text(program(5))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    compiled.main(["--read", str(tmp_path / "old.txt"), "--json", old])
    compiled.main(["--read", str(tmp_path / "new.txt"), "--json", new, "--against", old])
    results = json.loads((tmp_path / "new.json").read_text())["results"]
    assert (results["kernels"], results["collectives"]) == (5, [])
    assert results["floor_ms"] == pytest.approx(1e3 * 5 * 8000 / H200.bandwidth)
    out = capsys.readouterr().out
    assert "totals" in out and "groups that changed most" in out and out.rstrip().endswith("without a GPU.")
    (kernels,) = [line.split() for line in out.splitlines() if line.startswith("kernels  ")]
    assert kernels[1:] == ["2.00", "5.00", "+3.00"]


def test_groups_that_changed_are_found_by_what_they_compute():
    def group(source: str, ms: float) -> dict:
        return {"source": source, "ms": ms}

    old = [group("a", 1.0), group("b", 2.0), group("b", 1.0), group("gone", 0.5)]
    new = [group("a", 1.0), group("b", 1.0), group("new", 0.25)]
    assert compiled.changed_groups(old, new) == [
        ("b", 3.0, 1.0, -2.0),
        ("gone", 0.5, 0.0, -0.5),
        ("new", 0.0, 0.25, 0.25),
    ]


def test_the_mfu_that_a_floor_allows_is_that_of_all_devices():
    found = account(program(1).replace("is_scheduled=true", "num_partitions=8"), H200)
    config = TrainConfig(model=GPT2, batch_size=8, precision="bfloat16")
    flops = 8 * BLOCK * GPT2.training_flops_per_token(BLOCK)
    at_most = compiled.mfu_at_most(found, config, H200)
    assert at_most == pytest.approx(flops / (8 * 989.4e12 * found.floor_ms / 1e3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "b200"], "--target b200: no such GPU; use h200, h100, a100"),
        (["--batch", "3", "--mesh", "2"], "batch_size 3 is not divisible by data = 2"),
        (["--model.dropout", "0.1"], "--attention cudnn: has no dropout"),
        (["--read", "none.txt"], "--read none.txt: can't be read"),
        (["--read", "none.txt", "--batch", "8"], "--batch: an option for compiling, and --read compiles nothing"),
        (["--against", __file__], "no results of this command"),
        (["--top", "0"], "--top 0: must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        compiled.main(arguments)


def test_without_a_package_index_the_environment_is_refused_in_one_sentence(tmp_path, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / ".venv-compiled"
    with pytest.raises(
        RunError, match=r"\.venv-compiled can't be made, installing JAX failed: .*needs pip and a package"
    ):
        environment(Console(quiet=True), folder)
    assert not (folder / "complete").exists()  # so that the next try makes it again


# What follows compiles for a GPU, in an environment that is made if it isn't there.


@pytest.fixture(scope="session")
def compile_step():
    """The program of a step, and the account of it; each configuration is compiled once a session."""
    made: dict[str, tuple[compiled.Program, Account]] = {}

    def compile_step(**settings) -> tuple[compiled.Program, Account]:
        how = {"model": GPT2, "batch_size": 32, "mesh": 1, "precision": "bfloat16"} | KERNELS | settings
        key = repr(sorted(how.items()))
        if key not in made:
            found = compiled.compile_program(TrainConfig(**how), "h200", [], Console(quiet=True))
            made[key] = found, account(found.text, H200)
        return made[key]

    return compile_step


def exchanged(found: Account, *, within_loops: bool = False) -> dict[tuple[str, str], int]:
    """Bytes of the whole arrays that devices exchange in a step, by kind of exchange and dtype."""
    total: Counter[tuple[str, str]] = Counter()
    for collective in found.collectives:
        if collective.loops or not within_loops:
            for dtype, size in collective.bytes_by_dtype.items():
                total[collective.kind, dtype] += collective.times * size
    return dict(total)


# Scalars and norms: the loss, the count of targets, the sums of squares that the gradients' norm is made of.
SMALL = 64_000


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "h100", "a100"])
def test_a_step_compiles_for_every_target(target):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=128, block_size=128, vocab_size=1024)
    config = TrainConfig(model=model, batch_size=2, mesh=1, precision="bfloat16", **KERNELS)
    found = account(compiled.compile_program(config, target, [], Console(quiet=True)).text, gpus.load(target))
    assert found.parts_ms["products"] > 0 and found.parts_ms["attention"] > 0


@pytest.mark.slow
def test_an_unknown_flag_of_xla_is_named():
    config = TrainConfig(model=GPT2, mesh=1, precision="bfloat16", **KERNELS)
    with pytest.raises(UserError, match="--flag --xla_nope=1: XLA doesn't know --xla_nope"):
        compiled.compile_program(config, "h200", ["--xla_nope=1"], Console(quiet=True))


@pytest.mark.slow
def test_no_product_of_a_bfloat16_step_has_a_float32_operand(compile_step):
    _, found = compile_step()
    assert found.products and not any(product.float32 for product in found.products)


@pytest.mark.slow
def test_the_products_are_those_of_the_model_and_no_more(compile_step):
    """6 N for each token, N being what multiplies in products: the matrices and the tied head."""
    _, found = compile_step()
    shapes = {name: shape for name, shape in GPT2.parameter_shapes.items() if name != "wpe.weight"}
    multiplying = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    needed = 6 * multiplying * 32 * BLOCK
    assert sum(product.flops for product in found.products) == pytest.approx(needed, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "expected"), [("cudnn", False), ("xla", True)])
def test_cudnn_attention_keeps_no_array_of_all_pairs_of_positions(compile_step, attention, expected):
    """The control shows that such an array would be seen: XLA's attention has blocks of queries by all keys."""
    text = compile_step(attention=attention)[0].text
    pairs = {
        array.shape
        for computation in parse(text).computations.values()
        for instruction in computation.values()
        for array in instruction.results
        if array.shape.count(BLOCK) >= 2 or array.shape[-2:] == (BLOCK // 4, BLOCK)
    }
    assert bool(pairs) == expected


@pytest.mark.slow
def test_data_parallel_devices_exchange_each_gradient_once_in_float32(compile_step):
    _, found = compile_step(mesh="data=8")
    moved = exchanged(found)
    assert {kind for kind, _ in moved} == {"all-reduce"}
    gradients = 4 * GPT2.parameter_count
    assert gradients <= moved["all-reduce", "f32"] <= gradients + SMALL
    assert sum(moved.values()) <= gradients + SMALL


@pytest.mark.slow
def test_fully_sharded_devices_gather_each_weight_once_and_scatter_its_gradient_once(compile_step):
    """A layer's matrices are gathered as the products take them, in bfloat16; gradients are scattered in float32."""
    _, found = compile_step(mesh="fsdp=8")
    moved = exchanged(found)
    layers = [shape for name, shape in GPT2.parameter_shapes.items() if name.startswith("h.") and len(shape) == 2]
    narrow, wide = moved.get(("all-gather", "bf16"), 0), moved.get(("all-gather", "f32"), 0)
    assert narrow >= 2 * sum(math.prod(shape) for shape in layers)
    assert narrow // 2 + wide // 4 == GPT2.parameter_count
    assert moved.get(("reduce-scatter", "f32"), 0) == 4 * GPT2.parameter_count
    assert sum(size for (kind, _), size in moved.items() if kind not in ("all-gather", "reduce-scatter")) <= SMALL


@pytest.mark.slow
def test_fully_sharded_devices_never_sum_a_layers_gradient_whole(compile_step):
    """Each needs its shard only: an all-reduce would move twice as much."""
    _, found = compile_step(mesh="fsdp=8")
    smallest = 2 * GPT2.n_embd**2  # bytes of c_proj.weight, the smallest of a layer's matrices, in bfloat16
    assert all(collective.bytes < smallest for collective in found.collectives if collective.kind == "all-reduce")


@pytest.mark.slow
def test_gradients_travel_in_bfloat16_when_asked_to(compile_step):
    _, found = compile_step(mesh="data=8", gradient_exchange="bfloat16")
    moved = exchanged(found)
    assert moved["all-reduce", "bf16"] == 2 * GPT2.parameter_count
    assert sum(moved.values()) <= 2 * GPT2.parameter_count + SMALL


def activations_exchanged(sequences: int) -> dict[tuple[str, str], int]:
    """What tensor-parallel devices sum of the activations of so many sequences.

    In bfloat16 the outputs of attention and MLP in each layer, their inputs' gradients, and the head's input's; in
    float32 the embeddings, and of each token the softmax's maximum and sum and the target's logit.
    """
    tokens = sequences * BLOCK
    return {
        ("all-reduce", "bf16"): 2 * tokens * GPT2.n_embd * (4 * LAYERS + 1),
        ("all-reduce", "f32"): 4 * tokens * (GPT2.n_embd + 3),
    }


@pytest.mark.slow
def test_tensor_parallel_devices_exchange_activations_only(compile_step):
    moved = exchanged(compile_step(mesh="tensor=2")[1])
    expected = activations_exchanged(32)
    assert set(moved) == set(expected)
    for key, size in expected.items():
        assert size <= moved[key] <= size + SMALL


@pytest.mark.slow
def test_on_a_mesh_of_all_axes_a_device_exchanges_its_share_of_everything(compile_step):
    """Weights are gathered along fsdp, and gradients summed over data and fsdp, of a device's share along tensor."""
    moved = exchanged(compile_step(mesh="data=2,fsdp=2,tensor=2")[1])
    shared = re.compile(r"wte|c_attn|c_fc|attn\.c_proj\.weight|mlp\.c_proj\.weight")
    sizes = {
        name: math.prod(shape) // (2 if shared.search(name) else 1) for name, shape in GPT2.parameter_shapes.items()
    }
    matrices = sum(size for name, size in sizes.items() if ".c_" in name and name.endswith("weight"))
    gradients = sum(sizes.values())
    expected = activations_exchanged(32 // 4)
    expected["all-reduce", "f32"] += 4 * gradients
    expected["all-gather", "bf16"] = 2 * matrices
    expected["all-gather", "f32"] = 4 * (gradients - matrices)
    # Biases of linear layers may be gathered in either dtype: the products want them in bfloat16.
    biases = 4 * sum(size for name, size in sizes.items() if name.endswith("bias"))
    assert set(moved) - {("all-reduce", "s32")} == set(expected)
    for key, size in expected.items():
        assert size - biases <= moved[key] <= size + SMALL + biases


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_nothing_large_is_exchanged_inside_the_accumulation_loop(compile_step, mesh):
    _, found = compile_step(mesh=mesh, accumulation=4)
    assert sum(exchanged(found, within_loops=True).values()) <= SMALL


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_the_tied_embeddings_exchange_is_not_the_last_that_everybody_waits_for(compile_step, mesh):
    model = ModelConfig(**PRESETS["gpt2"], vocab_size=50304, block_size=BLOCK)
    made, found = compile_step(model=model, mesh=mesh, batch_size=8 * 32)
    module = parse(made.text)
    sent = [
        [size for array in instruction.results for size in array.shape]
        for instruction in module.computations[module.entry].values()
        if instruction.operation in ("all-reduce-start", "reduce-scatter-start") and instruction.bytes > SMALL
    ]
    of_table = [number for number, sizes in enumerate(sent) if model.vocab_size // TABLE_PIECES in sizes]
    assert of_table and of_table[-1] < len(sent) - 1
    if mesh == "data=8":
        # Of all exchanges the device waits for less than a third of what the table's alone takes.
        table_ms = 2 * 7 / 8 * 4 * model.vocab_size * model.n_embd / H200.link_bandwidth * 1e3
        assert found.exposed_ms < table_ms / 3


@pytest.mark.slow
def test_a_step_of_gpt2_fits_in_its_memory(compile_step):
    model = ModelConfig(**PRESETS["gpt2"], vocab_size=50304, block_size=BLOCK)
    made, _ = compile_step(model=model)
    # What a layer keeps for the backward pass, in bytes a token and feature: the residual stream twice in float32; in
    # bfloat16 two norms, q, k and v, attention's output, and of the MLP's fourfold width what goes into GELU and out.
    kept = 2 * 4 + 2 * (2 + 3 + 1 + 2 * 4)
    activations = model.n_layer * kept * 32 * BLOCK * model.n_embd
    gradients = 4 * model.parameter_count
    assert made.temp_bytes < activations + gradients + 2 * CHUNK_BYTES


@pytest.mark.slow
def test_layer_norms_are_one_kernel_each_unless_xla_is_to_make_them():
    model = ModelConfig(n_layer=1, n_head=2, n_embd=128, block_size=128, vocab_size=1024)
    launches = {}
    for kernel in ("triton", "xla"):
        how = KERNELS | {"norm_kernel": kernel}
        config = TrainConfig(model=model, batch_size=2, mesh=1, precision="bfloat16", **how)
        text = compiled.compile_program(config, "h200", [], Console(quiet=True)).text
        launches[kernel] = text.count('name = "add_layer_norm"') + text.count("__gpu$xla.gpu.triton")
    assert launches["triton"] > 0 == launches["xla"]
