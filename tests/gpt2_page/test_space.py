"""The folder that is a Space, and its page as the Space runs it."""

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from gpt2_convert import read_weights
from gpt2_core.errors import UserError

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'gpt2-jax[page]'")
pytestmark = pytest.mark.long


@pytest.fixture
def write(tmp_path, weights_file):
    from gpt2_page.space import write

    def write_space(force: bool = False, tokenizer: str | None = None):
        write(tmp_path / "space", read_weights(weights_file), tokenizer, "float32", force)
        return tmp_path / "space"

    return write_space


def test_a_space_has_what_the_hub_asks_for(write):
    folder = write()
    _, header, text = (folder / "README.md").read_text().split("---\n")
    settings = yaml.safe_load(header)
    assert {"sdk": "gradio", "sdk_version": gradio.__version__, "license": "mit"}.items() <= settings.items()
    assert (folder / settings["app_file"]).is_file() and isinstance(settings["python_version"], str) and text
    index, *lines = (folder / "requirements.txt").read_text().splitlines()
    assert index.startswith("--extra-index-url https://")
    needed = {one.name: str(one.specifier) for one in map(Requirement, lines)}
    assert {"jax", "torch", "flax", "tiktoken"} <= set(needed) and "gradio" not in needed
    assert all(version.startswith("==") and "+" not in version for version in needed.values())
    assert "MIT" in (folder / "LICENSE").read_text()
    assert not list(folder.rglob("__pycache__"))


def test_what_is_there_is_not_replaced_unless_told_to(write):
    folder = write()
    (folder / ".git").mkdir()
    (folder / "gpt2_page" / "left_over.py").touch()
    (folder / "app.py").write_text("mine")
    with pytest.raises(UserError, match="space: exists; add --force to replace the Space in it"):
        write()
    assert (folder / "app.py").read_text() == "mine"
    write(force=True)
    assert (folder / "app.py").read_text() != "mine" and (folder / ".git").is_dir()
    assert not (folder / "gpt2_page" / "left_over.py").exists()


def test_a_folder_that_is_no_space_is_never_replaced(write, tmp_path):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "app.py").write_text("another program")
    with pytest.raises(UserError, match="space: holds no Space, so --force doesn't replace it"):
        write(force=True)
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["app.py"]


def test_a_tokenizer_that_does_not_fit_leaves_nothing(write, tmp_path):
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        write(tokenizer="gpt2")
    assert not (tmp_path / "space").exists()


def test_its_app_runs_as_it_is_with_its_own_code_and_weights(write, serving):
    folder = write()
    # Seen in the page only if the page is made by the Space's own copy.
    with (folder / "gpt2_page" / "intro.html").open("a") as file:
        file.write("<p>from the Space</p>")
    with serving(folder / "app.py") as address:
        config = httpx.get(f"{address}/config").text
        assert "from the Space" in config
