"""Command lines: parsing options and recipes into a TrainConfig, and errors into one message and an exit code.

Precedence, wherever each stands on the line: defaults < recipe (`--config`) < `--preset` < dotted options.
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import re
import sys
import warnings
from argparse import Action
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from gpt2_core.config import (
    GROUPS,
    NEWEST,
    PRESETS,
    VOCABULARY_MULTIPLE,
    DataConfig,
    ModelConfig,
    TrainConfig,
    recipes,
)
from gpt2_core.config.checks import in_short
from gpt2_core.config.io import to_yaml
from gpt2_core.data.tokenizer import NAMES, vocab_size
from gpt2_core.errors import Stopped, UserError, report
from gpt2_core.parsing import read_text, yaml_value
from gpt2_core.runs.trackers import require as require_tracker

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run(main: Callable[[list[str]], None]) -> None:
    """Call a command's main with the command line; a user error ends in one message, without a traceback.

    Exit codes: 0 done, 1 the run failed, 2 it can't be done as asked, 75 a run was told to stop and can be resumed, 130
    interrupted.
    """
    if not sys.stdout.isatty():
        # Notebooks set FORCE_COLOR, which rich takes for a terminal: it would redraw its progress bar in a file.
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(report(error))
    except Stopped as stopped:
        code = report(stopped)
        sys.stdout.flush()
        os._exit(code)  # without waiting for what may still be compiling in another thread
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the pipe (head, less) has exited.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # What a disk or permissions refuse where the command can't say it better.
        named = f"{error.filename}: " if error.filename else ""
        sys.exit(report(UserError(f"{named}{error.strerror or error}")))


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors in the user's words and no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **kwargs)

    def add_weights_arguments(self) -> None:
        """Which weights a command computes with, and their tokenizer."""
        self.add_argument(
            "--weights",
            type=str,
            required=True,
            help="A path in any format that gpt2 convert reads, or a name of the Hugging Face Hub (gpt2).",
        )
        self.add_argument(
            "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
        )
        self.add_argument(
            "--tokenizer",
            type=Literal[NAMES],
            help="Tokenizer, for weights that don't record one (files of llm.c and nanoGPT don't). Left out: the "
            "recorded one, else gpt2.",
        )

    def parse(self, arguments: list[str]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.parse_args(arguments)
        except UserError:
            raise
        except OverflowError as error:
            typed = max(arguments, key=len)
            raise UserError(f"{typed[:40]}...: a number that is too large to compute with") from error
        except Exception as error:
            # jsonargparse raises several types here, and wraps some of them in argparse.ArgumentError.
            raise UserError(self._in_plain_words(str(error), arguments)) from error

    def _in_plain_words(self, message: str, arguments: list[str]) -> str:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            option = unknown[1].split("=")[0]
            if not option.startswith("-") and "=" in unknown[1]:
                return f"{unknown[1]}: options begin with --{self._suggestion(option)}; see --help"
            if not option.startswith("-"):
                return f"{option}: not expected here; see --help"
            return f"{option}: no such option{self._suggestion(option)}; see --help"
        if missing := re.search(r"arguments are required: (.+)", message):
            required = (f"{self._typed(n)} is required ({self._expected(n)})" for n in missing[1].split(", "))
            return f"{'; '.join(required)}; add what is missing, or see --help"
        if file := re.match(r"Parser key \"(\w+)\":\s*Unable to load config '(.*?)'", message, re.S):
            return f"--{file[1]} {file[2]}: {file[1]} is a group of settings{_INSTEAD_OF_A_GROUP.get(file[1], '')}"
        if bare := re.match(r"argument --(\S+): expected one argument", message):
            return f"--{bare[1]}: expected a value after it ({self._expected('--' + bare[1])}); see --help"
        wrong = re.search(r'Parser key "([^"]+)":\s*(?:.*?)Expected an? (.+?)\. Got value: (.*)', message, re.S)
        if wrong:
            name, expected, value = wrong[1], _type_in_words(wrong[2]), wrong[3].strip()
            return f"--{name} {value}: expected {expected}"
        union = re.search(r'Parser key "([^"]+)":.*?Subtypes: \[(.*?)\].*Given value: (.*)', message, re.S)
        if union:
            return f"--{union[1]} {union[3].strip()}: expected {_type_in_words(union[2])}"
        if other := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.S):
            return f"--{other[1]}: {' '.join(other[2].split())}"
        return " ".join(message.split())

    def _action(self, name: str) -> Action:
        return next(action for action in self._actions if name in (action.dest, *action.option_strings))

    def _typed(self, name: str) -> str:
        """How a person types the argument `name`: --weights, or SOURCE for one that goes by its position."""
        return next(iter(self._action(name).option_strings), name.upper())

    def _expected(self, name: str) -> str:
        """The first sentence of an argument's help."""
        sentence = re.split(r"\.(?:\s|$)", self._action(name).help)[0]
        return sentence if sentence[1:2].isupper() else sentence[0].lower() + sentence[1:]

    def _suggestion(self, option: str) -> str:
        """Which option is meant: the same one in another group, the one that other projects call so, or a close one."""
        known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        last = {name.rpartition(".")[2]: name for name in reversed(known)}
        name = option.lstrip("-").replace("-", "_").rpartition(".")[2]
        if name in _TURNED_OFF_BY and _TURNED_OFF_BY[name] in known:
            return f"; that is the default, which --{_TURNED_OFF_BY[name]} turns off"
        named = [last.get(name), *_CALLED_ELSEWHERE.get(name, ())]
        close = [one for one in named if one in known]
        close = close or [last[one] for one in difflib.get_close_matches(name, last, n=1, cutoff=0.7)]
        return f"; did you mean --{close[0]}?" if close else ""


# What nanoGPT, llm.c, Hugging Face's and OpenAI's programs call our options: the first of these that a command has.
_CALLED_ELSEWHERE = {
    "lr": ("optimizer.learning_rate",),
    "max_lr": ("optimizer.learning_rate",),
    "min_lr": ("optimizer.final_fraction",),
    "warmup_iters": ("optimizer.warmup_steps",),
    "grad_clip": ("optimizer.clip_norm",),
    "max_grad_norm": ("optimizer.clip_norm",),
    "num_layers": ("model.n_layer",),
    "num_heads": ("model.n_head",),
    "d_model": ("model.n_embd",),
    "hidden_size": ("model.n_embd",),
    "seq_len": ("sequence_length",),
    "max_seq_len": ("model.block_size",),
    "max_iters": ("steps",),
    "max_steps": ("steps",),
    "num_iterations": ("steps",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "grad_accum_steps": ("accumulation",),
    "gradient_accumulation_steps": ("accumulation",),
    "micro_batch_size": ("device_batch_size",),
    "dtype": ("precision",),
    "out_dir": ("run_dir", "out"),
    "output_dir": ("run_dir", "out"),
    "dataset": ("data.corpus",),
    "length": ("max_new_tokens", "model.block_size"),
    "max_length": ("max_new_tokens", "model.block_size"),
    "max_tokens": ("max_new_tokens", "steps"),
    "model": ("weights",),
    "nsamples": ("num_samples",),
    "num_return_sequences": ("num_samples",),
    "start": ("prompt",),
}
_TURNED_OFF_BY = {"do_sample": "greedy"}
_INSTEAD_OF_A_GROUP = {
    "data": "; for a text of your own give --data.corpus text --data.path FILE, for tokens --data.tokens FOLDER",
    "model": "; give --preset gpt2-medium, or single ones like --model.n_layer 24",
    "optimizer": ", of AdamW; give single ones like --optimizer.learning_rate 3e-4",
}


def _type_in_words(expected: str) -> str:
    if choices := re.match(r"typing\.Literal\[([^\]]*)", expected):
        return "one of " + choices[1].replace("'", "")
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    names = re.findall(r"\b(int|float|bool|str)\b", expected)
    return " or ".join(words[name] for name in names) or expected


def parse_train_config(
    arguments: list[str],
    *,
    command: str,
    framework: str,
    elsewhere: dict[str, str],
    check: Callable[[TrainConfig], None] = lambda config: None,
    launch: type | None = None,
    describe_weights: Callable[[str], tuple[ModelConfig, str | None]] | None = None,
) -> Any:
    """The configuration that a trainer's command line asks for; with `launch`, a pair of it and one of these.

    `launch` is a dataclass of options that are no settings of a run. `elsewhere` maps the options that only the other
    trainer has to what to use here: a recipe may set them (both trainers read the same recipes), a command line may
    not. `check` raises UserError for what this trainer can't do. `describe_weights` gives architecture and tokenizer of
    the weights that `--init_from` names, which then are the run's.
    """
    parser = train_parser(command, framework, launch)
    arguments, recipe, preset = _split_arguments(arguments)
    for option in (a.split("=")[0] for a in arguments if a.startswith("--")):
        if option[2:] in elsewhere:
            raise UserError(f"{option}: not an option of {command}; {elsewhere[option[2:]]}")
    arguments = [*arguments, *_overruled(arguments)]
    print_config = "--print_config" in arguments
    arguments = [a for a in arguments if a != "--print_config"]

    arguments, resumed = _resumed(arguments) if recipe is None else (arguments, None)
    is_default = recipe is None and resumed is None
    recipe = resumed or recipes.find(recipes.DEFAULT if recipe is None else recipe)
    in_recipe = read_recipe(recipe)
    sizes = [f"--model.{name}={value}" for name, value in PRESETS[preset].items()] if preset else []
    initial = None if "resume" in _values(arguments) else _initial_weights(arguments, in_recipe)
    if initial is not None and describe_weights is not None:
        asked = _values(arguments).get("data.tokenizer")
        by_default = in_recipe.get("data", {}).get("tokenizer", DataConfig().tokenizer)
        sizes = [*_settings_of(initial, describe_weights, asked, by_default), *sizes]
    # A recipe's mesh is JAX's, and PyTorch runs don't record it.
    unmeshed = ["--mesh=null"] if "mesh" in elsewhere else []
    namespace = parser.parse([f"--config={recipe}", *unmeshed, *sizes, *arguments])
    del namespace["config"], namespace["preset"]
    config = parser.instantiate(namespace)
    launched = launch and launch(**{f.name: config[f.name] for f in dataclasses.fields(launch)})
    config = TrainConfig(**{f.name: config[f.name] for f in dataclasses.fields(TrainConfig)})
    is_given = initial is not None or "vocab_size" in in_recipe.get("model", {})
    if not is_given and not any("model.vocab_size" in a for a in arguments):
        model = dataclasses.replace(config.model, vocab_size=vocab_size(config.data.tokenizer))
        config = dataclasses.replace(config, model=model)
    if config.run_dir is None:
        config = dataclasses.replace(config, run_dir=f"runs/{recipe.stem}-{framework.lower()}")
    require_tracker(config.track)
    check(config)
    if print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    if is_default and os.environ.get("RANK", "0") == "0":  # once, and not in each of torchrun's processes
        print(f"note: without --config the recipe is {recipes.DEFAULT}; gpt2 recipes lists all", file=sys.stderr)
    return (config, launched) if launch else config


# Pairs of options for the same thing. A recipe may use the second; the first on the command line then overrides it.
_ALTERNATIVES = (
    ("steps", "epochs"),
    ("batch_size", "batch_tokens"),
    ("accumulation", "device_batch_size"),
    ("data.corpus", "data.tokens"),
    ("data.corpus", "data.mixture"),
    ("data.tokens", "data.mixture"),
)


def _initial_weights(arguments: list[str], in_recipe: dict[str, Any]) -> str | None:
    """What `--init_from` names, on the line or in the recipe."""
    source = _values(arguments).get("init_from", in_recipe.get("init_from"))
    return None if source is None or source.lower() in ("null", "") or source.startswith("--") else source


def _settings_of(
    source: str,
    describe_weights: Callable[[str], tuple[ModelConfig, str | None]],
    asked: str | None,
    by_default: str,
) -> list[str]:
    """Options for the architecture and the tokenizer of the weights at `source`, all that isn't the training's own.

    `asked` is the tokenizer on the line, `by_default` the one that the run has without.
    """
    try:
        model, tokenizer = describe_weights(source)
    except UserError as error:
        raise UserError(f"--init_from {error}" if str(error).startswith(source) else str(error)) from error
    if tokenizer is None and asked is None and not 0 <= model.vocab_size - vocab_size(by_default) < VOCABULARY_MULTIPLE:
        raise UserError(
            f"--init_from {source}: those weights don't say which tokenizer they were trained with, and their "
            f"vocabulary of {model.vocab_size} isn't that of {by_default}; give --data.tokenizer"
        )
    if tokenizer is not None and asked not in (None, tokenizer):
        raise UserError(
            f"--data.tokenizer {asked}: the weights of --init_from {source} were trained with {tokenizer}; leave the "
            "option out, or start from other weights"
        )
    settings = {name: value for name, value in dataclasses.asdict(model).items() if name != "dropout"}
    options = [f"--model.{name}={'null' if value is None else str(value).lower()}" for name, value in settings.items()]
    return options if tokenizer is None else [*options, f"--data.tokenizer={tokenizer}"]


def _overruled(arguments: list[str]) -> list[str]:
    """Options that unset what the command line overrides in the recipe; raises UserError for both on the line."""
    given = {a.split("=")[0][2:] for a in arguments if a.startswith("--")}
    for one, other in _ALTERNATIVES:
        if one in given and other in given:
            raise UserError(f"--{one} and --{other}: both set the same thing; give one of them")
    return sorted({f"--{other}=null" for one, other in _ALTERNATIVES if one in given})


def train_parser(command: str, framework: str, launch: type | None = None) -> Parser:
    """The parser of a trainer's options, all of TrainConfig's fields and those of `launch`."""
    parser = Parser(
        prog=command,
        description=f"Train GPT-2 with {framework}. Settings come from GPT-2's defaults, then the recipe (--config), "
        "then --preset, then the other options, wherever each stands on the line.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"Recipe, by its path or by a name that `gpt2 recipes` lists. Left out: {recipes.DEFAULT}.",
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="Sizes of a published model: sets model.n_layer, model.n_head and model.n_embd.",
    )
    parser.add_class_arguments(TrainConfig, None)
    if launch is not None:
        parser.add_class_arguments(launch, None)
    return parser


def _split_arguments(arguments: list[str]) -> tuple[list[str], str | None, str | None]:
    """Take out `--config` and `--preset`, whose precedence doesn't follow from their position on the line."""
    taken: dict[str, str | None] = {"--config": None, "--preset": None}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        option, equals, value = queue.pop(0).partition("=")
        if option == "--resume" and not equals and (not queue or queue[0].startswith("--")):
            rest.append(f"--resume={NEWEST}")
        elif option in taken:
            if not equals:
                if not queue or queue[0].startswith("--"):
                    raise UserError(f"{option}: expected a value after it; see --help")
                value = queue.pop(0)
            if taken[option] is not None:
                raise UserError(f"{option} {taken[option]} and {option} {value}: give it once")
            taken[option] = value
        else:
            rest.append(option + equals + value)
    preset = taken["--preset"]
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; use {', '.join(PRESETS)}")
    return rest, taken["--config"], preset


def with_sizes(arguments: list[str], sizes: dict[str, int]) -> list[str]:
    """The arguments with the options that `--preset` stands for, or without one those of `sizes`, put first: options on
    the command line override them."""
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        option, equals, value = queue.pop(0).partition("=")
        if option == "--preset":
            preset = value if equals or not queue else queue.pop(0)
            if preset not in PRESETS:
                raise UserError(f"--preset {preset}: no such preset; use {', '.join(PRESETS)}")
            sizes = PRESETS[preset]
        else:
            rest.append(option + equals + value)
    return [*(f"--model.{name}={value}" for name, value in sizes.items()), *rest]


def _resumed(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The configuration of the run that `--resume` continues, which serves as its recipe; None if the line doesn't say
    which run, or there is none. With the path of a run or its checkpoint, that run's folder is --run_dir too."""
    given = _values(arguments)
    source = given.get("resume")
    if source is None:
        return arguments, None
    if source == NEWEST:
        folder = given.get("run_dir")
        found = None if folder is None else Path(folder) / "config.yaml"
        return arguments, found if found is not None and found.is_file() else None
    for folder in (Path(source), Path(source).parent.parent):
        if (folder / "config.yaml").is_file():
            return arguments if "run_dir" in given else [*arguments, f"--run_dir={folder}"], folder / "config.yaml"
    return arguments, None


def _values(arguments: list[str]) -> dict[str, str]:
    """The value of each option on the line, by its name."""
    values = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("--"):
            option, equals, value = argument[2:].partition("=")
            values[option] = value if equals else following
    return values


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe sets; raises UserError if it isn't YAML, or sets something that doesn't exist."""
    values = yaml_value(read_text(path, f"--config {path}"), f"--config {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f'--config {path}: expected settings as lines of "name: value"')
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{path}: no setting is called {in_short(name)}{_closest(name, known)}")
        if name in GROUPS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name} is a group of settings, not {in_short(value)}")
            inside = [f.name for f in dataclasses.fields(GROUPS[name])]
            for key in value:
                if key not in inside:
                    raise UserError(f"{path}: no setting is called {name}.{in_short(key)}{_closest(key, inside)}")
    return values


def _closest(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(in_short(name), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
