# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# *(upload this file there)*
#
# # Do two models compute the same?
#
# A model in PyTorch, a port of it to JAX, and a mistake in the port: `parity` says that there
# is one, where it is, and which. Then the same question for this project's own two GPT-2s. It
# takes less than three minutes on two CPU cores, and computes on the CPU everywhere: float64 is
# what it needs.

# %%
import importlib.metadata
import importlib.util

if importlib.util.find_spec("parity") is None:
    # What is there of these stays as it is: Colab's JAX and PyTorch are made for its GPUs.
    there = {found.name: found.version for found in importlib.metadata.distributions()}
    kept = [
        f"{name}=={there[name]}"
        for name in ("jax", "jaxlib", "numpy", "torch")
        if name in there
    ]
    # %pip install --quiet gpt2-jax {" ".join(kept)}

# %% [markdown]
# ## Two models
#
# The original is a small language model as anybody might write it. `make_original` is a
# function, because `parity` has the model made in float64, with the same numbers every time.

# %%
import torch

VOCABULARY, WIDTH, HEADS = 61, 32, 4


class Original(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2, self.norm3 = (torch.nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = (
            torch.nn.Linear(WIDTH, 4 * WIDTH),
            torch.nn.Linear(4 * WIDTH, WIDTH),
        )
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def attention(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


def make_original():
    torch.manual_seed(0)
    return Original()


# %% [markdown]
# The port is written in Flax. It has other names, transposed kernels, and attention by hand.

# %%
import jax
import jax.numpy as jnp
from flax import nnx


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.before, self.between, self.after = (
            nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs) for _ in range(3)
        )
        self.query_key_value = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.project = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.wide, self.narrow = (
            nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs),
            nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs),
        )
        self.logits = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def attention(self, x):
        batch, length, _ = x.shape
        q, k, v = jnp.moveaxis(
            self.query_key_value(x).reshape(batch, length, 3, HEADS, -1), 2, 0
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / (WIDTH // HEADS) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
        return self.project(
            jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, WIDTH)
        )

    def activation(self, x):
        return jax.nn.gelu(x, approximate=False)

    def __call__(self, tokens):
        x = self.tokens(tokens)
        x = x + self.attention(self.before(x))
        x = x + self.narrow(self.activation(self.wide(self.between(x))))
        return self.logits(self.after(x))


# %% [markdown]
# ## The comparison
#
# It needs the two and an input. Both get the same random weights and compute in float64, where
# rounding is so small that no tolerance has to be chosen.

# %%
import numpy as np

import parity
from parity.engine.report import table

tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
report = parity.compare(make_original, Port, inputs=tokens)
print(report.in_words())
table(report.results)

# %% [markdown]
# Nobody said which weight of the port is which of the original. It was found from the values
# that the two compute:

# %%
for row in report.mapping:
    print(f"{row.candidate:24} is {row.reference:14} {row.transform}")

# %% [markdown]
# ## A difference, planted and found
#
# `jax.nn.gelu` computes an approximation by default, `torch.nn.functional.gelu` doesn't. A port
# that forgets this looks right, trains, and gives other numbers.


# %%
class Planted(Port):
    def activation(self, x):
        return jax.nn.gelu(x)


report = parity.compare(make_original, Planted, inputs=tokens)
print(report.in_words())

# %% [markdown]
# The *first divergence* is the place to look at, in both models: `In[6]:3` would be line 3 of
# the cell that was run as number 6. All values before it agree. The *hint* names the mistake.
#
# Can it be seen when the model trains? Here both versions of the port are trained beside the
# original, from the same weights on the same tokens, with AdamW.

# %%
import matplotlib.pyplot as plt
import optax


def torch_loss(logits, tokens):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )


def jax_loss(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


training = {
    "checks": ("forward", "loss_curve"),
    "loss": (torch_loss, jax_loss),
    "optimizer": (
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        optax.adamw(1e-3, weight_decay=1e-2),
    ),
    "steps": 50,
}
trained = {
    port: parity.compare(make_original, port, inputs=tokens, **training)
    for port in (Planted, Port)
}
for port, report in trained.items():
    print(f"{port.__name__}: {report.verdict}")

# %%
figure, (losses, differences) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for port, report in trained.items():
    curves = report.evidence["loss_curve"]
    losses.plot(curves.candidate, label=port.__name__)
    differences.semilogy(
        np.abs(curves.candidate - curves.reference) + 1e-17, label=port.__name__
    )
losses.plot(curves.reference, "k--", linewidth=1, label="Original")
losses.set_title("loss")
differences.axhline(curves.limit, color="black", linestyle=":", label="limit")
differences.set_title("its difference from the original's")
for axis in (losses, differences):
    axis.set_xlabel("step")
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# On the left three curves are one. On the right the planted mistake is orders of magnitude
# above the port without it, of which rounding is left: Flax's embedding rounds to float32, as
# the table above says. For a test suite one line is enough:

# %%
parity.assert_same_model(reference=make_original, candidate=Port, inputs=tokens)

# %% [markdown]
# ## What would this comparison miss?
#
# It is as good as its input. To measure that, the port's own program is changed one operation
# at a time (a sum becomes a difference, an epsilon ten times as large, an axis another one),
# and the comparison should notice. The *mutation score* is the share that it notices, of the
# changes that have an effect.


# %%
def print_score(name, score):
    print(f"{name}: {score.noticed} of {score.effective} changes noticed: {score.score:.2f}")
    for line in score.in_words():
        print(f"  {line}")


for name, given in {"twelve tokens": tokens, "one token": tokens[:, :1]}.items():
    print_score(
        name, parity.compare(make_original, Port, inputs=given, mutants=100).mutation_score
    )

# %% [markdown]
# With one token there is nothing to attend to, so attention could be wrong. What twelve tokens
# miss is in the softmax, which subtracts the largest score from all: another number in its
# place changes rounding only.

# %% [markdown]
# ## GPT-2, twice
#
# `gpt2_jax` and `gpt2_torch` are this project's own pair: two implementations of GPT-2 that
# share no formula. They are compared like any other two.

# %%
from gpt2_jax.language_model import JaxModel
from gpt2_torch.language_model import TorchModel
from parity.gpt2.cases import SMALL, random_weights

weights = random_weights(SMALL)
ours, theirs = (
    JaxModel(weights, precision="float32"),
    TorchModel(weights, precision="float32", device="cpu"),
)


def gpt2(params, tokens):
    return ours.definition.merge(params)(tokens)


tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, SMALL.block_size))
report = parity.compare(theirs.module, (gpt2, ours.params), inputs=tokens, mutants=60)
print(f"{SMALL.parameter_count:,} parameters: {report.in_words()}")
print_score("a full context", report.mutation_score)
table(report.results)

# %% [markdown]
# `gpt2 parity` compares these two more closely, with checks that know GPT-2: dropout, meshes of
# devices, both training loops, generated text; `gpt2 parity --prove` plants mistakes that
# people have made in it, and sees each one caught.
#
# For models of your own, `report.write("parity_report")` writes a page to send to somebody, and
# docs/porting-guide.md ports a model from start to end.
