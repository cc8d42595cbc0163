"""`parity.compare`: two models opened, mapped, checked, and what was found."""

from collections.abc import Callable, Sequence
from typing import Any

from parity.engine.errors import EngineError
from parity.engine.results import Skipped, guarded
from parity.models.memory import begin_comparison, give_back_memory
from parity.pair import checks as available
from parity.pair import outputs
from parity.pair.comparison import opened
from parity.pair.report import Report


def compare(
    reference: Any,
    candidate: Any,
    *,
    inputs: Any,
    to_candidate: Callable[[Any], Any] | None = None,
    checks: Sequence[str] = available.DEFAULT,
    mapping: Any = None,
    ignore: Sequence[str] = (),
    loss: Any = None,
    optimizer: tuple[Any, Any] | None = None,
    steps: int = 20,
    mode: str = "eval",
    weights: str = "random",
    seed: int = 0,
    generate: bool = True,
    mutants: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Whether two models compute the same; docs/any_pair.md describes every argument.

    Args:
        reference, candidate: what `parity.models.opening.KINDS` lists, of either framework.
        inputs: an array; a tuple of arrays for several arguments; a dict for keyword arguments; a list of such; or a
            function that returns one of these.
        to_candidate: makes the candidate's inputs of the reference's, where layouts differ.
        checks: among `parity.pair.checks.CHECKS`.
        mapping: a mapping of weights, as `Report.mapping_yaml` writes it, its path, or {target: source}.
        ignore: names of weights, of either side, that have no counterpart.
        loss: a function of (outputs of the model, *inputs), or a pair of them, reference's and candidate's; left out,
            the mean square of the first output.
        optimizer: (a function of parameters that returns a torch.optim optimizer, an optax transformation).
        steps: length of the loss curve.
        mode: "eval", or "train" with dropout off.
        weights: "random": random ones in which every tensor matters, in both models; "own": each model's own.
        seed: of the random weights and of the choice of mutants.
        generate: compare on inputs made from the given one too: longer, an odd batch, extreme values.
        mutants: how many changes of the candidate's program to try, for the mutation score.
        progress: is told what is done next.

    Raises:
        EngineError: in one sentence, where the two can't be compared as asked.
    """
    for check in checks:
        if check not in available.CHECKS:
            raise EngineError(f"checks: no check is called {check!r}; there are {', '.join(available.CHECKS)}")
    if mode not in ("eval", "train"):
        raise EngineError(f"mode {mode!r}: expected 'eval' or 'train'")
    if weights not in ("random", "own"):
        raise EngineError(f"weights {weights!r}: expected 'random' or 'own'")
    begin_comparison()
    comparison = opened(
        reference,
        candidate,
        inputs=inputs,
        to_candidate=to_candidate,
        mapping=mapping,
        ignore=ignore,
        training=mode == "train",
        own=weights == "own",
        seed=seed,
        progress=progress,
    )
    found = Report(comparison.names, comparison.mapping, comparison.from_reference)
    options = available.Options(loss, optimizer, steps, mode == "train", weights == "own", generate)
    for name in checks:
        give_back_memory()  # of the mapping's recordings, and of the check before
        progress(name)
        for result in guarded(name, available.CHECKS[name], passes=EngineError)(comparison, found, options):
            (found.skipped if isinstance(result, Skipped) else found.results).append(result)
    if mutants:
        from parity.pair.score import mutation_score

        progress(f"{mutants} changes of the candidate")
        found.mutation_score = mutation_score(comparison, mutants, seed, outputs.SAME)
    return found
