"""Transforms of tensors: text and back, taken back, of gradients."""

import numpy as np
import pytest

from parity.engine.errors import EngineError
from parity.pair.candidates import one_to_one, part_of
from parity.pair.transforms import Transform, parse

X = np.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "text",
    [
        "identity",
        "transpose",
        "transpose | reshape(6, 2, 2)",
        "reshape(2, 2, 6) | permute(2, 0, 1) | flip(0, 1)",
        "pad(3)",
    ],
)
def test_a_transform_is_read_back_from_its_text_and_taken_back(text):
    transform = parse(text)
    assert str(transform) == text and parse(str(transform)) == transform
    np.testing.assert_array_equal(transform.undo(transform(X), X.shape), X)


def test_several_tensors_become_one():
    np.testing.assert_array_equal(parse("concat(0) | transpose")(X, X), np.concatenate([X, X]).T)
    np.testing.assert_array_equal(parse("each | transpose")(X, X), np.stack([X.T, X.T]))
    np.testing.assert_array_equal(parse("add | reshape(24)")(X, X), 2 * X.ravel())
    # Both terms of a sum have the sum's gradient.
    np.testing.assert_array_equal(parse("add").gradient(X, 3 * X), X)


@pytest.mark.parametrize("text", ["turn", "transpose(", "reshape(2; 3)"])
def test_what_is_no_transform_is_refused_by_name(text):
    with pytest.raises(EngineError, match="is unknown; steps are"):
        parse(text)


def test_a_transform_that_does_not_fit_names_the_shapes():
    with pytest.raises(EngineError, match=r"reshape\(5, 5\) doesn't fit tensors of shape \(4, 6\)"):
        parse("reshape(5, 5)")(X)


@pytest.mark.parametrize(
    ("source", "target", "first"),
    [
        ((4, 6), (6, 4), "transpose"),
        ((4, 4), (4, 4), "transpose"),
        ((8, 3, 5, 5), (5, 5, 3, 8), "permute(2, 3, 1, 0)"),
        ((6, 4), (4, 3, 2), "transpose | reshape(4, 3, 2)"),
        ((7,), (7,), "identity"),
    ],
)
def test_the_usual_layout_is_tried_first(source, target, first):
    assert str(next(one_to_one(source, target))) == first


def test_every_part_of_a_fused_tensor_is_a_candidate():
    found = {str(t) for t in part_of((12, 4), (4, 4))}
    assert {f"chunk({i}, 3, 0) | transpose" for i in range(3)} <= found and all(
        parse(t)(np.ones((12, 4))).shape == (4, 4) for t in found
    )
    assert Transform() not in set(part_of((12, 4), (4, 4)))
