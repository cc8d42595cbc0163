import dataclasses

import pytest
import yaml

from gpt2_core.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolved,
    with_accumulation,
)
from gpt2_core.config.checks import divisors
from gpt2_core.config.io import differences, from_dict, to_yaml
from gpt2_core.errors import UserError


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_parameter_counts(preset, count):
    assert ModelConfig(**PRESETS[preset]).parameter_count == count


def test_padding_the_vocabulary_to_50304_adds_47_rows():
    assert ModelConfig(vocab_size=50304).parameter_count == 124_475_904


def test_training_flops_are_six_a_parameter_and_the_attention_square():
    # PaLM's formula worked by hand for gpt2: 6 (124,439,808 - 1024 x 768) + 12 x 12 x 1024 x 768.
    assert ModelConfig().training_flops_per_token(1024) == 855_166_464 - 6 * 1024 * 768 - 108_527_616 + 113_246_208


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(n_embd=100, n_head=3), "--model.n_embd 100: not divisible by n_head 3"),
        (lambda: ModelConfig(n_layer=0), "--model.n_layer 0"),
        (lambda: ModelConfig(dropout=1.0), "--model.dropout 1.0"),
        (lambda: DataConfig(validation_fraction=1.0), "--data.validation_fraction 1.0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "--optimizer.learning_rate nan"),
        (lambda: OptimizerConfig(beta2=1.0), "--optimizer.beta2 1.0"),
        (lambda: TrainConfig(batch_size=6, accumulation=4), "--accumulation 4: batch_size 6 .* use 1, 2, 3 or 6"),
    ],
)
def test_impossible_settings_are_refused_with_what_was_typed(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_yaml_gives_the_configuration_back():
    config = TrainConfig(model=ModelConfig(n_layer=3), optimizer=OptimizerConfig(learning_rate=1e-5), mesh="fsdp=2")
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_a_resolved_configuration_is_written_as_one_that_was_asked_for():
    decided = {"precision": "float32", "mesh": "data=2,fsdp=1,tensor=1", "accumulation": 2}
    config = resolved(TrainConfig(mesh=2), **decided)
    assert to_yaml(config) == to_yaml(TrainConfig(**decided))
    with pytest.raises(AssertionError, match="auto isn't resolved"):
        resolved(TrainConfig())


def test_differences_are_named_with_dots():
    a = TrainConfig()
    b = dataclasses.replace(a, model=ModelConfig(n_layer=3), seed=5)
    assert list(differences(a, b, frozenset({"seed"}))) == [("model.n_layer", 12, 3)]


def test_options_change_the_count_by_what_they_add_and_take():
    base = ModelConfig()
    D, F, T, V, L = 768, 3072, 1024, 50257, 12

    def change(**options):
        return ModelConfig(**options).parameter_count - base.parameter_count

    biases = L * (3 * D + D + F + D)
    assert change(position="rope") == change(position="alibi") == -T * D
    assert change(norm="rmsnorm") == -(2 * L + 1) * D
    assert change(bias=False) == -biases - (2 * L + 1) * D
    assert change(tie_embeddings=False) == V * D
    assert change(qk_norm=True) == L * 2 * 64
    assert change(mlp="gelu_exact") == 0
    assert change(mlp="swiglu", mlp_width=F) == L * (D * F + F)


def test_swiglus_default_width_keeps_the_parameters_of_a_gelu_mlp():
    assert ModelConfig(mlp="swiglu").mlp_size == 2048  # 8/3 x 768
    assert ModelConfig(n_embd=800, n_head=10, mlp="swiglu").mlp_size == 2176  # 2133.3 rounded up to a multiple of 64
    assert ModelConfig(mlp="swiglu", mlp_width=100).mlp_size == 100


def test_an_embedding_that_is_only_looked_up_costs_no_flops():
    tied, untied = ModelConfig(), ModelConfig(tie_embeddings=False)
    assert tied.training_flops_per_token(64) == untied.training_flops_per_token(64)
    rope = ModelConfig(position="rope")
    assert rope.training_flops_per_token(64) == tied.training_flops_per_token(64)


def test_rope_needs_an_even_head():
    with pytest.raises(UserError, match="--model.position rope: .* = 5 is odd"):
        ModelConfig(n_embd=10, n_head=2, position="rope")


@pytest.mark.parametrize(
    ("batch", "fits", "devices", "parts"),
    [(512, 32, 1, 16), (512, 32, 8, 2), (512, 64, 8, 1), (96, 7, 4, 4), (8, 99, 2, 1)],
)
def test_accumulation_is_the_least_that_fits_the_devices(batch, fits, devices, parts):
    config = with_accumulation(TrainConfig(batch_size=batch, device_batch_size=fits), devices)
    assert config.accumulation == parts
    share = config.microbatch_size // devices
    assert share * devices * parts == batch and share <= fits


def test_a_batch_is_counted_in_tokens_too():
    assert TrainConfig(batch_tokens=524_288).batch_size == 512
    with pytest.raises(UserError, match="--batch_tokens 5000: not a multiple of the sequence length 1024; use 5120"):
        TrainConfig(batch_tokens=5000)
    with pytest.raises(UserError, match="--batch_size 512: not divisible by the 3 devices that share it; use 510"):
        with_accumulation(TrainConfig(batch_size=512, device_batch_size=8), 3)


@pytest.mark.parametrize("epsilon", [0.0, -1e-8, float("inf"), float("nan")])
def test_an_epsilon_that_divides_zero_by_zero_or_everything_to_zero_is_refused(epsilon):
    with pytest.raises(UserError, match=f"--optimizer.epsilon {epsilon}: must be above 0 and finite"):
        OptimizerConfig(epsilon=epsilon)
    with pytest.raises(UserError, match=f"--model.layer_norm_epsilon {epsilon}: must be above 0 and finite"):
        ModelConfig(layer_norm_epsilon=epsilon)


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 1_000_000_007])
def test_divisors_are_found_without_trying_every_number(number):
    found = divisors(number)
    assert found == sorted(found) and all(number % n == 0 for n in found)
    assert found == [n for n in range(1, number + 1) if number % n == 0] if number < 100 else [1, number]


def test_a_sequence_may_be_shorter_than_the_context_and_not_longer():
    config = TrainConfig(sequence_length=256, batch_tokens=8192)
    assert (config.tokens_per_sequence, config.batch_size, config.tokens_per_step) == (256, 32, 8192)
    assert TrainConfig(model=ModelConfig(block_size=64)).tokens_per_sequence == 64
    attention = 12 * 12 * 768
    assert TrainConfig().training_flops_per_token - config.training_flops_per_token == attention * (1024 - 256)
    with pytest.raises(UserError, match="--sequence_length 1025: the model has only 1024 positions"):
        TrainConfig(sequence_length=1025)
