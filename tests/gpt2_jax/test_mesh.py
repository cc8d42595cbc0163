import dataclasses

import pytest

from gpt2_core.config import PRESETS, ModelConfig, TrainConfig
from gpt2_core.errors import UserError
from gpt2_jax.mesh import check_mesh, check_option, format_mesh, parse_mesh


def test_a_mesh_number_means_data():
    assert parse_mesh(8) == parse_mesh("8") == parse_mesh("data=8") == {"data": 8, "fsdp": 1, "tensor": 1}


def test_a_mesh_is_written_as_it_is_read():
    sizes = parse_mesh("tensor=2,fsdp=4")
    assert parse_mesh(format_mesh(sizes)) == sizes == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("data=2,data=4", "named twice"),
        ("rows=2", "--mesh rows=2: expected a number of devices"),
        ("data=0", "--mesh data=0"),
    ],
)
def test_what_is_no_mesh_is_refused_with_what_was_typed(mesh, words):
    with pytest.raises(UserError, match=words):
        parse_mesh(mesh)


@pytest.mark.parametrize(
    ("mesh", "config", "words"),
    [
        ("data=3", TrainConfig(batch_size=8), "--mesh data=3: batch_size 8 .* use 1, 2, 4 or 8"),
        (8, TrainConfig(batch_size=8, accumulation=4), "batch_size 8 / accumulation 4 = 2"),
        (
            "tensor=2",
            TrainConfig(model=ModelConfig(**PRESETS["gpt2-xl"])),
            "n_head 25 is not divisible by tensor = 2; use 1, 5 or 25",
        ),
    ],
)
def test_a_model_and_a_batch_that_a_mesh_does_not_divide_are_refused(mesh, config, words):
    with pytest.raises(UserError, match=words):
        check_mesh(parse_mesh(mesh), config)


def test_the_option_is_checked_unless_accumulation_is_still_to_be_computed():
    config = TrainConfig(mesh=8, batch_size=4)
    with pytest.raises(UserError, match="--mesh data=8: batch_size 4 is not divisible"):
        check_option(config)
    check_option(dataclasses.replace(config, device_batch_size=1))
    check_option(dataclasses.replace(config, mesh=None))
