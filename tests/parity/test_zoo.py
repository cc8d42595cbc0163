"""PyTorch's layers against their counterparts: every row is as it claims, and docs/porting.md is what is measured."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "parity"))

from zoo import page  # noqa: E402
from zoo.rows import Measured, Row, difference, measure  # noqa: E402

PAGE = ROOT / "docs" / "porting.md"
ROWS = {row.name: row for family in page.FAMILIES for row in family.ROWS}
# Quick ones, one of each claim and several frameworks.
QUICK = [
    "activations: F.gelu(x) against jax.nn.gelu(x) (jax.nn)",
    "normalization: nn.LayerNorm(6) against LayerNorm() (Flax)",
    "optimizers: torch.optim.Adagrad(lr) against optax.adagrad(lr) (Optax)",
    "pooling: nn.MaxPool2d(3, stride=2, padding=1) against eqx.nn.MaxPool2d(3, stride=2, padding=1) (Equinox)",
    "optimizers: torch.optim.NAdam(lr) against optax.nadam(lr) (Optax)",
]


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_row_is_as_it_claims(name):
    row = ROWS[name]
    assert measure(row).claim == row.claim


@pytest.fixture(scope="module")
def measured():
    return page.measure_families(page.FAMILIES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_row_is_as_it_claims(measured):
    assert page.false_claims(measured) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_is_measured(measured):
    assert page.without_digits(PAGE.read_text(encoding="utf-8")) == page.without_digits(page.render(measured))


def test_the_page_has_every_row():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \| .* \| .* \| (?:equal|close|different)\b", text, re.MULTILINE)
    shown = [tuple(cell.strip("`") for cell in cells) for cells in rows]
    expected = [
        (row.torch.strip("`"), row.counterpart.strip("`"), row.framework)
        for family in page.FAMILIES
        for row in family.ROWS
    ]
    assert shown == expected


def test_a_row_has_one_claim_and_a_name_of_its_own():
    assert len(ROWS) == sum(len(family.ROWS) for family in page.FAMILIES)
    for row in ROWS.values():
        assert (row.changed is None) == (not row.change), row.name
        assert row.claim != "after" or row.changed, row.name
        assert row.claim not in ("nearly", "different") or row.note, f"{row.name}: why?"


def test_the_difference_is_relative_to_the_largest_magnitude():
    assert difference(np.array([1.0, 4.0]), jnp.array([1.0, 3.0])) == 0.25
    assert difference((np.ones(2), np.ones(3)), (np.ones(2), np.full(3, 1.5))) == 0.5  # several values
    assert difference(np.ones(2), [np.ones(2), np.zeros(2)]) == 1.0  # several candidates
    assert difference(np.zeros(2), np.zeros(2)) == 0.0
    assert difference(np.zeros(2), np.full(2, 1e-9)) == 1.0
    assert difference(np.ones((2, 3)), np.ones((3, 2))) == np.inf
    assert difference(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == 0.0
    for other in (1.0, np.inf, -np.inf):
        assert np.isnan(difference(np.array([np.nan, 1.0]), np.array([other, 1.0])))
    assert np.isnan(difference(np.array([np.inf]), np.array([-np.inf])))


@pytest.mark.parametrize(
    ("as_it_comes", "changed", "claim"),
    [
        (1e-13, None, "equal"),
        (1e-3, 1e-13, "after"),
        (1e-9, 1e-13, "after"),
        (1e-9, None, "nearly"),
        (1e-3, 1e-9, "nearly"),
        (1e-3, None, "different"),
        (np.inf, 1e-3, "different"),
        (np.nan, None, "different"),
        (np.nan, np.nan, "different"),
    ],
)
def test_what_is_measured_decides_the_verdict(as_it_comes, changed, claim):
    assert Measured(as_it_comes, changed).claim == claim


def test_a_false_claim_is_found():
    family = SimpleNamespace(ROWS=[Row("family", "one", "other", "JAX", lambda: (np.ones(1), np.full(1, 1.1)))])
    (line,) = page.false_claims([(family, [measure(row) for row in family.ROWS])])
    assert line.startswith("family: one against other (JAX): claimed 'equal as they come', measured 'different'")


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (0.0, "0"),
        (3.4e-16, "3e-16"),
        (5e-7, "5e-7"),
        (0.049, "0.05"),
        (2.2, "2"),
        (np.inf, "shape"),
        (np.nan, "not finite"),
    ],
)
def test_a_figure_has_one_digit(figure, shown):
    assert page.show(figure) == shown
    table = f"| `nn.Layer(3)` | {shown} | 0.5 | equal after: `epsilon=1e-5` |"
    figures = "N" if figure < 10 else shown
    assert page.without_digits(table) == f"| `nn.Layer(3)` | {figures} | N | equal after: `epsilon=1e-5` |"
