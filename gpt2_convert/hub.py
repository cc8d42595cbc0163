"""Models of the Hugging Face Hub by name, downloaded once into huggingface_hub's cache."""

import re
from collections.abc import Iterable
from pathlib import Path

from gpt2_core.config import PRESETS
from gpt2_core.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTION = ("config.json", "generation_config.json", "merges.txt", "vocab.json", "tokenizer*.json")


def is_name(source: str) -> bool:
    """Whether `source` names a model of the Hub: one of the four presets, or OWNER/NAME if there is no folder OWNER
    here. An existing path comes first."""
    if Path(source).exists():
        return False
    return source in PRESETS or bool(_NAME.fullmatch(source) and not Path(source).parent.exists())


def repository(name: str) -> str:
    """The name with its owner; OpenAI's four models can be named without."""
    return f"openai-community/{name}" if name in PRESETS else name


def fetch(name: str, weight_files: Iterable[tuple[str, ...]]) -> Path:
    """The folder with the model's files, from the cache or the network; raises UserError if neither has it.

    A repository may have the weights in several formats, of which one is downloaded: the first that it has of
    `weight_files`, patterns of file names.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    repo = repository(name)
    try:
        for patterns in weight_files:
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*_DESCRIPTION, *patterns]))
            if any(folder.glob(patterns[0])):
                break
        return folder
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: no such file or folder here, and no model of that name on the Hub") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: not a file or folder here, nor in the Hub's cache, and the Hub can't be reached ({reason:.160}); "
            f"on a machine that reaches it run `hf download {repo} --local-dir {repo.rpartition('/')[2]}`, put that "
            "folder here and give its path"
        ) from error


def hint(source: str) -> str:
    """What to add to the error for a path that isn't there."""
    if source.count("/") <= 1:
        return f"; models of the Hub are named {', '.join(PRESETS)} or OWNER/NAME"
    return ""
