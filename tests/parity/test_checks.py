"""Each check passes on the models as they are, and fails on a model with a classic mistake in it."""

import dataclasses

import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import gpt2_jax.train_step
import gpt2_torch.generate
import gpt2_torch.model
import gpt2_torch.train
from parity.subjects import random_weights
from parity.suite import checks

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", list(checks()))
def test_the_two_sides_agree(subject, name):
    results = list(checks()[name](subject))
    assert results and all(r.passed for r in results), results


def test_every_tensor_of_the_random_weights_matters(subject):
    # A bias of zero or a layer norm of one could be left out without being missed.
    for name, array in subject.weights.arrays.items():
        assert array.std() > 0.01, name
    again = random_weights(subject.weights.config)
    assert all((again.arrays[n] == a).all() for n, a in subject.weights.arrays.items())


def exact_gelu(monkeypatch):
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x))


def flax_epsilon(monkeypatch):
    normal = torch.nn.LayerNorm.__init__
    monkeypatch.setattr(torch.nn.LayerNorm, "__init__", lambda self, n, eps: normal(self, n, eps=1e-6))


def unscaled_attention(monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k, scale=1.0))


def clipping_as_optax_does_it(monkeypatch):
    def clip(grads, clip_norm):
        return optax.clip_by_global_norm(clip_norm).update(grads, None)[0], optax.tree.norm(grads)

    monkeypatch.setattr(gpt2_jax.train_step, "clip_by_global_norm", clip)


def decay_on_everything(monkeypatch):
    make = gpt2_torch.train.make_optimizer

    def decaying(model, config):
        optimizer = make(model, config)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
        return optimizer

    monkeypatch.setattr("parity.sides.make_optimizer", decaying)


def mean_of_means(monkeypatch):
    def accumulate(model, inputs, targets, *, accumulation=1, autocast=None):
        total = 0.0
        for i, t in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            loss = model(i, t) / (t >= 0).sum() / accumulation
            loss.backward()
            total += loss.detach()
        return total

    monkeypatch.setattr("parity.sides.accumulate_gradients", accumulate)


def top_p_without_the_crossing_token(monkeypatch):
    sample = gpt2_torch.generate.sample

    def cut(logits, uniforms, sampling):
        if sampling.top_p is not None:
            sampling = dataclasses.replace(sampling, top_p=sampling.top_p * 0.8)
        return sample(logits, uniforms, sampling)

    monkeypatch.setattr(gpt2_torch.generate, "sample", cut)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (exact_gelu, "forward"),
        (exact_gelu, "gradients"),
        (flax_epsilon, "forward"),
        (unscaled_attention, "forward"),
        (unscaled_attention, "generation"),
        (clipping_as_optax_does_it, "loss_curve"),
        (decay_on_everything, "loss_curve"),
        (mean_of_means, "gradients"),
        (top_p_without_the_crossing_token, "generation"),
    ],
)
def test_a_classic_mistake_is_caught(subject, monkeypatch, fault, check):
    fault(monkeypatch)
    results = list(checks()[check](subject))
    assert any(not r.passed for r in results)
    assert all(np.isfinite(r.measured) for r in results)
