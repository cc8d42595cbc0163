import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax.generate
from gpt2_core.config import ModelConfig
from gpt2_core.sampling import Sampling, fit_context
from gpt2_jax.definition import define
from gpt2_jax.generate import Generator, sample
from gpt2_jax.model import Execution

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampler_cases import SETTINGS, by_definition, logits_and_uniforms

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_sampler_follows_its_definition(x64, sampling):
    logits, numbers = logits_and_uniforms()
    found = sample(jnp.asarray(logits), jnp.asarray(numbers), sampling)
    assert found.tolist() == [by_definition(row, u, sampling) for row, u in zip(logits, numbers, strict=True)]


def test_zeros_of_either_sign_are_equal_and_go_by_token_id():
    logits = jnp.array([[-1.0, -0.0, 0.0, -2.0]])
    for sampling in (Sampling(top_k=1), Sampling(top_k=1, top_p=0.5), Sampling(top_p=0.1), Sampling(greedy=True)):
        assert sample(logits, jnp.zeros(1), sampling).tolist() == [1]


@pytest.fixture(scope="module", params=["learned"])
def generator(request):
    with jax.enable_x64(True):
        definition = define(dataclasses.replace(CONFIG, position=request.param), Execution("float64"))
        params = jax.tree.map(lambda p: 8 * p, jax.jit(definition.initialize)(jax.random.key(0)))
        yield Generator(definition), params


def recomputed(generator, params, prompt, tokens):
    """Greedy generation without a cache: the whole context through the model that trains, each time."""
    logits = jax.jit(lambda tokens_BT: generator.definition.merge(params)(tokens_BT))
    context, found = fit_context(prompt, 8, growing=False), []
    for _ in range(tokens):
        padded = np.array([context + [0] * (8 - len(context))])  # what follows is not seen
        found.append(int(np.argmax(logits(padded)[0, len(context) - 1])))
        context = fit_context([*context, found[-1]], 8, growing=True)
    return found


@pytest.mark.long
@pytest.mark.parametrize("generator", ["learned", "rope", "alibi"], indirect=True)
def test_the_cache_gives_what_recomputing_gives_past_the_block_too(x64, generator, monkeypatch):
    monkeypatch.setattr(gpt2_jax.generate, "CHUNK", 3)
    prompts = [[1, 2, 3], list(range(12))]
    for prompt in prompts:
        found = [row[0] for row in generator[0](generator[1], [prompt], np.zeros((1, 20)), Sampling(greedy=True))]
        assert found == recomputed(*generator, prompt, 20)


@pytest.mark.long
def test_prompts_of_different_lengths_do_not_see_each_other(x64, generator, monkeypatch):
    monkeypatch.setattr(gpt2_jax.generate, "CHUNK", 2)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [2, 2]]
    numbers = np.random.default_rng(0).random((4, 16))
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.95)
    together = np.array(list(generator[0](generator[1], prompts, numbers, sampling))).T
    alone = [
        [row[0] for row in generator[0](generator[1], [p], numbers[i : i + 1], sampling)] for i, p in enumerate(prompts)
    ]
    assert together.tolist() == alone


@pytest.mark.long
def test_in_bfloat16_a_token_reads_narrow_weights_and_is_the_token_that_wide_ones_give(monkeypatch):
    config = dataclasses.replace(CONFIG, n_layer=1, block_size=32)
    definition = define(config, Execution("bfloat16"))
    params = jax.tree.map(lambda p: 8 * p, jax.jit(definition.initialize)(jax.random.key(0)))
    numbers = np.random.default_rng(0).random((2, 25))
    prompts, sampling = [[1, 2, 3], [4]], Sampling(top_k=20)

    narrow = Generator(definition)
    found = list(narrow(params, prompts, numbers, sampling))
    given = narrow._narrowed(params)
    head, table = given["lm_head.weight"], given["wte.weight"]
    assert (head.dtype, table.dtype) == (jnp.bfloat16, jnp.float32)
    assert {given[f"h.0.{name}.weight"].dtype for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")} == {head.dtype}
    assert given["h.0.ln_1.weight"].dtype == jnp.float32
    # The input axis is the last, or XLA writes a token's products with a weight to a GPU's memory and reads them back.
    assert [given[f"h.0.mlp.{name}.weight"].shape for name in ("c_fc", "c_proj")] == [(64, 16), (16, 64)]

    monkeypatch.setattr(Generator, "_narrows", False)
    assert list(Generator(definition)(params, prompts, numbers, sampling)) == found


@pytest.mark.long
def test_the_next_chunk_is_dispatched_before_the_last_is_fetched(x64, generator, monkeypatch):
    made, params = generator
    monkeypatch.setattr(gpt2_jax.generate, "CHUNK", 2)
    dispatched = []

    def recording(compiled):
        return lambda *given, **named: dispatched.append(compiled) or compiled(*given, **named)

    for name in ("_prefill", "_decode"):
        monkeypatch.setitem(made.__dict__, name, recording(getattr(made, name)))
    seen = [len(dispatched) for _ in made(params, [[1, 2, 3, 4]], np.zeros((1, 8)), Sampling(greedy=True))]
    # Five tokens fit in the block of 8: a prefill's and two chunks'. Then its window slides, for which the tokens must
    # be known; three more are a prefill's and a chunk's.
    assert seen == [2, *[3] * 4, 5, 5, 5]


@pytest.mark.long
def test_the_device_stops_when_every_sequence_has_ended(monkeypatch):
    # A sampler that says which tokens come: 7 is the end of a text, the first's second and the second's third.
    monkeypatch.setattr(gpt2_jax.generate, "sample", lambda logits, uniforms, sampling: uniforms.astype(jnp.int32))
    monkeypatch.setattr(gpt2_jax.generate, "CHUNK", 3)
    numbers = np.array([[1, 7, 2, 3, 4, 5, 6, 8], [9, 8, 7, 6, 5, 4, 3, 2]])
    made = Generator(define(CONFIG, Execution("float32")))
    params = jax.jit(made.definition.initialize)(jax.random.key(0))
    computed, decode = [], made._decode

    def record(*given, **named):
        out = decode(*given, **named)
        computed.extend(np.asarray(out[-1]).tolist())
        return out

    monkeypatch.setitem(made.__dict__, "_decode", record)
    assert list(made(params, [[0], [0]], numbers, Sampling(), 7)) == [[1, 9], [7, 8], [2, 7]]
    # After the prefill's token a chunk that stops before its third, and the next, by then dispatched: it does nothing.
    assert computed == [[7, 8], [2, 7], [0, 0], *[[0, 0]] * 3]
    assert len(list(made(params, [[0], [0]], numbers, Sampling()))) == 8


@pytest.mark.parametrize("batch", [1, 2])
def test_the_loop_on_the_device_writes_to_the_caches_it_is_given_and_copies_none(batch):
    definition = define(dataclasses.replace(CONFIG, block_size=512), Execution("float32"))
    caches = jax.eval_shape(lambda: definition.empty_caches(batch, 512))
    integers, flags = (jax.ShapeDtypeStruct((batch,), dtype) for dtype in ("int32", "bool"))
    numbers = jax.ShapeDtypeStruct((8, batch), "float32")
    given = (dict(definition.abstract), caches, integers, flags, integers, numbers)
    compiled = Generator(definition)._decode.lower(*given, sampling=Sampling(greedy=True), end_of_text=None).compile()
    memory, sizes = compiled.memory_analysis(), [4 * x.size for x in jax.tree.leaves(caches)]
    assert memory.alias_size_in_bytes == sum(sizes)
    assert memory.temp_size_in_bytes < sizes[0]
    # Known to the compiler: a GPU doesn't ask the host whether to go on.
    assert '"known_trip_count":{"n":"8"}' in compiled.as_text()


@pytest.mark.long
def test_a_cache_that_grows_gives_the_tokens_of_one_that_had_room(x64, generator, monkeypatch):
    made, params = generator
    prompts, numbers = [[1], [3]], np.random.default_rng(0).random((2, 9))
    roomy = list(made(params, prompts, numbers, Sampling(top_k=9)))
    sizes, grow = [], gpt2_jax.generate._grow
    monkeypatch.setattr(gpt2_jax.generate, "MIN_SLOTS", 1)
    monkeypatch.setattr(gpt2_jax.generate, "CHUNK", 3)
    monkeypatch.setattr(gpt2_jax.generate, "_grow", lambda caches, slots: sizes.append(slots) or grow(caches, slots))
    assert list(made(params, prompts, numbers, Sampling(top_k=9))) == roomy
    assert sizes[:2] == [4, 8]
