"""The arrows between the packages, and the reference's independence."""

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "gpt2_core",
    "gpt2_jax",
    "gpt2_torch",
    "gpt2_convert",
    "gpt2_evaluate",
    "gpt2_page",
    "gpt2_commands",
    "parity",
)


def test_the_arrows_run_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "tests", ["tests/gpt2_torch/test_model.py", pytest.param("tests/gpt2_torch", marks=pytest.mark.slow)]
)
def test_the_references_tests_pass_where_jax_cannot_be_imported(tests):
    # A module called jax that refuses to load comes first on the path, for child processes too.
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "without_jax")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    command += ["--deselect", "tests/gpt2_torch/test_memory.py::test_a_process_grows_as_planned"]  # long, and no import
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    probe = subprocess.run([sys.executable, "-c", "import jax"], env=env, capture_output=True, text=True)
    assert "made unimportable" in probe.stderr


@pytest.mark.long
def test_the_reference_imports_no_jax():
    modules = [f"gpt2_torch.{path.stem}" for path in (ROOT / "gpt2_torch").glob("*.py") if path.stem != "__init__"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "without_jax")}
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize(("model", "framework"), [("gpt2_torch.model", "torch"), ("gpt2_jax.model", "flax.nnx")])
def test_a_model_file_imports_its_framework_and_the_configuration_alone(model, framework):
    # No Grain, tokenizer or YAML, which take seconds to import, and not the other framework.
    def loaded_by(module: str) -> set[str]:
        command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())

    new = loaded_by(model) - loaded_by(framework)
    assert not {"jax", "torch", "grain", "tiktoken", "yaml", "jsonargparse"} & new
    core = {name for name in new if name.startswith("gpt2_core.")}
    assert all(name == "gpt2_core.errors" or name.startswith("gpt2_core.config") for name in core), core


def test_no_package_is_missing_from_the_distribution():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        str(p.parent.relative_to(ROOT)).replace(os.sep, ".")
        for top in PACKAGES
        for p in (ROOT / top).rglob("__init__.py")
    }
    assert {name for name in settings["packages"] if any((ROOT / name.replace(".", "/")).glob("*.py"))} == found


def _imported_by(files: list[Path]) -> set[str]:
    """What these files import, inside functions too, without the standard library."""
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


def test_the_engines_readme_lists_what_a_distribution_of_it_needs():
    text = (ROOT / "parity" / "engine" / "README.md").read_text(encoding="utf-8")
    settings = tomllib.loads(re.search(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"].values()
    listed = [*settings["project"]["dependencies"], *itertools.chain.from_iterable(extras)]
    assert set(listed) <= set(project["project"]["dependencies"])

    modules = {"pyyaml": "yaml"}
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in listed}
    folders = [name.replace(".", "/") for name in settings["tool"]["setuptools"]["packages"] if name != "parity"]
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    files += [ROOT / "parity" / "__init__.py", ROOT / "parity" / "__main__.py"]
    assert _imported_by(files) == {modules.get(name, name) for name in names} | {"parity"}

    contracts = project["tool"]["importlinter"]["contracts"]
    [contract] = [c for c in contracts if "parity.engine" in c.get("source_modules", ())]
    assert {folder.replace("/", ".") for folder in (*folders, "parity/__main__")} == set(contract["source_modules"])
    data = project["tool"]["setuptools"]["package-data"]
    assert settings["tool"]["setuptools"]["package-data"] == {"parity.engine": data["parity.engine"]}


def test_the_engines_readme_lists_its_modules():
    folder = ROOT / "parity" / "engine"
    table = re.findall(r"^\| (`.*?) \|", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(table))
    assert sorted(named) == sorted(path.stem for path in folder.glob("[!_]*.py"))


def _calls(folders: list[str]) -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in these folders: its file, itself, and the function as it is written."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node, ast.unparse(node.func)


def test_files_that_users_give_are_parsed_in_one_place():
    product = [
        "gpt2_core",
        "gpt2_convert",
        "gpt2_evaluate",
        "gpt2_page",
        "gpt2_jax",
        "gpt2_torch",
        "gpt2_commands",
        "scripts",
    ]
    parsers = {"json.loads", "json.load", "yaml.safe_load", "yaml.load"}
    # safetensors: duplicates are refused too. distributed: what the processes of a run tell each other.
    elsewhere = ("gpt2_core/parsing.py", "gpt2_core/weights/safetensors.py", "gpt2_jax/distributed.py")
    found = [f"{where}: {name}" for where, _, name in _calls(product) if name in parsers]
    assert [one for one in found if not one.startswith(elsewhere)] == []


def test_no_name_of_a_file_is_read_as_markup():
    # A file called x[/y].txt would end a print in an error, and out[v2] would be printed as out.
    for where, call, name in _calls([*PACKAGES, "scripts", "benchmarks"]):
        fixed = all(isinstance(argument, ast.Constant) for argument in call.args)
        if name == "Console" or (name == "TextColumn" and (not fixed or "{" in call.args[0].value)):
            assert any(k.arg == "markup" and k.value.value is False for k in call.keywords), where
