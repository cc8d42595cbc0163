"""A model's weights and values in a file, so that two models need not share an environment to be compared."""

import dataclasses
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.engine.errors import EngineError
from parity.models.model import Arrays, Inputs, NarrowCast, Recording, Step, Weight
from parity.models.opening import open_model

FORMAT = "parity capture 3"


def capture(model: Any, *, inputs: Any, out: str | Path, mode: str = "eval", overwrite: bool = False) -> Path:
    """Run the model with its own weights and write every value that it computes to `out`, a safetensors file.

    Raises EngineError if the file exists (unless `overwrite`) or can't be written.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise EngineError(f"{path}: exists; name another file or say overwrite")
    opened = open_model(model, "model", mode == "train")
    given = Inputs.of(inputs() if callable(inputs) else inputs)
    weights = {w.name: w for w in opened.weights()}
    held = {name: w.value for name, w in weights.items()}
    recording = opened.record(held, given)
    outputs = opened.run(held, given)
    header = {
        "format": FORMAT,
        "framework": opened.framework,
        "kind": opened.kind,
        "weights": [[w.name, w.trained, w.kept] for w in weights.values()],
        "steps": [dataclasses.astuple(s) for s in recording.steps],
        "weight_numbers": recording.weights,
        "input_numbers": recording.inputs,
        "output_numbers": recording.outputs,
        "constants": list(recording.constants),
        "casts": [dataclasses.astuple(c) for c in opened.narrow_casts(given)],
        "count": len(outputs),
    }
    arrays = {f"weight {n}": x for n, x in held.items()}
    arrays |= {f"value {n}": x for n, x in recording.values.items() if isinstance(x, np.ndarray)}
    arrays |= {f"output {i}": x for i, x in enumerate(outputs)}
    arrays |= {f"float32 {i}": x for i, x in enumerate(opened.run_in_float32(held, given))}
    arrays |= {f"input {n}": np.asarray(x) for n, x in zip(given.names(), given.values(), strict=True)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, temporary, {"parity": json.dumps(header)})
        temporary.replace(path)
    except OSError as error:
        raise EngineError(f"{path}: can't be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Captured:
    """A model as one captured run: its weights and values can be compared, and it can't be run again."""

    def __init__(self, path: str | Path) -> None:
        try:
            with safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {}).get("parity", "{}"))
                if header.get("format") != FORMAT:
                    raise EngineError(f"{path}: is not a file that `parity capture` wrote")
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise EngineError(f"{path}: can't be read as a captured model ({error})") from error
        self.path, self._header = Path(path), header
        self.framework, self.kind = header["framework"], f"captured {header['kind']}"

    def weights(self) -> list[Weight]:
        return [Weight(n, self._arrays[f"weight {n}"], trained, kept) for n, trained, kept in self._header["weights"]]

    def inputs(self) -> Inputs:
        """What it was run on."""
        found = {n.partition(" ")[2]: x for n, x in self._arrays.items() if n.startswith("input ")}
        ordered = [found[n] for n in self._header["input_numbers"].values()]
        names = list(self._header["input_numbers"].values())
        if all(n.startswith("input ") for n in names):
            return Inputs(tuple(ordered))
        return Inputs((), dict(zip(names, ordered, strict=True)))

    def run(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        return [self._arrays[f"output {i}"] for i in range(self._header["count"])]

    def record(self, weights: Arrays, inputs: Inputs) -> Recording:
        numbered = {int(n.partition(" ")[2]): x for n, x in self._arrays.items() if n.startswith("value ")}
        steps = [Step(*s[:5], tuple(s[5]), s[6]) for s in self._header["steps"]]
        return Recording(
            numbered,
            steps,
            {int(n): name for n, name in self._header["weight_numbers"].items()},
            {int(n): name for n, name in self._header["input_numbers"].items()},
            self._header["output_numbers"],
            frozenset(self._header["constants"]),
        )

    def narrow_casts(self, inputs: Inputs) -> list[NarrowCast]:
        return [NarrowCast(*c) for c in self._header["casts"]]

    def gradients(
        self, weights: Arrays, inputs: Inputs, cotangents: Sequence[np.ndarray], of: Collection[str]
    ) -> tuple[Arrays, Arrays]:
        raise EngineError(f"{self.path}: a captured model has no gradients; compare with checks weights and forward")

    def run_lifted(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        raise EngineError(f"{self.path}: a captured model can't be run on other inputs")

    def run_in_float32(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        return [self._arrays[f"float32 {i}"] for i in range(self._header["count"])]

    def state_after(self, weights: Arrays, inputs: Inputs) -> Arrays:
        raise EngineError(f"{self.path}: a captured model can't be trained")

    def train(self, weights: Arrays, inputs: Inputs, loss: Any, optimizer: Any, steps: int) -> Any:
        raise EngineError(f"{self.path}: a captured model can't be trained")
