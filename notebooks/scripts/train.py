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
# # From text to samples
#
# A small GPT-2 is trained with JAX on the source of Python's own standard library, continues
# text, and is compared with the same model in PyTorch. Nothing is downloaded but the project
# itself, where it isn't installed yet. It takes less than three minutes on two CPU cores;
# accelerators are used where there are any.

# %%
import importlib.metadata
import importlib.util
import os
import sysconfig
import tempfile

if importlib.util.find_spec("gpt2_jax") is None:
    # What is there of these stays as it is: Colab's JAX and PyTorch are made for its GPUs.
    there = {found.name: found.version for found in importlib.metadata.distributions()}
    kept = [
        f"{name}=={there[name]}"
        for name in ("jax", "jaxlib", "numpy", "torch")
        if name in there
    ]
    # %pip install --quiet gpt2-jax {" ".join(kept)}

# The command `gpt2` of this Python, and a new folder for all that is written below.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
os.chdir(tempfile.mkdtemp(prefix="gpt2-"))
print("results go into", os.getcwd())

# %% [markdown]
# ## The text
#
# The recipe `quickstart` trains on every module of the standard library. This is one of them:

# %%
import inspect
from pathlib import Path

text = Path(inspect.__file__).read_text(encoding="utf-8")
print(text[:500])

# %% [markdown]
# ## Its tokens
#
# A model computes with numbers. In this recipe a token is a byte, so there are 256 and one
# more, which ends a document. (`--data.tokenizer gpt2` takes GPT-2's own tokens, which are
# longer pieces of text.)

# %%
from gpt2_core.data.tokenizer import get_tokenizer

tokenizer = get_tokenizer("bytes")
tokens = tokenizer.encode(text)
print(
    f"{len(text):,} characters are {len(tokens):,} tokens, each one of {tokenizer.vocab_size}"
)
print(repr(text[:12]), "->", tokens[:12].tolist())

# %%
import matplotlib.pyplot as plt
import numpy as np


def shown(token):
    """A token as it is written in Python."""
    return repr(tokenizer.decode([token]))


ids, counts = np.unique(tokens, return_counts=True)
often = np.argsort(-counts)[:30]
figure, axis = plt.subplots(figsize=(10, 3), layout="constrained")
axis.bar([shown(i) for i in ids[often]], 100 * counts[often] / len(tokens))
axis.set_title("the commonest tokens of this module")
axis.set_ylabel("%")
axis.tick_params("x", labelsize=8)
plt.show()

# %% [markdown]
# ## The configuration
#
# A recipe is a file of settings; options of the command override it. `gpt2 recipes` lists them
# all.

# %% language="bash"
# gpt2 recipes show quickstart

# %% [markdown]
# ## Training
#
# Here are a few of the recipe's steps, enough to see the loss fall. A second run needs another
# `--run_dir`: no run is overwritten.

# %% language="bash"
# gpt2 train --config quickstart --steps 300 --run_dir run --log_interval 25 \
#     --sample_interval 100

# %% [markdown]
# The run has drawn its curves. The loss is in nats per token. A model that knows nothing, for
# which all tokens are equally likely, has the logarithm of their number; training begins near
# it.

# %%
from IPython.display import Image

print(f"log({tokenizer.vocab_size}) = {np.log(tokenizer.vocab_size):.2f}")
Image("run/curves.png")

# %% [markdown]
# ## Samples
#
# The run has also written a text now and then. It finds indentation, line lengths and common
# words before it finds anything that means something.

# %%
for path in sorted(Path("run/samples").iterdir(), key=lambda path: int(path.stem)):
    print(f"--- after {path.stem} steps\n{path.read_text(encoding='utf-8').rstrip()}\n")

# %% [markdown]
# From Python, the trained model is loaded by its run's folder, and continues any text:

# %%
import gpt2_jax
import gpt2_torch

model = gpt2_jax.load("run")
print(model.generate("def ", max_new_tokens=200, temperature=0.7))

# %% [markdown]
# ## The same model in PyTorch
#
# `gpt2_torch` reads the same weights and computes with code of its own. Both say what they
# expect next:

# %%
models = {
    "JAX": gpt2_jax.load("run", precision="float32"),
    "PyTorch": gpt2_torch.load("run", precision="float32"),
}


def next_token(model, prompt):
    """The probability of each token after the prompt."""
    logits = model.logits(model.tokenizer.encode(prompt))[-1].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


PROMPT = "    return sel"
expected = {name: next_token(model, PROMPT) for name, model in models.items()}
likely = np.argsort(-expected["PyTorch"])[:10]
figure, axis = plt.subplots(figsize=(10, 3), layout="constrained")
for number, (name, probabilities) in enumerate(expected.items()):
    axis.bar(
        np.arange(len(likely)) + 0.4 * number,
        100 * probabilities[likely],
        width=0.4,
        label=name,
    )
axis.set_xticks(np.arange(len(likely)) + 0.2, [shown(i) for i in likely])
axis.set_title(f"what comes after {PROMPT!r}")
axis.set_ylabel("%")
axis.legend(frameon=False)
plt.show()

# %%
window = tokens[: model.config.block_size]
logits = {name: model.logits(window) for name, model in models.items()}
difference = np.abs(logits["JAX"] - logits["PyTorch"]).max() / np.abs(logits["PyTorch"]).max()
print(f"largest difference of {logits['JAX'].size:,} logits: {difference:.0e} of the largest")
print(f"one rounding of a float32 number: {np.finfo(np.float32).eps:.0e}")

texts = {
    name: model.generate("class ", max_new_tokens=50, seed=1) for name, model in models.items()
}
print("both write the same text:", texts["JAX"] == texts["PyTorch"])

# %% [markdown]
# ## Parity
#
# Such a difference could still hide a small mistake. `gpt2 parity` compares in float64, where
# rounding is half a billion times smaller and a mistake is as large as before. Three of its
# checks are made here; without `--checks` all of them are.

# %% language="bash"
# gpt2 parity --quick --weights run --checks forward,gradients,generation

# %% [markdown]
# The forward pass, value by value, from the embeddings to the logits. The dashed line is the
# limit.

# %%
Image("parity_report/forward.png")

# %% [markdown]
# From here:
#
# - `gpt2 train --resume --run_dir run --steps 1000` trains it further;
# - `gpt2 train --data.corpus text --data.path FILE` trains on a text of yours;
# - [parity.ipynb](parity.ipynb) compares two models of your own;
# - the README lists the commands, and the pages that describe them.
