import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_core.config import IGNORE_INDEX, ModelConfig, OptimizerConfig
from gpt2_core.data.batches import Batch
from gpt2_jax.divergence import first_not_finite
from gpt2_jax.optimizer import clip_by_global_norm, make_optimizer
from gpt2_jax.train_step import make_program

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)


def batch_of(step: int, size: int = 8) -> Batch:
    generator = np.random.default_rng(step)
    windows = generator.integers(257, size=(size, 17)).astype(np.int32)
    targets = windows[:, 1:].copy()
    targets[0, : 5 + step] = IGNORE_INDEX  # not equally many count in each part
    return Batch(windows[:, :-1], targets)


def run(config, steps=4):
    """Losses and gradient norms of a few steps, and the state they lead to."""
    program = make_program(config)
    state, found = program.initial_state(), []
    with jax.set_mesh(program.mesh):
        for number in range(steps):
            state, metrics = program.train_step(state, *program.put_batch(batch_of(number)), 1e-2)
            found.append((float(metrics.loss), float(metrics.grad_norm)))
    return found, state


@pytest.fixture(scope="module")
def on_one_device():
    """What one device gives, by model: computed once."""
    return {}


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        (8, {}),
        ("fsdp=8", {}),
        ("tensor=2", {}),
        ("data=2,fsdp=2,tensor=2", {}),
        (2, {"accumulation": 4, "attention": "recompute"}),
        ("fsdp=2,tensor=2", {"accumulation": 2, "remat": True, "scan_layers": True}),
    ],
)
def test_every_mesh_computes_the_same_steps(x64, mesh_config, on_one_device, mesh, how):
    # A mask goes by its sequence, wherever that is computed. What is scanned is several layers.
    model = dataclasses.replace(MODEL, dropout=0.1, n_layer=2 if "scan_layers" in how else 1)
    if model not in on_one_device:
        on_one_device[model] = run(mesh_config(model=model, precision="float64"))[0]
    found, _ = run(mesh_config(model=model, mesh=mesh, precision="float64", **how))
    np.testing.assert_allclose(found, on_one_device[model], rtol=1e-12)


@pytest.mark.long
def test_the_step_compiles_once_and_donates_its_state(mesh_config):
    config = mesh_config(model=MODEL, mesh="data=2,fsdp=2,tensor=2")
    program = make_program(config)
    first = state = program.initial_state()
    with jax.set_mesh(program.mesh):
        for number in range(3):
            state, _ = program.train_step(state, *program.put_batch(batch_of(number)), np.float32(1e-2))
    assert program.train_step._cache_size() == 1
    assert all(array.is_deleted() for array in jax.tree.leaves(first))
    assert int(state.step) == 3


@pytest.mark.long
def test_with_fsdp_each_device_holds_an_eighth(mesh_config):
    model = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=257)
    config = mesh_config(model=model, mesh="fsdp=8")
    program = make_program(config)
    state = program.initial_state()
    _, trained = run(mesh_config(model=MODEL, mesh="fsdp=8"), steps=1)
    for held in (state, trained):
        leaves = jax.tree.leaves((held.params, held.opt_state))
        total = sum(x.nbytes for x in leaves)
        for device in program.mesh.devices.flat:
            own = sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == device)
            assert own <= total / 8 * 1.05


def test_the_state_is_sharded_from_birth(mesh_config):
    # No device ever holds an array whole: each gets an eighth of every parameter and both its moments.
    config = mesh_config(model=MODEL, mesh="fsdp=8")
    state = make_program(config).initial_state()
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu):
        for name, p in tree.items():
            assert p.addressable_shards[0].data.size * 8 == p.size, name


@pytest.mark.long
def test_decay_touches_matrices_only_and_not_the_vector_that_is_kept_as_a_matrix():
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), MODEL)
    config = define_model_params()
    zeros = jax.tree.map(jnp.zeros_like, config)
    updates, _ = optimizer.update(zeros, optimizer.init(config), config)
    for name, shape in MODEL.parameter_shapes.items():
        expected = 0.5 * config[name] if len(shape) >= 2 else jnp.zeros_like(config[name])
        np.testing.assert_array_equal(updates[name], expected, err_msg=name)


def define_model_params():
    from gpt2_jax.definition import define
    from gpt2_jax.model import Execution

    definition = define(MODEL, Execution())
    return {name: jnp.ones(a.shape, a.dtype) for name, a in definition.abstract.items()}


@pytest.mark.parametrize(("clip", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 5.0 / (5.0 + 1e-6))])
def test_clipping_uses_pytorchs_formula(x64, clip, expected):
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, norm = clip_by_global_norm(grads, clip)
    assert float(norm) == pytest.approx(5.0, rel=1e-15)
    length = np.sqrt(sum(float(jnp.square(g).sum()) for g in clipped.values()))
    assert length == pytest.approx(expected, rel=1e-15)


@pytest.mark.long
def test_a_run_repeats_bitwise(mesh_config):
    config = mesh_config(model=dataclasses.replace(MODEL, dropout=0.1), mesh=8)
    a, a_state = run(config)
    b, b_state = run(config)
    assert a == b
    assert all((a_state.params[n] == b_state.params[n]).all() for n in a_state.params)


@pytest.mark.long
@pytest.mark.parametrize("mesh", [1, "data=2"])
def test_an_update_that_is_not_finite_is_left_out_and_the_next_is_made(mesh_config, mesh):
    """One row of the embeddings is infinite: only a batch with that token isn't finite, on whichever device."""
    model = dataclasses.replace(MODEL, tie_embeddings=False)
    program = make_program(mesh_config(model=model, mesh=mesh))
    state = program.initial_state()
    poisoned = {name: np.asarray(x).copy() for name, x in state.params.items()}
    poisoned["wte.weight"][3] = np.inf
    state = program.initial_state(poisoned)
    good, bad = batch_of(0), batch_of(0)
    good.inputs[good.inputs == 3] = 4
    bad.inputs[-1, -1] = 3
    with jax.set_mesh(program.mesh):
        state, metrics = program.train_step(state, *program.put_batch(good), 1e-2)
        before = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state))]
        state, metrics = program.train_step(state, *program.put_batch(bad), 1e-2)
        assert not np.isfinite(float(metrics.loss)) and int(state.step) == 2
        after = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state))]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))
        state, metrics = program.train_step(state, *program.put_batch(good), 1e-2)
        assert np.isfinite(float(metrics.loss)) and np.isfinite(float(metrics.grad_norm))
        assert any(a.tobytes() != np.asarray(b).tobytes() for a, b in zip(after, jax.tree.leaves(state), strict=False))
        assert not program.is_finite(state) and first_not_finite(program, state.params, bad) == "embeddings"
        assert first_not_finite(program, state.params, good) is None
