"""The checks, the order in which they run, what each rests on, and how one is run.

The two implementations share the configuration, the canonical names and arrays of the weights, and the batches of token
ids. Everything else, from the embedding to the sampler, each computes with code of its own.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator

from parity.engine import results
from parity.engine.results import Check, Result, Skipped

# Every check, in the order of the report; each is the module of parity.gpt2.checks that bears its name. Several
# processes begin at the end: what takes a second or two is first here, so that none waits for another's last.
CHECKS = (
    "data",
    "initialization",
    "weights",
    "forward",
    "gradients",
    "optimizer",
    "schedule",
    "loss_curve",
    "dropout",
    "mesh",
    "precision",
    "generation",
    "trainer",
    "variants",
    "settings",
    "sizes",
    "combinations",
)


# These compare the programs that training compiles. In the others LLVM's optimisations are off: they take most of the
# time, and what is computed there is the same formulas in other combinations.
COMPILED_AS_TRAINED = ("forward", "gradients", "loss_curve", "precision")
# The train step of the loss curve has the first two in it.
COMPILED_AS_TRAINED_QUICK = ("loss_curve", "precision")

# What each check computes with that another check compares by itself. If both fail, the other one explains this one.
RESTS_ON: dict[str, tuple[str, ...]] = {
    "weights": (),
    "data": (),
    "initialization": (),
    "forward": ("weights",),
    "gradients": ("forward",),
    "optimizer": ("gradients",),
    "schedule": ("optimizer",),
    "loss_curve": ("optimizer", "schedule"),
    "dropout": ("loss_curve",),
    "mesh": ("loss_curve",),
    "precision": ("gradients",),
    "generation": ("forward",),
    "trainer": ("data", "initialization", "loss_curve", "generation"),
    "variants": ("loss_curve",),
    "settings": ("optimizer", "dropout"),
    "sizes": ("weights", "gradients", "generation"),
    "combinations": ("dropout", "mesh", "generation", "variants"),
}


# What no check looks at, or none has the power to see; the page of --prove says it beside what was caught.
CANNOT_SEE = (
    "a mistake that both sides make alike in what they share, beyond what `data`, `schedule`, `settings` and `trainer` "
    "compute a second time: corpora of the Hub, how a configuration is read and refused, the log's words",
    "cuDNN's attention on a CPU, and what the Triton layer norm does on a GPU besides its formula; with --device gpu "
    "`precision` compares them",
    "a dropout rate of 0.4 that is wrong by less than 0.3 percentage points at one site",
    "by the numbers alone, a residual stream in bfloat16, and a softmax in bfloat16 on small random weights: only the "
    "traced program shows them",
    "training on several hosts",
)

PACKAGES = ("gpt2_core", "gpt2_convert", "gpt2_jax", "gpt2_torch", "parity")
"""Whose lines are named where an exception comes from."""

guarded = functools.partial(results.guarded, packages=PACKAGES)
in_words = functools.partial(results.in_words, packages=PACKAGES)


def load(name: str) -> Check:
    """The check called `name`, guarded: (case, candidate, reference) -> results. Loaded late: a wrong name is refused
    before two frameworks are imported."""

    def check(case, candidate, reference) -> Iterator[Result | Skipped]:
        module = importlib.import_module(f"parity.gpt2.checks.{name}")
        from parity.engine.compiling import compiled_quickly

        as_trained = name in case.at(COMPILED_AS_TRAINED_QUICK, COMPILED_AS_TRAINED)
        with contextlib.nullcontext() if as_trained else compiled_quickly():
            yield from module.check(case, candidate, reference)

    return guarded(name, check)
