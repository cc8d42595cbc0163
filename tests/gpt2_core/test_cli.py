import contextlib
import dataclasses
import io
import itertools
import os
import random
import subprocess
import sys

import pytest

from gpt2_commands.generate import parser as generate_parser
from gpt2_core.cli import Parser, parse_train_config, train_parser
from gpt2_core.config import PRESETS, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.config.io import to_yaml
from gpt2_core.errors import UserError
from gpt2_jax.mesh import check_option


def parse(*arguments: str) -> TrainConfig:
    return parse_train_config(
        list(arguments), command="train_jax.py", framework="JAX", elsewhere={"device": "use --mesh"}
    )


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("mesh: 8\nbatch_size: 16\nmodel:\n  n_layer: 3\n  n_embd: 24\n  block_size: 32\n")
    return str(path)


def test_defaults_yield_to_recipe_to_preset_to_options_wherever_each_stands(recipe):
    pieces = [("--config", recipe), ("--preset", "gpt2-medium"), ("--model.n_embd", "32"), ("--steps=7",)]
    seen = {parse(*itertools.chain(*order)) for order in itertools.permutations(pieces)}
    assert len(seen) == 1
    config = seen.pop()
    assert config.model == ModelConfig(n_layer=24, n_head=16, n_embd=32, block_size=32)
    assert (config.mesh, config.steps, config.optimizer) == (8, 7, OptimizerConfig())


def test_a_preset_sets_three_sizes_and_nothing_else(recipe):
    plain, large = parse("--config", recipe), parse("--config", recipe, "--preset", "gpt2-large")
    assert dataclasses.replace(plain.model, **PRESETS["gpt2-large"]) == large.model
    assert dataclasses.replace(plain, model=large.model) == large


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given(recipe):
    assert parse("--config", recipe, "--data.tokenizer", "bytes").model.vocab_size == 257
    assert parse("--config", recipe, "--data.tokenizer", "gpt2").model.vocab_size == 50257
    assert parse("--config", recipe, "--model.vocab_size", "50304").model.vocab_size == 50304


def test_architecture_and_tokenizer_are_those_of_the_initial_weights(recipe, tmp_path):
    theirs = ModelConfig(2, 2, 8, 64, 257, dropout=0.3, mlp="swiglu", mlp_width=24, bias=False, rope_theta=5e5)

    def parse(*arguments: str, tokenizer: str | None = "bytes") -> TrainConfig:
        described = {"weights": (theirs, tokenizer)}
        return parse_train_config(
            list(arguments), command="x", framework="JAX", elsewhere={}, describe_weights=described.__getitem__
        )

    start = ("--config", recipe, "--init_from", "weights")
    config = parse(*start)
    assert config.model == dataclasses.replace(theirs, dropout=0.0)  # dropout is the training's
    assert config.data.tokenizer == "bytes" and config.batch_size == 16
    assert parse(*start, "--data.tokenizer", "bytes", tokenizer=None).data.tokenizer == "bytes"
    with pytest.raises(UserError, match="don't say which tokenizer .* of 257 isn't that of gpt2; give --dat"):
        parse(*start, tokenizer=None)
    without = parse("--config", recipe, "--init_from", "null")
    assert (without.init_from, without.model.n_layer) == (None, 3)
    with pytest.raises(UserError, match="--init_from: expected a value after it"):
        parse("--config", recipe, "--init_from", "--steps", "3")
    assert parse(*start, "--model.n_layer", "5", "--model.dropout", "0.1").model == dataclasses.replace(
        theirs, n_layer=5, dropout=0.1
    )
    with pytest.raises(UserError, match="--data.tokenizer gpt2: the weights of --init_from weights were trained"):
        parse(*start, "--data.tokenizer", "gpt2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("init_from: gone\nmodel: {n_layer: 7}\n")
    resumed = parse("--resume", "--run_dir", str(tmp_path / "run"))  # weights that a run began with may be gone
    assert resumed.model.n_layer == 7
    (tmp_path / "small.yaml").write_text("init_from: gone\nmodel: {n_layer: 7}\n")
    assert parse("--config", recipe, "--resume", "--run_dir", str(tmp_path / "run")).model.n_layer == 7


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--data", "my.txt"], "--data my.txt: data is a group of settings; for a text of your own give --data.corpus"),
        (["--model", "gpt2"], "--model gpt2: model is a group of settings; give --preset"),
        (["--optimizer", "sgd"], "--optimizer sgd: optimizer is a group of settings, of AdamW"),
        (["training.batch_size=16"], "training.batch_size=16: options begin with --; did you mean --batch_size"),
        (["--do_sample"], "--do_sample: no such option; see --help"),
        (["--grad_accum_steps", "4"], "did you mean --accumulation?"),
        (["--seq_len", "4"], "did you mean --sequence_length?"),
    ],
)
def test_what_other_programs_call_an_option_gets_a_hint(typed, words):
    with pytest.raises(UserError) as error:
        parse(*typed)
    assert words in str(error.value)


def test_the_value_of_an_option_is_not_an_option(recipe):
    assert parse("--run_dir", "device").run_dir == "device"


def test_of_two_ways_to_say_one_thing_the_command_line_overrules_the_recipes(recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("epochs: 3\nbatch_tokens: 64\ndevice_batch_size: 2\nmodel: {block_size: 16}\ndata: {tokens: t}\n")
    config = parse("--config", str(other))
    assert (config.epochs, config.batch_size, config.device_batch_size) == (3.0, 4, 2)
    line = ("--steps", "7", "--batch_size", "6", "--accumulation", "3", "--data.corpus", "stdlib")
    config = parse("--config", str(other), *line)
    assert (config.epochs, config.batch_tokens, config.device_batch_size, config.data.tokens) == (None,) * 4
    assert (config.steps, config.batch_size, config.accumulation) == (7, 6, 3)
    with pytest.raises(UserError, match="--steps and --epochs: both set the same thing"):
        parse("--config", str(recipe), "--steps", "7", "--epochs", "1")


def test_a_recipe_of_this_project_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse("--config", "shakespeare_char")
    assert (config.model.n_embd, config.run_dir) == (384, "runs/shakespeare_char-jax")
    for typed in ("shakespeare_chars", "configs/shakespeare_char.yaml"):
        with pytest.raises(
            UserError, match=f"--config {typed}: no such file, and no recipe .*did you mean shakespeare_c"
        ):
            parse("--config", typed)
    (tmp_path / "gpt2").write_text("steps: 3\n")  # a file that is there comes first
    assert parse("--config", "gpt2").steps == 3


def test_without_a_recipe_the_default_one_is_named_once(capsys, monkeypatch):
    parse("--steps", "3")
    assert capsys.readouterr().err == "note: without --config the recipe is quickstart; gpt2 recipes lists all\n"
    parse("--config", "quickstart")
    monkeypatch.setenv("RANK", "1")
    parse("--steps", "3")
    assert capsys.readouterr().err == ""


def test_a_resumed_run_is_configured_by_its_own_file(recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    before = parse("--config", recipe, "--run_dir", str(folder), "--seed", "7")
    (folder / "config.yaml").write_text(to_yaml(before))
    capsys.readouterr()
    resumed = dataclasses.replace(before, resume="newest")
    assert parse("--resume", "--run_dir", str(folder)) == resumed
    assert parse(f"--run_dir={folder}", "--steps=9", "--resume") == dataclasses.replace(resumed, steps=9)
    for source in (folder, folder / "checkpoints" / "5"):
        assert parse("--resume", str(source)) == dataclasses.replace(before, resume=str(source))
        assert parse("--resume", str(source), "--run_dir", "new").run_dir == "new"
    assert capsys.readouterr().err == ""
    assert parse("--resume", "--run_dir", str(folder), "--config", recipe).seed == 1337  # the recipe that is given


def test_resume_may_stand_alone(recipe):
    assert parse("--resume", "--steps", "3").resume == "newest"
    assert parse("--steps", "3", "--resume").resume == "newest"
    assert parse("--resume", "runs/x/checkpoints/5").resume == "runs/x/checkpoints/5"


def test_a_printed_configuration_is_a_recipe(recipe, tmp_path, capsys):
    arguments = ("--config", recipe, "--optimizer.learning_rate", "3e-4", "--run_dir", "runs/x")
    with pytest.raises(SystemExit) as end:
        parse(*arguments, "--print_config")
    assert end.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse("--config", str(printed)) == parse(*arguments)


def test_every_setting_has_a_help_text():
    helps = {name: action.help for action in train_parser("x", "JAX")._actions for name in action.option_strings}
    groups = {"": TrainConfig, "model.": ModelConfig, "data.": DataConfig, "optimizer.": OptimizerConfig}
    for group, kind in groups.items():
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(field.type):
                assert len(helps[f"--{group}{field.name}"]) > 12, field.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.n_lay", "3"), "--model.n_lay: no such option; did you mean --model.n_layer"),
        (("--n_layer", "3"), "did you mean --model.n_layer?"),
        (("--n_layers", "3"), "did you mean --model.n_layer?"),
        (("--lr", "1e-3"), "--lr: no such option; did you mean --optimizer.learning_rate?"),
        (("--optimizer.lr", "1e-3"), "--optimizer.lr: no such option; did you mean --optimizer.learning_rate?"),
        (("--max_iters=5",), "--max_iters: no such option; did you mean --steps?"),
        (("--grad-accum-steps", "5"), "did you mean --accumulation?"),
        (("--training.batch_size=16",), "did you mean --batch_size?"),
        (("--max_length", "5"), "did you mean --model.block_size?"),
        (("--zzz", "5"), "--zzz: no such option; see --help"),
        (("--steps", "three"), "--steps three: expected a whole number"),
        (("--compile", "maybe"), "--compile maybe: expected true or false"),
        (("--precision", "half"), "--precision half: expected one of auto, float32, tf32, bfloat16, float64"),
        (("--track", "paper"), "--track paper: expected one of wandb, tensorboard, mlflow"),
        (("--data.mixture", "web"), "--data.mixture web: expected FOLDER=WEIGHT,..."),
        (("--epochs", "0"), "--epochs 0.0: must be above 0"),
        (("--preset", "gpt3"), "--preset gpt3: no such preset; use gpt2"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml: no such file"),
        (("--config",), "--config: expected a value"),
        (("--device", "cpu"), "--device: not an option of train_jax.py; use --mesh"),
        (("--seed", "1", "--preset", "gpt2", "--preset", "gpt2-xl"), "give it once"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(arguments, words):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer: 3\n", "no setting is called n_layer"),
        ("model:\n  n_layers: 3\n", "no setting is called model.n_layers; did you mean n_layer?"),
        ("preset: gpt2\n", "no setting is called preset"),
        ("model: 3\n", "model is a group of settings"),
        ("- 1\n", "expected settings"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad.yaml") as error:
        parse("--config", str(path))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--length", "; did you mean --max_new_tokens?"),
        ("--max_length", "; did you mean --max_new_tokens?"),
        ("--num_return_sequences", "; did you mean --num_samples?"),
        ("--do_sample", "; that is the default, which --greedy turns off"),
        ("--promt", "; did you mean --prompt?"),
    ],
)
def test_what_other_programs_call_an_option_of_generate_is_understood(option, meant):
    with pytest.raises(UserError) as error:
        generate_parser("gpt2 generate").parse(["--weights", "gpt2", option, "1"])
    assert str(error.value) == f"{option}: no such option{meant}; see --help"


HELP = "add what is missing, or see --help"


@pytest.fixture
def converter():
    parser = Parser(prog="convert.py")
    parser.add_argument("source", type=str, help="File of 3.5 tensors. Its format is found out.")
    parser.add_argument("--to", dest="target_format", type=str, required=True, help="JSON or YAML.")
    parser.add_argument("--steps", type=int, help="Number of steps.")
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            f"SOURCE is required (file of 3.5 tensors); --to is required (JSON or YAML); {HELP}",
        ),
        (["--to", "json"], f"SOURCE is required (file of 3.5 tensors); {HELP}"),
        (["f", "--steps", "3"], f"--to is required (JSON or YAML); {HELP}"),
        (["f", "--to"], "--to: expected a value after it (JSON or YAML); see --help"),
        (["f", "--to", "json", "--steps"], "--steps: expected a value after it (number of steps); see --help"),
    ],
)
def test_what_is_missing_is_named_as_it_is_typed_with_what_is_expected(converter, arguments, message):
    with pytest.raises(UserError) as error:
        converter.parse(arguments)
    assert str(error.value) == message


def test_a_users_error_is_one_sentence_and_exit_code_2():
    code = (
        "from gpt2_core.cli import run\nfrom gpt2_core.errors import {0}\n"
        "def main(_): raise {0}('a sentence')\nrun(main)"
    )
    for kind, exit_code in (("UserError", 2), ("RunError", 1)):
        done = subprocess.run([sys.executable, "-c", code.format(kind)], capture_output=True, text=True)
        assert (done.returncode, done.stderr, done.stdout) == (exit_code, "error: a sentence\n", "")


def test_what_the_disk_refuses_is_one_sentence_too(tmp_path):
    code = f"from gpt2_core.cli import run\nrun(lambda _: open({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}: Is a directory\n")


def test_a_recipes_mesh_binds_jax_alone(tmp_path):
    (tmp_path / "r.yaml").write_text("mesh: 8\nbatch_size: 8\n")
    line = ["--config", str(tmp_path / "r.yaml"), "--batch_size", "4"]
    config = parse_train_config(line, command="train_torch.py", framework="Torch", elsewhere={"mesh": "use torchrun"})
    assert (config.batch_size, config.mesh) == (4, None)


def test_what_a_trainer_cannot_do_is_refused_before_the_configuration_is_printed(capsys):
    def check(config):
        raise UserError(f"no {config.steps} steps")

    line = ["--steps", "7", "--print_config"]
    with pytest.raises(UserError, match="no 7 steps"):
        parse_train_config(line, command="train_jax.py", framework="JAX", elsewhere={}, check=check)
    assert capsys.readouterr().out == ""


ODD_WORDS = ["", " ", "-1", "0", "nan", "inf", "1e308", "9" * 400, "9" * 5000, "-" + "9" * 400, "٣", "1_0", "0x10"]
ODD_WORDS += ["null", "[", "{a", "[/x]", "../x", "a,b=", "=", "data=" + "9" * 400, "x" * 10_000, "[" * 3000]
ODD_WORDS += ["!!python/object:os.system {}"]


def trial(option: str, value: str) -> None:
    """Parse a command line that sets one option to an odd value, as the trainer does before it opens anything."""
    # `run` makes a sentence of an OSError too, for a name of 10,000 letters for example.
    with contextlib.suppress(UserError, OSError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        parse_train_config([f"--{option}={value}"], command="x", framework="JAX", elsewhere={}, check=check_option)


def every_option() -> list[str]:
    found = [action.dest for action in train_parser("x", "JAX")._actions if action.option_strings]
    return sorted(name for name in found if name not in ("help", "print_config"))


@pytest.mark.parametrize("option", every_option())
def test_an_odd_value_of_an_option_is_taken_or_refused_in_a_sentence(option):
    generator = random.Random(option)
    for value in generator.sample(ODD_WORDS, 2):
        trial(option, value)


@pytest.mark.slow
@pytest.mark.parametrize("option", every_option())
def test_every_odd_value_of_an_option_is_taken_or_refused_in_a_sentence(option):
    for value in ODD_WORDS:
        trial(option, value)


def test_what_goes_into_a_file_or_a_notebook_is_plain_where_colour_is_asked_for():
    code = (
        "from rich.console import Console; from gpt2_core.cli import run\nrun(lambda _: print(Console().is_terminal))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TTY_COMPATIBLE"}
    environment["FORCE_COLOR"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
