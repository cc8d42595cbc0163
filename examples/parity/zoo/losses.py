"""Losses: PyTorch's against Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from .frameworks import data
from .rows import Pair, Row

FAMILY = "losses"
TITLE = "Losses"

N, K = 6, 5
LOGITS = data(N, K, scale=2.0)
LABELS = np.array([0, 3, 1, 4, 2, 2])
TARGETS = np.exp(data(N, K, seed=1))
TARGETS /= TARGETS.sum(1, keepdims=True)
PREDICTIONS, VALUES = data(N, 3, scale=2.0), data(N, 3, seed=1)
IGNORED = np.array([0, -100, 1, 4, -100, 2])
WEIGHT = np.array([1.0, 2.0, 0.5, 1.5, 3.0])


def _torch(loss, *arrays: np.ndarray, **arguments) -> torch.Tensor:
    return loss(*(torch.from_numpy(array.copy()) for array in arrays), **arguments)


def _jax(loss, *arrays: np.ndarray, **arguments) -> jax.Array:
    return loss(*(jnp.asarray(array) for array in arrays), **arguments)


def _simple(torch_loss, loss, *arrays: np.ndarray, torch_arguments: dict | None = None, factor: float = 1, **arguments):
    """A loss of PyTorch against a loss of Optax and its mean."""
    return lambda: (
        _torch(torch_loss, *arrays, **(torch_arguments or {})),
        _jax(loss, *arrays, **arguments).mean() * factor,
    )


def _integer(logits: np.ndarray = LOGITS, labels: np.ndarray = LABELS, **arguments) -> jax.Array:
    return _jax(optax.softmax_cross_entropy_with_integer_labels, logits, labels, **arguments)


def _cross_entropy(mean: bool) -> Pair:
    values = _integer()
    return _torch(F.cross_entropy, LOGITS, LABELS), values.mean() if mean else values


def _axis(moved: bool) -> Pair:
    """Five classes on axis 1, and five positions, so that the wrong axis fits."""
    logits, labels = data(2, K, K, scale=2.0), np.arange(2 * K).reshape(2, K) * 3 % K
    return _torch(F.cross_entropy, logits, labels), _integer(logits, labels, axis=1 if moved else -1).mean()


def _ignored(masked: bool) -> Pair:
    values, counts = _integer(labels=IGNORED), IGNORED >= 0
    reference = _torch(F.cross_entropy, LOGITS, IGNORED)
    return reference, jnp.where(counts, values, 0).sum() / counts.sum() if masked else values.mean()


def _weighted(divide: bool) -> Pair:
    values, weights = _integer(), WEIGHT[LABELS]
    reference = _torch(F.cross_entropy, LOGITS, LABELS, weight=torch.from_numpy(WEIGHT))
    return reference, (values * weights).sum() / weights.sum() if divide else (values * weights).mean()


def _smoothed(smooth: bool) -> Pair:
    reference = _torch(F.cross_entropy, LOGITS, LABELS, label_smoothing=0.1)
    if not smooth:
        return reference, _integer().mean()
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, K), 0.1)
    return reference, optax.softmax_cross_entropy(LOGITS, targets).mean()


def _smoothed_weighted() -> Pair:
    """PyTorch's smoothing weighs the smooth part by every class' weight, the divisor by the target's."""
    weight = torch.from_numpy(WEIGHT)
    reference = _torch(F.cross_entropy, LOGITS, LABELS, label_smoothing=0.1, weight=weight)
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, K), 0.1)
    values = optax.softmax_cross_entropy(LOGITS, targets * WEIGHT)
    return reference, values.sum() / WEIGHT[LABELS].sum()


def _nll() -> Pair:
    log_probabilities = np.asarray(jax.nn.log_softmax(LOGITS))
    return _torch(F.nll_loss, log_probabilities, LABELS), _integer(log_probabilities).mean()


def _bce_weighted(by_hand: bool) -> Pair:
    logits, targets = LOGITS, (TARGETS > 0.2).astype(float)
    reference = _torch(F.binary_cross_entropy_with_logits, logits, targets, pos_weight=torch.from_numpy(WEIGHT))
    if not by_hand:
        return reference, optax.sigmoid_binary_cross_entropy(logits, targets).mean()
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return reference, -(WEIGHT * targets * positive + (1 - targets) * negative).mean()


def _bce(clipped: bool) -> Pair:
    """On probabilities, one of them 0 where the target is 1."""
    p, targets = np.array([0.0, 0.3, 0.8, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    logs, complements = jnp.log(p), jnp.log1p(-p)
    if clipped:
        logs, complements = jnp.maximum(logs, -100), jnp.maximum(complements, -100)
    values = -jnp.where(targets == 1, logs, complements)
    return _torch(F.binary_cross_entropy, p, targets), values.mean()


def _ctc(normalized: bool) -> Pair:
    """Logits (batch, time, classes) for Optax, log probabilities (time, batch, classes) for PyTorch; no repeats."""
    logits, labels, lengths = data(2, 7, K, scale=2.0), np.array([[1, 2, 3], [4, 1, 0]]), np.array([3, 2])
    log_probabilities = torch.from_numpy(logits).log_softmax(-1).transpose(0, 1)
    reference = F.ctc_loss(log_probabilities, torch.from_numpy(labels), torch.tensor([7, 7]), torch.from_numpy(lengths))
    padding = (np.arange(3) >= lengths[:, None]).astype(float)
    values = _jax(optax.ctc_loss, logits, np.zeros((2, 7)), labels, padding)
    return reference, (values / lengths if normalized else values).mean()


def _triplet(by_hand: bool) -> Pair:
    a, p, n = (data(N, 3, seed=seed) for seed in range(3))
    reference = _torch(F.triplet_margin_loss, a, p, n)
    if not by_hand:
        return reference, _jax(optax.losses.triplet_margin_loss, a, p, n).mean()
    near, far = (jnp.linalg.norm(a - other + 1e-6, axis=-1) for other in (p, n))
    return reference, jnp.maximum(near - far + 1, 0).mean()


def _cosine() -> Pair:
    return _torch(F.cosine_similarity, PREDICTIONS, VALUES), _jax(optax.cosine_similarity, PREDICTIONS, VALUES)


def _cosine_zero(epsilon: float) -> Pair:
    """One of the vectors is zero."""
    x = PREDICTIONS.copy()
    x[0] = 0
    return _torch(F.cosine_similarity, x, VALUES), _jax(optax.cosine_similarity, x, VALUES, epsilon=epsilon)


LOG_PROBABILITIES = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
BINARY = (TARGETS > 0.2).astype(float)

ROWS = [
    Row(
        FAMILY,
        "F.cross_entropy(logits, labels)",
        "optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
        "Optax",
        lambda: _cross_entropy(mean=False),
        lambda: _cross_entropy(mean=True),
        "`.mean()`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.cross_entropy(logits, labels)`, classes on axis 1 of three",
        "optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
        "Optax",
        lambda: _axis(moved=False),
        lambda: _axis(moved=True),
        "`axis=1`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.cross_entropy(logits, labels)`, two labels -100",
        "optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
        "Optax",
        lambda: _ignored(masked=False),
        lambda: _ignored(masked=True),
        "`where(labels >= 0, loss, 0).sum() / (labels >= 0).sum()`",
        "-100 gives NaN",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.cross_entropy(logits, labels, weight=weight)",
        "(loss * weight[labels]).mean()",
        "Optax",
        lambda: _weighted(divide=False),
        lambda: _weighted(divide=True),
        "`(loss * weight[labels]).sum() / weight[labels].sum()`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.cross_entropy(logits, labels, label_smoothing=0.1)",
        "optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
        "Optax",
        lambda: _smoothed(smooth=False),
        lambda: _smoothed(smooth=True),
        "`optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, k), 0.1))`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.cross_entropy(logits, labels, label_smoothing=0.1, weight=weight)",
        "softmax_cross_entropy(logits, smooth_labels(..) * weight).sum() / weight[labels].sum()",
        "Optax",
        _smoothed_weighted,
    ),
    Row(
        FAMILY,
        "F.cross_entropy(logits, probabilities)",
        "optax.softmax_cross_entropy(logits, probabilities)",
        "Optax",
        _simple(F.cross_entropy, optax.softmax_cross_entropy, LOGITS, TARGETS),
    ),
    Row(
        FAMILY,
        "F.nll_loss(log_probabilities, labels)",
        "optax.softmax_cross_entropy_with_integer_labels(log_probabilities, labels)",
        "Optax",
        _nll,
        note="log probabilities are logits too",
    ),
    Row(
        FAMILY,
        "F.binary_cross_entropy_with_logits(logits, targets)",
        "optax.sigmoid_binary_cross_entropy(logits, targets)",
        "Optax",
        _simple(F.binary_cross_entropy_with_logits, optax.sigmoid_binary_cross_entropy, LOGITS, BINARY),
    ),
    Row(
        FAMILY,
        "F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)",
        "optax.sigmoid_binary_cross_entropy(logits, targets)",
        "Optax",
        lambda: _bce_weighted(by_hand=False),
        lambda: _bce_weighted(by_hand=True),
        "`-(weight * t * log_sigmoid(x) + (1 - t) * log_sigmoid(-x))`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.binary_cross_entropy(p, targets)`, p = 0 and target 1 among them",
        "-where(t == 1, log(p), log1p(-p))",
        "jax.numpy",
        lambda: _bce(clipped=False),
        lambda: _bce(clipped=True),
        "`maximum(log, -100)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.mse_loss(x, y)",
        "optax.squared_error(x, y)",
        "Optax",
        _simple(F.mse_loss, optax.squared_error, PREDICTIONS, VALUES),
    ),
    Row(
        FAMILY,
        "F.mse_loss(x, y)",
        "optax.l2_loss(x, y)",
        "Optax",
        _simple(F.mse_loss, optax.l2_loss, PREDICTIONS, VALUES),
        _simple(F.mse_loss, optax.l2_loss, PREDICTIONS, VALUES, factor=2),
        "`* 2`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.huber_loss(x, y)",
        "optax.huber_loss(x, y)",
        "Optax",
        _simple(F.huber_loss, optax.huber_loss, PREDICTIONS, VALUES),
    ),
    Row(
        FAMILY,
        "F.huber_loss(x, y, delta=0.5)",
        "optax.huber_loss(x, y, delta=0.5)",
        "Optax",
        _simple(F.huber_loss, optax.huber_loss, PREDICTIONS, VALUES, torch_arguments={"delta": 0.5}, delta=0.5),
    ),
    Row(
        FAMILY,
        "F.smooth_l1_loss(x, y)",
        "optax.huber_loss(x, y)",
        "Optax",
        _simple(F.smooth_l1_loss, optax.huber_loss, PREDICTIONS, VALUES),
    ),
    Row(
        FAMILY,
        "F.smooth_l1_loss(x, y, beta=0.5)",
        "optax.huber_loss(x, y, delta=0.5)",
        "Optax",
        _simple(F.smooth_l1_loss, optax.huber_loss, PREDICTIONS, VALUES, torch_arguments={"beta": 0.5}, delta=0.5),
        _simple(
            F.smooth_l1_loss, optax.huber_loss, PREDICTIONS, VALUES, torch_arguments={"beta": 0.5}, factor=2, delta=0.5
        ),
        "`/ 0.5`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.kl_div(log_q, p)",
        "optax.kl_divergence(log_q, p)",
        "Optax",
        _simple(F.kl_div, optax.kl_divergence, LOG_PROBABILITIES, TARGETS),
        _simple(F.kl_div, optax.kl_divergence, LOG_PROBABILITIES, TARGETS, factor=1 / K),
        "divide by the number of classes",
        claim="after",
    ),
    Row(
        FAMILY,
        'F.kl_div(log_q, p, reduction="batchmean")',
        "optax.kl_divergence(log_q, p)",
        "Optax",
        _simple(
            F.kl_div,
            optax.kl_divergence,
            LOG_PROBABILITIES,
            TARGETS,
            torch_arguments={"reduction": "batchmean"},
        ),
    ),
    Row(
        FAMILY,
        'F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")',
        "optax.losses.kl_divergence_with_log_targets(log_q, log_p)",
        "Optax",
        _simple(
            F.kl_div,
            optax.losses.kl_divergence_with_log_targets,
            LOG_PROBABILITIES,
            np.log(TARGETS),
            torch_arguments={"reduction": "batchmean", "log_target": True},
        ),
    ),
    Row(
        FAMILY,
        "F.ctc_loss(log_probabilities, labels, lengths)",
        "optax.ctc_loss(logits, paddings, labels, paddings)",
        "Optax",
        lambda: _ctc(normalized=False),
        lambda: _ctc(normalized=True),
        "divide each by its label's length before `.mean()`",
        "inputs (batch, time, classes)",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.triplet_margin_loss(a, p, n)",
        "optax.losses.triplet_margin_loss(a, p, n)",
        "Optax",
        lambda: _triplet(by_hand=False),
        lambda: _triplet(by_hand=True),
        "`norm(a - p + 1e-6)` and `norm(a - n + 1e-6)` for the distances",
        "PyTorch adds epsilon to the difference, Optax under the root",
        claim="after",
    ),
    Row(FAMILY, "F.cosine_similarity(x, y)", "optax.cosine_similarity(x, y)", "Optax", _cosine),
    Row(
        FAMILY,
        "`F.cosine_similarity(x, y)`, an x of zeros",
        "optax.cosine_similarity(x, y)",
        "Optax",
        lambda: _cosine_zero(0.0),
        lambda: _cosine_zero(1e-8),
        "`epsilon=1e-8`",
        "NaN otherwise",
        claim="after",
    ),
]
