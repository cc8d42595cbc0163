"""Every command of the README, run as it stands there, on what the demo left."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _blocks() -> list[tuple[str, str]]:
    """The README's blocks, each with its language."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def _commands() -> list[str]:
    """The lines of the README's blocks that name no language, without comments and continued lines joined."""
    commands = "\n".join(content for language, content in _blocks() if not language)
    lines = re.sub(r"\\\n\s*", "", commands).splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


COMMANDS = _commands()
# What sets up or goes through make; `make test` is this file's own command.
MAKE = [c for c in COMMANDS if c.startswith(("make ", "source "))]
NETWORK = [c for c in COMMANDS if "fineweb-edu-10b" in c or "convert.py gpt2 " in c or "evaluate.py" in c]
# They train a large model, on the user's text or on accelerators: here their options are read, and the recipe printed.
LARGE = [c for c in COMMANDS if "FILE" in c or "fineweb_gpt2_124m" in c]
SERVERS = [c for c in COMMANDS if "demo_page.py" in c]
HERE = [c for c in COMMANDS if c not in (*MAKE, *NETWORK, *LARGE, *SERVERS)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder from which the commands work as from a clone, where `make demo` has run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "parity", "configs"):
        (folder / name).symlink_to(ROOT / name)
    done = _run(folder, "python scripts/demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _run(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    process = _start(folder, command, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _start(folder: Path, command: str, **environment: str) -> subprocess.Popen:
    """In an environment without what the tests set for themselves."""
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS", "OMP_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in ours} | environment
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True)


def test_the_readme_has_commands_of_each_kind():
    assert {"make demo", "make test"} <= set(MAKE)
    assert all(command.startswith(("python ", "torchrun ")) for command in (*NETWORK, *LARGE, *SERVERS, *HERE))
    assert NETWORK and LARGE and SERVERS and len(HERE) >= 8


@pytest.mark.slow
def test_the_demo_compares_with_every_check_and_all_pass(checkout):
    from parity.gpt2.suite import CHECKS

    report = json.loads((checkout / "parity_report" / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] and {case["check"] for case in report["checks"]} == set(CHECKS)


@pytest.mark.slow
def test_the_demos_run_has_all_that_the_readme_promises(checkout):
    run = checkout / "runs" / "demo"
    assert all((run / name).is_file() for name in ("config.yaml", "metrics.jsonl", "curves.png"))
    assert all(any((run / name).iterdir()) for name in ("samples", "checkpoints"))
    assert "mesh: data=8,fsdp=1,tensor=1" in (run / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_a_command_does_what_it_says(checkout, command):
    done = _run(checkout, command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVERS)
def test_a_server_serves_until_it_is_interrupted(checkout, command):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'gpt2-jax[page]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = _start(checkout, f"{command} --port {port}")
    try:
        assert process.stdout.readline().startswith(f"the page is at http://127.0.0.1:{port}"), process.communicate()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
            assert b"GPT-2 in JAX and in PyTorch" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err, out + err


@pytest.mark.slow
def test_the_lines_of_python_do_what_they_say(checkout):
    (code,) = (content for language, content in _blocks() if language == "python" and "gpt2_jax.load" in content)
    for ours in (code, code.replace("gpt2_jax", "gpt2_torch")):
        done = _run(checkout, f"python -c {shlex.quote(ours + 'print(logits.shape)')}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("def ") and done.stdout.endswith("\n(4, 257)\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", LARGE)
def test_the_options_of_a_large_run_are_right(checkout, command):
    words = command.replace("FILE", str(ROOT / "LICENSE")).partition("scripts/")[2]
    done = _run(checkout, f"python scripts/{words} --print_config")
    assert done.returncode == 0 and "n_layer:" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", NETWORK)
def test_without_a_network_a_sentence_says_so(checkout, command):
    done = _run(checkout, command, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(checkout / "hub"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "hub" in said[0].lower(), done.stderr
    assert "Traceback" not in done.stderr
