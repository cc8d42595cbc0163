"""The project as it is installed: its commands, and the files that aren't Python."""

import fnmatch
import importlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from gpt2_commands import __main__ as commands
from gpt2_commands import completion
from gpt2_commands.__main__ import COMMANDS
from gpt2_core.config import recipes
from gpt2_core.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# What a wheel is built from: the rest of a clone isn't needed, and isn't in it.
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "configs", "notebooks"]
SOURCES += sorted({name.partition(".")[0] for name in SETUPTOOLS["packages"]})


def test_the_entry_points_are_there():
    assert set(PROJECT["project"]["scripts"]) == {"gpt2", "parity"}
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_table_is_there_and_has_a_help_of_its_own(name):
    module = importlib.import_module(COMMANDS[name].module)
    assert callable(module.main)
    text = module.parser(f"gpt2 {name}").format_help()
    assert text.startswith(f"usage: gpt2 {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_a_training_in_a_sentence_from_the_first_moment_on_and_only_a_training(name, monkeypatch):
    before, during = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(sys, "argv", ["gpt2", name])
    monkeypatch.setattr("gpt2_core.cli.run", lambda main: during.append(signal.getsignal(signal.SIGTERM)))
    commands.run()
    assert (during != [before]) == name.startswith("train")


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.long
def test_python_m_gpt2_jax_is_the_command_gpt2(tmp_path):
    ours = run(tmp_path, sys.executable, "-m", "gpt2_jax", "--help")
    theirs = run(tmp_path, sys.executable, "-m", "gpt2_commands", "--help")
    assert ours.returncode == 0 and ours.stdout == theirs.stdout
    assert all(f"\n  {name} " in ours.stdout for name in COMMANDS)
    assert "parity compare" in ours.stdout
    assert "gpt2 parity" in run(tmp_path, sys.executable, "-m", "parity", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no command given; use train, "),
        (("tran",), "tran: no such command; use train, "),
        (("recipes", "show", "nothing"), "nothing: no such recipe; there are finetune_shakespeare, "),
        (("recipes", "quickstart"), "gpt2 recipes quickstart: expected gpt2 recipes, or gpt2 recipes show NAME"),
        (("train-torch", "--mesh", "2"), "--mesh: not an option of gpt2 train-torch"),
        (("completion", "fish"), "shell fish: expected one of bash, zsh, tcsh"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, words):
    done = run(tmp_path, sys.executable, "-m", "gpt2_commands", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_shell_completes_commands_options_and_values(tmp_path):
    pytest.importorskip("shtab", reason="the extra `completion` isn't installed")
    script = run(tmp_path, sys.executable, "-m", "gpt2_commands", "completion", "bash").stdout
    for words, completed in (
        (["gpt2", "conv"], "convert"),
        (["gpt2", "train", "--optimizer.clip"], "--optimizer.clip_norm"),
        (["gpt2", "generate", "--backend", ""], "jax torch"),
    ):
        line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_gpt2; echo ${{COMPREPLY[@]}}"
        assert run(tmp_path, "bash", "-c", f"{script}\n{line}").stdout == f"{completed}\n"


def test_without_shtab_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt2-jax\[completion\]'"):
        completion.main(["bash"])


def test_every_recipe_is_listed_and_shown(tmp_path):
    listed = run(tmp_path, sys.executable, "-m", "gpt2_commands", "recipes").stdout
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert [line.split()[0] for line in listed.splitlines()[: len(files)]] == [path.stem for path in files]
    shown = run(tmp_path, sys.executable, "-m", "gpt2_commands", "recipes", "show", "quickstart").stdout
    assert shown == (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")


def test_what_a_recipe_is_about_is_the_first_paragraph_of_its_header():
    assert recipes.about("quickstart") == (
        "A GPT-2 of about 0.8 million parameters that learns to write Python in three minutes on two CPU cores."
    )


def test_every_file_that_is_not_python_is_package_data():
    data = SETUPTOOLS["package-data"]
    for top in {name.partition(".")[0] for name in SETUPTOOLS["packages"]}:
        for folder, _, names in os.walk(ROOT / top, followlinks=True):
            package = Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
            for name in names:
                if Path(name).suffix not in (".py", ".pyc", ".md"):
                    assert package in SETUPTOOLS["packages"], f"{folder}/{name}"
                    assert any(fnmatch.fnmatch(name, p) for p in (*data["*"], *data.get(package, ()))), (
                        f"{folder}/{name}"
                    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel, and the source distribution, built from a copy, which building would leave files in."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return build(copy, "wheel", out), build(copy, "sdist", out)


def build(source: Path, kind: str, out: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0 and "absent from the `packages`" not in done.stdout + done.stderr, done.stderr
    return out / done.stdout.splitlines()[-1]


def files_of(wheel: Path) -> dict[str, bytes]:
    """What a wheel holds, without the checksums of it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.mark.slow
def test_the_wheel_has_no_package_of_a_common_name_and_every_recipe(built):
    wheel, _ = built
    files = files_of(wheel)
    assert {name.partition("/")[0] for name in files} == {
        *(name.partition(".")[0] for name in SETUPTOOLS["packages"]),
        wheel.name.partition("-py3")[0] + ".dist-info",
    }
    for path in (ROOT / "configs").glob("*.yaml"):
        assert files[f"gpt2_core/recipes/{path.name}"] == path.read_bytes()


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not (source / "tests").exists()
    assert sorted(path.name for path in (source / "notebooks").glob("*.ipynb")) == ["parity.ipynb", "train.ipynb"]
    assert files_of(build(source, "wheel", tmp_path)) == files_of(wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of an environment in which the wheel is installed, away from this clone."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", built[0]], check=True)
    # Only now, or pip would find the project itself there: what it depends on, as it is installed for these tests.
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(packages), encoding="utf-8")
    return folder / "bin"


# In this order: each uses what those before have left.
FIRST_STEPS = [
    "gpt2 --help",
    "gpt2 recipes",
    "gpt2 recipes show gpt2",
    "gpt2 train --config quickstart --steps 2 --eval_sequences 16 --run_dir run",
    "gpt2 train-torch --steps 1 --eval_sequences 16 --init_from run --run_dir run-torch",
    "gpt2 generate --weights run --prompt def --max_new_tokens 5",
    "gpt2 generate --weights run-torch --prompt def --max_new_tokens 5 --backend torch",
    "gpt2 convert run my_model --to hf --verify",
    "gpt2 prepare words.txt --tokenizer bytes --out tokens",
    "gpt2 plan --mesh fsdp=8 --devices 8",
    "gpt2 parity --quick --weights run --checks schedule,weights,forward --report suite",
    "parity compare tiny:make_torch tiny:make_jax --inputs tiny:TOKENS --checks weights,forward",
    "python -m parity capture tiny:make_torch --inputs tiny:TOKENS --out captured.safetensors",
    "python -m gpt2_jax recipes",
]


@pytest.mark.slow
def test_the_first_steps_away_from_a_clone(installed, tmp_path):
    shutil.copy(ROOT / "tests" / "parity" / "pair" / "tiny.py", tmp_path)
    (tmp_path / "words.txt").write_text("a few words\n" * 200)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")
    }
    environment["PYTHONSAFEPATH"] = "1"  # this folder isn't on the path, so nothing of a clone could be
    for step in FIRST_STEPS:
        program, *arguments = step.split()
        done = subprocess.run(
            [installed / program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
    where = "import gpt2_core, parity; print(gpt2_core.__file__, parity.__file__)"
    done = subprocess.run([installed / "python", "-c", where], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode().count(str(installed.parent)) == 2
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "run-torch", "my_model", "tokens", "suite"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bench.py scaling --help", "plan.py --help"])
def test_a_clones_scripts_find_the_benchmarks_which_are_not_installed(installed, tmp_path, command):
    script, *arguments = command.split()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [installed / "python", ROOT / "scripts" / script, *arguments]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_no_command_takes_the_place_of_a_function_that_users_call():
    # A submodule that is imported becomes an attribute of its package: parity/compare.py would hide parity.compare.
    code = (
        "import importlib, parity\nfrom gpt2_commands.__main__ import COMMANDS\n"
        "for command in COMMANDS.values():\n    importlib.import_module(command.module)\n"
        "print(type(parity.compare).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "function\n"
