"""What `bonsai.py` and `packages.py` share: a pair of models, the true mapping of its weights, a table of reports."""

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from rich.console import Console
from rich.table import Table

import parity

# --- layouts: how a candidate's tensor is made of the reference's --------------------------------------------------


def as_is(tensor):
    return tensor


def transposed(kernel):
    """(out, in) -> (in, out)."""
    return kernel.T


def convolution(kernel):
    """(out, in, *window) -> (*window, in, out)."""
    return kernel.transpose(*range(2, kernel.ndim), 1, 0)


def into_heads(heads: int):
    """(heads * width, in) -> (in, heads, width); of a bias (heads * width) -> (heads, width)."""
    return lambda tensor: tensor.T.reshape(*tensor.shape[1:], heads, -1)


def out_of_heads(heads: int):
    """(out, heads * width) -> (heads, width, out)."""
    return lambda kernel: kernel.T.reshape(heads, -1, kernel.shape[0])


def stacked(*layers):
    """One tensor a layer -> one tensor with a leading axis of layers."""
    return np.stack(layers)


def fused(*kernels):
    """(out, in) of each -> (in, sum of out); biases are joined."""
    return np.concatenate([kernel.T for kernel in kernels], axis=-1)


# --- pairs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Candidate tensors whose whole name matches `candidate` are `layout` of the tensors named by `reference`.

    `reference` is one template, or several where the candidate's tensor is made of several; `\\1` is the first group.
    """

    candidate: str
    reference: str | tuple[str, ...]
    layout: Callable = as_is

    def sources(self, name: str) -> tuple[str, ...] | None:
        """The names of the reference's tensors, or None where the rule doesn't apply."""
        match = re.fullmatch(self.candidate, name)
        templates = (self.reference,) if isinstance(self.reference, str) else self.reference
        return tuple(match.expand(template) for template in templates) if match else None


@dataclass(frozen=True)
class Pair:
    """A PyTorch model, its port to JAX, and what is known of them.

    `make_candidate` gets what the command was given (a checkout). `differs_at` are pieces of the candidate's source
    lines that compute something else than the reference does, empty where the two are the same; `hint` is what a hint
    must say of them, a regular expression. `ignore` are tensors that only one side has, and that no output depends on.
    """

    name: str
    make_reference: Callable[[], torch.nn.Module]
    make_candidate: Callable
    inputs: Callable[[], object]
    rules: tuple[Rule, ...]
    to_candidate: Callable | None = None
    differs_at: tuple[str, ...] = ()
    hint: str = ""
    ignore: tuple[str, ...] = ()


class Output(torch.nn.Module):
    """A model of `transformers` that returns one of its outputs."""

    def __init__(self, model: torch.nn.Module, field: str, **options):
        super().__init__()
        self.model, self.field, self.options = model, field, options

    def forward(self, *inputs):
        return getattr(self.model(*inputs, **self.options), self.field)


def tokens(vocabulary: int, length: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, (batch, length))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def channels_last(images):
    """(batch, channels, *window) -> (batch, *window, channels)."""
    return images.transpose(0, *range(2, images.ndim), 1)


# --- the true mapping ----------------------------------------------------------------------------------------------


def dotted(path: Iterable) -> str:
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(str(part) for part in parts)


def candidate_tensors(candidate) -> dict[str, jax.Array]:
    """Weights and running statistics by dotted names; neither random keys nor constants."""
    if isinstance(candidate, nnx.Module):
        state = nnx.state(candidate, nnx.Any(nnx.Param, nnx.BatchStat))
        return {dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}
    tree = candidate[1]["params"] if isinstance(candidate, tuple) else candidate
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): leaf for path, leaf in leaves if isinstance(leaf, jax.Array) and leaf.dtype.kind == "f"}


def reference_tensors(reference: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers, tied ones under each of their names, without the prefix of `Output`."""
    model = reference.model if isinstance(reference, Output) else reference
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return {name: tensor.detach().numpy() for name, tensor in named}


def sources_of(pair: Pair, name: str) -> tuple[tuple[str, ...], Callable] | None:
    """Which reference tensors the candidate's tensor `name` is made of, and how; None if of none."""
    found = [(sources, rule.layout) for rule in pair.rules if (sources := rule.sources(name))]
    if len(found) > 1:
        raise ValueError(f"{pair.name}: {name} matches {len(found)} rules")
    return found[0] if found else None


def weights_by_rule(pair: Pair, reference: torch.nn.Module, candidate) -> dict[str, np.ndarray]:
    """The reference's weights in the candidate's names and layouts; raises where a name or shape doesn't fit."""
    theirs = reference_tensors(reference)
    weights = {}
    for name, tensor in candidate_tensors(candidate).items():
        found = sources_of(pair, name)
        if found is None:
            if name not in pair.ignore:
                raise ValueError(f"{pair.name}: no rule names the candidate's tensor {name} {tensor.shape}")
            continue
        sources, layout = found
        weights[name] = layout(*(theirs[source] for source in sources))
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{pair.name}: {name} is {tensor.shape}, by rule {weights[name].shape}")
    return weights


# --- outputs of both under the true mapping, without `parity` ------------------------------------------------------


def randomize(reference: torch.nn.Module) -> None:
    """Random weights in which no tensor is neutral: biases aren't zero, norms' scales not one."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in itertools.chain(reference.named_parameters(), reference.named_buffers()):
        noise = torch.empty(tensor.shape).normal_(generator=generator)
        with torch.no_grad():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif name.endswith("running_mean") or tensor.requires_grad:
                tensor.copy_(noise * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else tensor + 0.3 * noise)


def with_weights(candidate, weights: dict[str, np.ndarray]) -> Callable:
    """The candidate as a function of its inputs, with these weights written into it."""
    if isinstance(candidate, nnx.Module):
        state = nnx.state(candidate, nnx.Any(nnx.Param, nnx.BatchStat))
        for path, variable in nnx.to_flat_state(state):
            if dotted(path) in weights:
                variable.set_value(jnp.asarray(weights[dotted(path)]))
        nnx.update(candidate, state)
        return nnx.jit(candidate)
    is_linen = isinstance(candidate, tuple)

    def written(path, leaf):
        name = dotted(path)
        return jnp.asarray(weights[name]) if name in weights else leaf

    tree = jax.tree_util.tree_map_with_path(written, candidate[1]["params"] if is_linen else candidate)
    if is_linen:
        return lambda *inputs: jax.jit(candidate[0].apply)({"params": tree}, *inputs)
    return equinox.filter_jit(tree)


def difference_by_hand(pair: Pair, reference: torch.nn.Module, candidate) -> float:
    """The largest difference of the outputs in float32, relative to the largest output, under the true mapping."""
    randomize(reference)
    inputs = pair.inputs()
    inputs = inputs.astype(np.float32) if inputs.dtype.kind == "f" else inputs
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(inputs)).numpy()
    function = with_weights(candidate, weights_by_rule(pair, reference, candidate))
    got = np.asarray(function(jnp.asarray(pair.to_candidate(inputs) if pair.to_candidate else inputs)))
    if got.shape != expected.shape:
        raise ValueError(f"{pair.name}: the reference's output has shape {expected.shape}, the candidate's {got.shape}")
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- a report of `parity.compare`, judged --------------------------------------------------------------------------


def numbered(reference: torch.nn.Module) -> dict[str, np.ndarray]:
    """The reference's tensors with a number of its own in every element, tied tensors alike."""
    start, by_tensor, found = 1, {}, {}
    model = reference.model if isinstance(reference, Output) else reference
    for name, tensor in itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        if id(tensor) not in by_tensor:
            by_tensor[id(tensor)] = np.arange(start, start + tensor.numel(), dtype=np.float64).reshape(tensor.shape)
            start += tensor.numel()
        found[name] = by_tensor[id(tensor)]
    return found


def wrongly_mapped(pair: Pair, reference: torch.nn.Module, candidate, mapping: Sequence) -> dict[str, str]:
    """The candidate's tensors that aren't made of what the rules say, and what the report makes them of."""
    numbers = numbered(reference)
    prefix = "model." if isinstance(reference, Output) else ""
    rows = {row.candidate: row for row in mapping}
    wrong = {}
    for name in candidate_tensors(candidate):
        found, row = sources_of(pair, name), rows.get(name)
        if found is None:
            if row is not None:
                wrong[name] = f"{row.reference} {row.transform}, but the reference has no such tensor"
        elif row is None:
            wrong[name] = f"left out; it is {', '.join(found[0])}"
        else:
            given = row.reference.split(" + ")
            made = transform_of(row)(*(numbers[source.removeprefix(prefix)] for source in given))
            if not np.array_equal(made, found[1](*(numbers[source] for source in found[0]))):
                wrong[name] = f"{', '.join(given)} {row.transform}; it is {', '.join(found[0])}"
    return wrong


def transform_of(row) -> Callable:
    if callable(row.transform):
        return row.transform
    from parity.pair.transforms import parse

    return parse(row.transform)


def known_lines(pair: Pair, lines: Sequence[str], folder: Path | None) -> bool:
    """Whether one of these places ('file:line') is a line of the pair's `differs_at`."""
    for place in lines:
        file, _, number = place.rpartition(":")
        there = folder.rglob(Path(file).name) if folder else ()
        path = next((p for p in (Path(file), *there) if p.exists()), None)
        if path is not None and number.isdigit():
            line = path.read_text().splitlines()[int(number) - 1]
            if any(piece in line for piece in pair.differs_at):
                return True
    return False


# --- the command ---------------------------------------------------------------------------------------------------


def parse(parser: argparse.ArgumentParser, pairs: Sequence[Pair]) -> argparse.Namespace:
    """The command line with options for `run`; `pairs` of it are those that are chosen."""
    names = [pair.name for pair in pairs]
    parser.add_argument("--pairs", default=",".join(names), help="comma-separated names of: %(default)s")
    parser.add_argument("--by-hand", action="store_true", help="only outputs under the known mapping, without `parity`")
    arguments = parser.parse_args()
    chosen = arguments.pairs.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--pairs {','.join(unknown)}: unknown; the pairs are {', '.join(names)}")
    arguments.pairs = [pair for pair in pairs if pair.name in chosen]
    return arguments


def run(pairs: Sequence[Pair], without_parity: bool, given=None, sources: Callable[[Pair], Path] | None = None) -> int:
    """Print the table of these pairs; 0 if all are as they are known to be, else 1.

    `given` is what candidates are made from, `sources` names the folder of a candidate's source files.
    """
    transformers.logging.set_verbosity_error()
    return 0 if (by_hand(pairs, given) if without_parity else compared(pairs, given, sources)) else 1


def by_hand(pairs: Sequence[Pair], given) -> bool:
    """A table of how far outputs are apart under the true mapping; whether all are as near as a right one makes them.

    Swapped tensors give differences of order one; what the ports do otherwise, at most some thousandths.
    """
    table = Table("pair", "tensors by rule / candidate's", "reference's", "difference, float32", "known to differ")
    as_near = True
    for pair in pairs:
        reference, candidate = pair.make_reference(), pair.make_candidate(given)
        difference = difference_by_hand(pair, reference, candidate)
        ruled = len(weights_by_rule(pair, reference, candidate))
        count = f"{ruled} / {len(candidate_tensors(candidate))}"
        theirs = len(list(reference.parameters()))
        differs = bool(pair.differs_at)
        as_near &= difference < (1e-2 if differs else 1e-5)
        table.add_row(pair.name, count, str(theirs), f"{difference:.0e}", "yes" if differs else "no")
    Console(markup=False).print(table)
    return as_near


def compared(pairs: Sequence[Pair], given, sources: Callable[[Pair], Path] | None) -> bool:
    """A table of `parity`'s reports, and what is to be said of each; whether all are as they are known to be."""
    console = Console(markup=False)
    table = Table()
    for column in ("pair", "mapped right", "verdict", "difference", "first divergence", "as known", "seconds"):
        table.add_column(column, no_wrap=True)
    remarks, all_known = [], True
    for pair in pairs:
        reference, candidate = pair.make_reference(), pair.make_candidate(given)
        started = time.monotonic()
        try:
            report = parity.compare(
                pair.make_reference,
                candidate,
                inputs=pair.inputs,
                to_candidate=pair.to_candidate,
                ignore=pair.ignore,
                generate=False,  # what is known of the pairs is known of their own inputs
            )
        except Exception as error:
            console.print_exception(max_frames=4)
            table.add_row(pair.name, "", "error", "", type(error).__name__, "no", "")
            all_known = False
            continue
        seconds = time.monotonic() - started
        wrong = wrongly_mapped(pair, reference, candidate, report.mapping)
        known = is_known(pair, report, sources(pair) if sources else None)
        all_known &= known and not wrong
        ruled = [name for name in candidate_tensors(candidate) if sources_of(pair, name) or name in wrong]
        forward = [r.measured for r in report.results if r.check == "forward" and "as written" not in r.case]
        place = report.first_divergence.lines[0] if report.first_divergence and report.first_divergence.lines else ""
        count = f"{len(ruled) - len(wrong)} / {len(ruled)}"
        difference = f"{max(forward):.0e}" if forward else ""
        yes = "yes" if known else "no"
        table.add_row(pair.name, count, report.verdict, difference, place, yes, f"{seconds:.1f}")
        remarks += [f"{pair.name}: {name} is mapped from {what}" for name, what in wrong.items()]
        remarks += [
            f"{pair.name}: {r.check}, {r.case}: {r.measured:.1e}, limit {r.limit:.1e}; {r.where}"
            for r in report.results
            if not r.passed
        ]
        remarks += [f"{pair.name}: {text}" for text in (*report.hints, *report.doubts)]
    console.print(table)
    for remark in remarks:
        console.print(remark, soft_wrap=True, highlight=False)
    return all_known


def is_known(pair: Pair, report, folder: Path | None) -> bool:
    """Whether a report says what is known of the pair: that it is the same, or where it differs and why."""
    if not pair.differs_at:
        return report.verdict == "same"
    place = report.first_divergence
    hinted = any(re.search(pair.hint, hint) for hint in report.hints)
    return report.verdict == "different" and bool(place) and hinted and known_lines(pair, place.lines[:1], folder)
