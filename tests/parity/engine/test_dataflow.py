"""A program's graph: what is found however deep in calls, branches and loops it is."""

import jax
import jax.numpy as jnp
import pytest

from parity.engine import dataflow

X = jnp.ones(4)


def narrowed(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@jax.custom_vjp
def with_its_own_gradient(x):
    return x


with_its_own_gradient.defvjp(lambda x: (x, None), lambda _, g: (narrowed(g),))

PROGRAMS = {
    "plain": narrowed,
    "call": jax.jit(narrowed),
    "checkpoint": jax.grad(lambda x: jax.checkpoint(lambda x: (narrowed(x) * x).sum())(x)),
    "custom gradient": jax.grad(lambda x: (with_its_own_gradient(x) * x).sum()),
    "branch": lambda x: jax.lax.cond(x[0] > 0, narrowed, lambda x: x, x),
    "platform": lambda x: jax.lax.platform_dependent(x, cuda=narrowed, default=lambda x: x),
    "loop's carry": lambda x: jax.lax.scan(lambda c, y: (narrowed(c), y), x, x)[0],
    "loop's sum": lambda x: jax.lax.scan(lambda c, y: (c + narrowed(y), None), 0.0, x)[0],
    "loop's outputs": lambda x: jax.lax.scan(lambda c, y: (c, narrowed(y)), 0.0, x)[1],
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: narrowed(c) + 1, x),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_narrow_value_on_the_way_to_an_output_is_found(program):
    graph = dataflow.trace(program, X)
    assert any(v.is_narrow for v in dataflow.before(graph.outputs[0], dataflow.ELEMENTWISE))
    assert any(v.is_narrow for v in graph.values())


def test_what_precedes_a_product_is_left_out():
    graph = dataflow.trace(lambda x: jnp.vdot(narrowed(x), x) * 2, X)
    assert not any(v.is_narrow for v in dataflow.before(graph.outputs[0], dataflow.ELEMENTWISE))


def test_what_is_made_of_a_value_is_followed_through_loops_and_no_other_operation():
    def program(x):
        summed, _ = jax.lax.scan(lambda c, _: (c + x, None), jnp.zeros(4), None, length=3)
        return summed, jnp.exp(summed)

    graph = dataflow.trace(program, X)
    found = dataflow.after(graph, graph.inputs, {"add", "copy"})
    assert graph.outputs[0] in found and graph.outputs[1] not in found


def test_an_operation_names_the_function_that_asked_for_it():
    graph = dataflow.trace(narrowed, X)
    assert [str(o) for o in graph.operations] == ["convert_element_type in test_dataflow.py, narrowed"] * 2
