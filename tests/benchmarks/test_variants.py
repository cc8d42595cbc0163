import dataclasses
import functools
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import train, variants
from benchmarks.measure import Session
from benchmarks.variants import FLAGS, VARIANTS, Variant, compare, jax_side, torch_side
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.errors import RunError
from gpt2_jax import loss
from gpt2_jax.layers import Linear

CONFIG = TrainConfig(model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64), batch_size=8)


@pytest.fixture
def started(monkeypatch):
    """What a side of JAX would find, instead of the side."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=true")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    for where in {where for variant in VARIANTS for where in variant.attributes}:
        module, name = variants._found(where)
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    found = {}

    def session(spec) -> Session:
        found.update(spec, chunk=loss.CHUNK_BYTES, softmax=loss._in_one_pass, flags=os.environ["XLA_FLAGS"])
        return Session({}, lambda units: None)

    monkeypatch.setattr(train, "jax_session", session)
    return found


def by_name(name: str) -> Variant:
    return next(variant for variant in (*VARIANTS, *FLAGS) if variant.name == name)


@pytest.mark.parametrize("variant", (*VARIANTS, *FLAGS), ids=lambda variant: variant.name)
def test_a_variant_differs_from_the_default_in_what_it_names_alone(variant, started):
    default = jax_side("default", CONFIG)
    varied = jax_side(variant.name, CONFIG, variant)
    different = {name for name in varied if varied[name] != default[name]} - {"name"}
    named = {name for name in ("config", "attributes", "flags") if getattr(variant, name)}
    assert different == named and named
    variants.jax_session(varied)
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variants_values_are_not_the_defaults(variant):
    for where, value in variant.attributes.items():
        replacement = getattr(*variants._found(value)) if isinstance(value, str) else value
        assert getattr(*variants._found(where)) != replacement
    for name, value in variant.config.items():
        assert functools.reduce(getattr, name.split("."), TrainConfig()) != value


def test_attributes_and_flags_are_set_before_the_step_is_made(started):
    variants.jax_session(jax_side("x", CONFIG, by_name("chunk-256MB")))
    assert started["chunk"] == 256 << 20 and started["flags"] == "--xla_cpu_use_onednn=true"
    variants.jax_session(jax_side("x", CONFIG, by_name("softmax-two-passes")))
    assert started["softmax"] is loss._in_two_passes
    variants.jax_session(jax_side("x", CONFIG, by_name("no-triton-gemm")))
    assert started["flags"] == "--xla_cpu_use_onednn=true --xla_gpu_enable_triton_gemm=false"
    assert started["cached"]


def test_a_dotted_setting_reaches_its_group():
    assert jax_side("x", CONFIG, by_name("dropout"))["config"]["model"]["dropout"] == 0.1
    assert CONFIG.model.dropout == 0.0


def test_a_variant_of_nothing_is_refused(started):
    for where in ("gpt2_jax.loss:NO_SUCH", "gpt2_jax.layers:Linear.no_such", "gpt2_jax.layers:NoSuch.split"):
        gone = Variant("gone", "gone", attributes={where: 1})
        with pytest.raises(RunError, match=f"{where}: there is no such attribute"):
            variants.jax_session(jax_side("gone", CONFIG, gone))


@pytest.mark.long
def test_one_product_for_q_k_and_v_computes_what_three_do():
    linear = Linear((4, 3, 5), ("embed", "qkv", "heads"), std=1.0, bias=True, param_dtype="float32", rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(15.0).reshape(3, 5)
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for ours, expected in zip(variants.split_afterwards(linear, x), linear.split(x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_lack_of_memory_is_named_in_one_line(monkeypatch):
    def session(spec) -> Session:
        def work(units: int) -> None:
            raise ValueError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nBuffer 1:\nBuffer 2:"
            )

        return Session({}, work)

    monkeypatch.setattr(train, "torch_session", session)
    with pytest.raises(RunError, match=r"^out of memory: RESOURCE_EXHAUSTED.* 7 bytes\.$"):
        variants.torch_session({}).work(1)


def measure_up_to(fits: int, tried: list[int]):
    """In the place of train.measure: batches of more than `fits` sequences don't fit."""

    def measure(functions, config, *, rounds, steps, console):
        assert {spec["config"]["batch_size"] for _, spec in functions.values()} == {config.batch_size}
        tried.append(config.batch_size)
        if config.batch_size > fits:
            raise RunError("torch: out of memory: CUDA out of memory.")
        return [{"side": name} for name in functions], {"jax": [1.0, 1.0], "torch": [2.0, 3.0]}

    return measure


def spec(**more):
    sides = [jax_side("jax", CONFIG), torch_side("torch", CONFIG, "flash", compile=True)]
    return {"sides": sides, "rounds": 2, "steps": 1} | more


def test_a_batch_is_halved_until_both_fit(monkeypatch):
    tried: list[int] = []
    monkeypatch.setattr(train, "measure", measure_up_to(2, tried))
    found = compare(spec(halve=True))
    assert tried == [8, 4, 2] and found["batch"] == 2
    assert found["ratio"]["median"] == 2.5  # the first side is the one that is judged


@pytest.mark.parametrize(("fits", "more"), [(0, {"halve": True}), (4, {})])
def test_what_does_not_fit_at_all_or_may_not_be_halved_fails(monkeypatch, fits, more):
    monkeypatch.setattr(train, "measure", measure_up_to(fits, []))
    with pytest.raises(RunError, match="out of memory"):
        compare(spec(**more))


def test_sides_can_be_sent_to_another_process():
    import json

    for side in spec()["sides"]:
        assert json.loads(json.dumps(side)) == side
        assert dataclasses.asdict(CONFIG) == side["config"]
