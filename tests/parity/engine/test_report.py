"""The report: strict JSON and a page, whatever the results are, and limits as the checks gave them."""

import json
import math
from unittest import mock

import numpy as np
from matplotlib.axes import Axes

from parity.engine import report
from parity.engine.evidence import Curves, Depth, Errors
from parity.engine.results import Result, guarded


def _report(evidence, results=()) -> report.Report:
    rests_on = {"forward": (), "gradients": ("forward",), "mesh": ("gradients",)}
    return report.Report(
        ("JAX", "PyTorch"), "random", "python x.py", rests_on, results=list(results), evidence=evidence
    )


def _raising(*_):
    yield Result("mesh", "before it", 0.0, 1e-12)
    raise ValueError("[bold] of [/a]")


def test_the_report_of_a_run_with_nan_and_exceptions_is_strict_json_and_a_page(tmp_path):
    evidence = {
        "forward": Depth("forward", [("embeddings", math.nan), ("ln_f", math.inf)], 1e-12),
        "gradients": Depth("backward", [("ln_f", math.nan)], 1e-10),
        "loss_curve": Curves(*(np.full(3, math.nan) for _ in range(3)), 1e-11),
    }
    results = [Result("forward", "values", math.nan, 1e-12, "[/x]"), Result("gradients", "values", math.inf, 1e-10)]
    results += guarded("mesh", _raising)()
    report.write(tmp_path, _report(evidence, results))

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert written["passed"] is False and len(written["checks"]) == 4
    for check, result in zip(written["checks"], results, strict=True):
        assert check["measured"] == (result.measured if math.isfinite(result.measured) else None)
        assert check["passed"] is result.passed and check["where"] == result.where
    assert written["explanation"].startswith("look first at forward")
    page = (tmp_path / "index.html").read_text()
    assert "look first at forward" in page and "ValueError: [bold] of [/a]" in page


def test_limits_are_drawn_as_the_checks_gave_them(tmp_path):
    curve = np.array([3.0, 2.0])
    evidence = {
        "forward": Depth("forward", [("a", 1e-15)], 2e-12),
        "loss_curve": Curves(curve, curve, curve, 3e-11),
        "precision float32 logits": Errors([(1e-7, 2e-7)]),
    }
    with mock.patch.object(Axes, "axhline", autospec=True, side_effect=Axes.axhline) as line:
        report.write(tmp_path, _report(evidence, [Result("forward", "values", 0.0, 2e-12)]))
    assert [call.args[1] for call in line.call_args_list] == [3e-11, 2e-12]
    assert {p.stem for p in tmp_path.glob("*.png")} == {"forward", "loss_curve", "precision"}
