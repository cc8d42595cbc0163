"""The notebooks: made from their scripts, without outputs, and run from the first cell to the last."""

import importlib.util
import json
import os
import tomllib
from pathlib import Path

import pytest

for package in ("jupytext", "nbclient", "ipykernel"):
    pytest.importorskip(package, reason=f"the extra `notebooks` isn't installed ({package})")

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
COLAB = "https://colab.research.google.com/"
SECONDS = 600
"""That a cell may take. A notebook takes less than 180 on two idle cores; tests may run beside others."""


@pytest.fixture(scope="module")
def maker():
    """notebooks/make.py"""
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_its_notebook(maker):
    assert [script.stem for script in maker.SCRIPTS] == NAMES == ["parity", "train"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_script_makes(maker, name):
    made = maker.notebook(FOLDER / "scripts" / f"{name}.py")
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == made, "run `make notebooks`"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in json.loads(made)["cells"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_the_project_where_it_is_not(name):
    badge, install = nbformat.read(FOLDER / f"{name}.ipynb", 4).cells[:2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository", "")
    # Without an address of the project, Colab's start page, where a notebook can be uploaded.
    opens = repository and f"{repository.replace('https://github.com', 'github')}/blob/main/notebooks/{name}.ipynb"
    assert badge.source.startswith(f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({COLAB}{opens})\n")
    assert f"%pip install --quiet {project['name']} " in install.source


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """By name, what the cells of a notebook have put out once it was run, as text."""
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS", "OMP_NUM_THREADS")  # of the tests alone
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment["TMPDIR"] = str(tmp_path_factory.mktemp("results"))  # where train.ipynb makes its folder
    done = {}

    def run(name: str) -> list[str]:
        if name not in done:
            opened = nbformat.read(FOLDER / f"{name}.ipynb", 4)
            client = NotebookClient(
                opened, timeout=SECONDS, coalesce_streams=True, resources={"metadata": {"path": str(FOLDER)}}
            )
            client.execute(env=environment)
            cells = [cell for cell in opened.cells if cell.cell_type == "code"]
            done[name] = ["".join(map(_text, cell.outputs)) for cell in cells]
        return done[name]

    return run


def _text(output) -> str:
    if output.output_type == "stream":
        return output.text
    return "".join(f"[{kind}]\n{data}\n" for kind, data in output.data.items() if kind.startswith("text/")) + (
        "[picture]\n" if "image/png" in output.data else ""
    )


@pytest.mark.slow
def test_the_training_ends_with_samples_curves_and_equal_models(executed):
    text = "".join(executed("train"))
    assert text.count("[picture]") == 4
    assert "step    300  val loss " in text and "\x1b[" not in text  # lines, and no progress bar
    assert "--- after 300 steps" in text and "both write the same text: True" in text
    assert "the two are the same model" in text


@pytest.mark.slow
def test_the_planted_difference_is_named_by_its_cell_and_mended(executed):
    cells = executed("parity")
    text = "".join(cells)
    assert text.count("[picture]") == 1
    found = next(cell for cell in cells if "the two models are different" in cell)
    assert "gelu (In[6]:3) differs from gelu (In[2]:" in found
    assert "hint: the candidate computes GELU by tanh, the reference exact GELU (erf)" in found
    assert "Planted: different\nPort: same\n" in text
    assert "parameters: the two models are the same" in text
    assert "a longer input would show" in text
