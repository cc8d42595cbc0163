"""Which models the check sends through every format, and that what is lost on the way is seen."""

import dataclasses
import functools
import operator
from unittest import mock

import numpy as np
import pytest

from gpt2_convert import FORMATS, Holds
from gpt2_core.config import ModelConfig
from gpt2_core.weights import DTYPES
from parity.gpt2 import raw_files
from parity.gpt2.cases import random_weights
from parity.gpt2.checks import weights
from parity.gpt2.checks.weights import MODELS
from parity.gpt2.faults import case_of

pytestmark = pytest.mark.usefixtures("x64")


def test_every_dtype_and_every_setting_of_the_architecture_goes_through_the_formats():
    assert {dtype for _, dtype, _ in MODELS.values()} == set(DTYPES)
    changed = {
        field.name
        for config, _, _ in MODELS.values()
        for field in dataclasses.fields(ModelConfig)
        if getattr(config, field.name) != field.default
    }
    assert changed == {field.name for field in dataclasses.fields(ModelConfig)}
    assert functools.reduce(operator.or_, (needs for _, _, needs in MODELS.values())) == ~Holds(0)


def test_the_files_of_every_format_that_others_read_are_opened_by_other_means():
    """All but the JAX trainer's checkpoint, which no other program writes or reads."""
    assert set(raw_files.READERS) == set(FORMATS) - {"jax"}


def test_weights_in_float64_have_digits_that_float32_has_not():
    arrays = random_weights(case_of().weights.config, dtype=np.float64).arrays
    assert all((array != array.astype(np.float32)).any() for array in arrays.values())


def test_a_format_that_takes_what_it_cannot_hold_is_seen():
    with mock.patch.dict(FORMATS, {"llmc": dataclasses.replace(FORMATS["torch"], holds=FORMATS["llmc"].holds)}):
        result = weights._model({}, "every option", *MODELS["every option in float64"])
    assert not result.passed and result.where == "llmc: is taken, and can't be held"


def test_a_format_that_refuses_what_it_can_hold_is_seen():
    layout = dataclasses.replace(FORMATS["hf"].layout, dtypes=("float32",))
    with mock.patch("gpt2_convert.hugging_face.LAYOUT", layout):
        result = weights._model({}, "bfloat16", *MODELS["11 layers in bfloat16"])
    assert not result.passed and result.where.startswith("hf: --to hf: can't hold")
