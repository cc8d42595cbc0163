"""Every recipe begins to train in both frameworks, shrunk by overrides on a local text."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from gpt2_commands.prepare import held_back
from gpt2_convert import read_initial_weights, write_weights
from gpt2_core.cli import parse_train_config
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import read_metrics
from parity.gpt2.cases import random_weights

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"), key=lambda path: path.stem)
NAMES = [path.stem for path in RECIPES]
SMALL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "model.vocab_size": 257,
    "sequence_length": 12,
    "data.corpus": "text",
    "data.tokenizer": "bytes",
    "batch_size": 32,
    "steps": 2,
    "eval_sequences": 8,
    "sample_interval": 0,
    "precision": "float32",
}
EXPECTED = {
    "finetune_shakespeare", "fineweb_gpt2_124m", "fineweb_gpt2_1558m", "fineweb_gpt2_350m", "fineweb_gpt2_774m",
    "openwebtext_gpt2_124m", "quickstart", "shakespeare_char", "shakespeare_mingpt", "shakespeare_mingpt_char",
    "shakespeare_overfit", "tinystories_100m", "wikitext2_gpt2", "wikitext2_gpt2_20_epochs",
}  # fmt: skip


def parse(recipe, framework, options):
    line = [f"--{name}={value}" for name, value in options.items()]
    return parse_train_config(
        ["--config", str(recipe), *line], command=f"train_{framework}.py", framework=framework, elsewhere={}
    )


# Shrunk, these are the smallest of them again.
LIKE_ANOTHER = (
    "fineweb_gpt2_350m",
    "fineweb_gpt2_774m",
    "fineweb_gpt2_1558m",
    "shakespeare_mingpt_char",
    "wikitext2_gpt2_20_epochs",
)


@pytest.mark.long
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LIKE_ANOTHER else []) for p in RECIPES],
)
def test_a_recipe_begins_to_train_when_it_is_shrunk(recipe, framework, text_file, tmp_path):
    shrunk = SMALL | {"data.path": text_file, "data.cache_dir": tmp_path / "tokens", "run_dir": tmp_path / "run"}
    if framework == "jax":
        from gpt2_jax.train import train

        shrunk["mesh"] = 1
    else:
        from gpt2_torch.train import train
    if parse(recipe, framework, {}).data.validation_fraction:
        shrunk["data.validation_fraction"] = 0.1  # some hold back less than a block of so short a text
    config = parse(recipe, framework, shrunk)
    if config.init_from is not None:  # pretrained weights of the shrunk model, in the Hub's own format
        write_weights(random_weights(config.model), tmp_path / "pretrained", "hf")
        config = dataclasses.replace(config, init_from=str(tmp_path / "pretrained"))
    folder = train(config, read_initial_weights)
    rows = read_metrics(folder.metrics)
    losses = {split: [row["loss"] for row in rows if row["split"] == split] for split in ("train", "val")}
    assert len(losses["train"]) == 2 and all(5.0 < loss < 6.5 for loss in losses["train"])
    assert len(losses["val"]) == (2 if config.data.validation_fraction else 0)
    assert folder.steps()[-1] == 2 and folder.curves.is_file()


def test_every_recipe_that_people_ask_for_is_there():
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_says_where_it_comes_from_what_it_needs_and_what_to_expect(recipe):
    header = re.match(r"(#.*\n)+", recipe.read_text())[0]
    for word in ("# Source: ", "# Needs: ", "# Expect: "):
        assert header.count(word) == 1, word


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "gpt2_" in path.stem], ids=lambda path: path.stem)
def test_a_step_has_as_many_tokens_as_its_source_says(recipe):
    config = parse(recipe, "jax", {})
    others = {"fineweb_gpt2_1558m": 1 << 20, "wikitext2_gpt2": 1 << 15, "wikitext2_gpt2_20_epochs": 1 << 15}
    assert config.tokens_per_step == others.get(recipe.stem, 1 << 19)


def header(recipe):
    """The recipe's opening comment as one line, without what it quotes from others."""
    lines = re.match(r"(#.*\n)+", recipe.read_text())[0]
    return re.sub(r'"[^"]*"', "", re.sub(r"\s*\n#\s*|#\s*", " ", lines))


def rounded(value, figure):
    """`value` written with as many decimals as `figure`."""
    return f"{value:.{len(figure.partition('.')[2])}f}"


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_every_figure_of_a_header_that_follows_from_the_settings_is_what_follows_from_them(recipe):
    config, text = parse(recipe, "jax", {}), header(recipe)
    parameters = config.model.parameter_count
    tokens = config.steps * config.tokens_per_step
    for pattern, value in {
        r"\b([\d.]+)M\b": parameters / 1e6,
        r"([\d.]+) million parameters": parameters / 1e6,
        r"([\d,]+) parameters": parameters,
        r"[\d,]+ token embeddings alone are ([\d,]*\d)": config.model.vocab_size * config.model.n_embd,
        r"([\d,]+) token embeddings": config.model.vocab_size,
        # Parameters, gradients and AdamW's two moments in float32.
        r"([\d.]+) GB (?:each )?(?:of device memory )?for the training state": 16 * parameters / 1e9,
        r"[tT]he ([\d.]+) billion tokens are": tokens / 1e9,
        r"(\d+,\d{3}) steps": config.steps,
    }.items():
        for figure in re.findall(pattern, text):
            assert figure.replace(",", "") == rounded(value, figure), pattern


@pytest.mark.parametrize(
    ("stem", "figures"),
    [
        ("tinystories_100m", ["162M", "162,081,024 parameters", "are 77,012,736", "100,277 token embeddings"]),
        ("fineweb_gpt2_350m", ["355M", "5.7 GB", "31 billion"]),
        ("quickstart", ["0.8 million"]),
    ],
)
def test_the_headers_that_say_how_large_their_model_is_still_do(stem, figures):
    (recipe,) = (path for path in RECIPES if path.stem == stem)
    assert all(figure in header(recipe) for figure in figures)


def test_the_table_of_recipes_has_every_recipe_with_its_true_size():
    table = (RECIPES[0].parent.parent / "docs" / "recipes.md").read_text()
    sizes = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+)M", table, re.M))
    assert set(sizes) == set(NAMES)
    for recipe in RECIPES:
        count = parse(recipe, "jax", {}).model.parameter_count / 1e6
        assert sizes[recipe.stem] == rounded(count, sizes[recipe.stem]), recipe.stem


def test_the_quickstart_writes_samples_as_the_readme_says():
    (recipe,) = (path for path in RECIPES if path.stem == "quickstart")
    config = parse(recipe, "jax", {})
    assert 0 < config.sample_interval <= config.steps


@pytest.mark.parametrize("accelerators", [1, 2, 4])
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_left_out_the_mesh_is_every_accelerator_there_is(recipe, accelerators, monkeypatch):
    import jax

    from gpt2_jax import runtime
    from gpt2_jax.train import resolve

    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device] * accelerators)
    monkeypatch.setattr(runtime, "has_accelerator", lambda: True)
    config = resolve(parse(recipe, "jax", {}))
    assert config.mesh == f"data={accelerators},fsdp=1,tensor=1"
    with pytest.raises(UserError, match=rf"--mesh 8: needs 8 devices and this machine has {accelerators} "):
        runtime.resolve_mesh(dataclasses.replace(config, batch_size=8, accumulation=1, mesh=8))


def test_the_larger_presets_go_on_top_of_wikitext2():
    (recipe,) = (path for path in RECIPES if path.stem == "wikitext2_gpt2")
    line = ["--config", str(recipe), "--preset", "gpt2-xl"]
    config = parse_train_config(line, command="train_jax.py", framework="jax", elsewhere={})
    assert (config.model.n_layer, config.model.dropout, config.epochs) == (48, 0.1, 1.0)


def test_the_published_curve_is_the_one_that_its_author_logged():
    recipe = yaml.safe_load((RECIPES[0].parent / "shakespeare_overfit.yaml").read_text())
    curve = recipe["reference_curve"]
    assert list(curve) == list(range(0, 260, 10)) and recipe["model"]["vocab_size"] == 50304
    assert [curve[step] for step in (0, 100, 200, 250)] == [10.9677, 3.7358, 0.1825, 0.0052]
    published = Path(__file__).parents[2] / "shared" / "data" / "shakespeare_overfit_published.csv"
    if not published.is_file():
        pytest.skip(f"the published log isn't at {published}")
    with published.open() as file:
        assert curve == {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def test_the_published_run_that_memorises_in_order_is_as_it_was_published():
    (recipe,) = (path for path in RECIPES if path.stem == "shakespeare_mingpt")
    config = parse(recipe, "jax", {})
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.vocab_size) == (12, 12, 768, 1024, 50257)
    assert (config.tokens_per_sequence, config.microbatch_size, config.accumulation) == (256, 32, 4)
    assert (config.data.order, config.data.tokenizer, config.target_loss) == ("sequential", "gpt2", 0.099)


def test_openwebtext_holds_back_one_share_by_recipe_and_by_prepare():
    (recipe,) = (path for path in RECIPES if path.stem == "openwebtext_gpt2_124m")
    assert parse(recipe, "jax", {}).data.validation_fraction == held_back("openwebtext", None) == 0.0005
    assert held_back("shakespeare", None) == 0.01 and held_back("openwebtext", 0.2) == 0.2
