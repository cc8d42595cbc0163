"""Spikes of the training loss: the same limit in both frameworks and by the definition, and updates left out by it."""

import json
import math

import jax
import numpy as np
import pytest
import torch

from gpt2_core.config import OptimizerConfig
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import losses_of, metadata_path, read_metrics
from gpt2_core.spikes import LEAST, WINDOW, known, window
from gpt2_jax import spikes as jax_spikes
from gpt2_jax.train import train as train_jax
from gpt2_torch import spikes as torch_spikes
from gpt2_torch.train import train as train_torch


@pytest.mark.parametrize("count", [0, LEAST - 1, LEAST, WINDOW])
def test_the_limit_is_the_mean_and_so_many_deviations_of_the_losses_that_are_there(count):
    losses = np.random.default_rng(count).gamma(4.0, size=count)
    expected = losses.mean() + 3.5 * losses.std() if count >= LEAST else math.inf
    before = window(losses.tolist())
    with jax.enable_x64(True):
        assert float(jax_spikes.loss_limit(jax.numpy.asarray(before), 3.5)) == pytest.approx(expected, rel=1e-13)
    found = torch_spikes.loss_limit(torch.tensor(before, dtype=torch.float64), 3.5)
    assert float(found) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("before", "loss"), [(3, 1.5), (WINDOW, 1.5), (WINDOW, math.nan), (WINDOW, math.inf)])
def test_the_window_takes_the_newest_loss_and_drops_the_oldest(before, loss):
    losses = [0.5 + i for i in range(before)]
    expected = [*losses, loss][-WINDOW:] if math.isfinite(loss) else losses
    ours = jax_spikes.with_loss(jax.numpy.asarray(window(losses)), jax.numpy.asarray(loss))
    theirs = torch_spikes.with_loss(torch.tensor(window(losses)), torch.tensor(loss))
    assert known(np.asarray(ours).tolist()) == known(theirs.tolist()) == expected


@pytest.fixture
def spiky(make_config):
    """A run that hardly learns, so that a third of its losses are half a standard deviation above those before."""

    def make(name, **overrides):
        settings = {
            "steps": 40,
            "optimizer": OptimizerConfig(learning_rate=1e-6, final_fraction=1.0, warmup_steps=0),
            "checkpoint_interval": 30,
            "skip_spikes": 0.5,
        }
        return make_config(name, **settings | overrides)

    return make


def applied(folder):
    """Step and loss of the updates that were made."""
    rows = read_metrics(folder.metrics)
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train" and "left_out" not in row}


@pytest.mark.long
@pytest.mark.parametrize("train", [train_jax, train_torch])
def test_updates_of_spikes_are_left_out_and_a_resumed_run_leaves_out_the_same(train, spiky, capsys):
    whole = train(spiky("whole"))
    out = capsys.readouterr().out
    left_out = sorted(set(range(40)) - set(applied(whole)))
    assert left_out and min(left_out) >= LEAST and max(left_out) > 30
    for step in left_out:
        assert f"warning: step {step} has loss" in out
    part = train(spiky("part"))
    (part.checkpoints / "40").rename(part.path / "taken away")
    assert applied(train(spiky("part", resume="newest"))) == applied(whole)
    reported = train(spiky("reported", skip_spikes=None))
    losses = [applied(reported)[step] for step in range(40)]
    assert losses[: left_out[0]] == [applied(whole)[step] for step in range(left_out[0])]
    # The first that is left out is above the limit by the definition, and none before it is.
    limits = [np.mean(losses[:n]) + 0.5 * np.std(losses[:n]) for n in range(LEAST, left_out[0] + 1)]
    assert [loss > limit for loss, limit in zip(losses[LEAST:], limits, strict=False)][-1]
    assert not any(loss > limit for loss, limit in zip(losses[LEAST : left_out[0]], limits, strict=False))


@pytest.mark.long
def test_both_frameworks_leave_out_the_same_updates(spiky):
    start = train_jax(spiky("start", steps=0)).path
    ours, theirs = (
        applied(train(spiky(name, init_from=str(start)), initial_weights))
        for name, train in {"jax": train_jax, "torch": train_torch}.items()
    )
    assert ours.keys() == theirs.keys() and len(ours) < 40
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5


def initial_weights(config):
    from gpt2_convert import read_weights

    return read_weights(config.init_from)


@pytest.mark.long
@pytest.mark.parametrize("train", [train_jax, train_torch])
def test_a_run_may_be_resumed_with_spikes_left_out_from_there_on(train, spiky):
    before = train(spiky("run", skip_spikes=None, steps=30))
    assert set(applied(before)) == set(range(30))
    after = train(spiky("run", steps=60, resume="newest"))
    made = applied(after)
    # Of the losses before nothing is known: the first LEAST updates after it are all made.
    assert set(range(30 + LEAST)) <= set(made) and len(made) < 60


@pytest.mark.parametrize("losses", ["3", [1.0, "2"], [-1.0], [True], [1.0] * (WINDOW + 1), [math.inf]])
def test_losses_that_no_run_has_saved_are_refused(losses, tmp_path):
    path = metadata_path(tmp_path)
    path.parent.mkdir()
    found = {"framework": "jax", "step": 1, "data_digest": "d", "tokenizer": "bytes", "model": {}, "losses": losses}
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="losses"):
        losses_of(tmp_path)
