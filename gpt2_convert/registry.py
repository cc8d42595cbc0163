"""The list of weight formats, which drives detection, help and error messages."""

from gpt2_convert import canonical, hugging_face, jax_checkpoint, llmc, msgpack, nanogpt, torch_checkpoint
from gpt2_convert.format import Format
from gpt2_convert.source import Source
from gpt2_core.errors import UserError

# Detection asks the last format first: formats recognized by the file's own content come after those recognized by the
# files beside it. A new format goes to the end.
FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (jax_checkpoint, torch_checkpoint, hugging_face, nanogpt, llmc, canonical, msgpack)
}


def detect(source: Source) -> Format:
    """The format of a file or folder, by what it holds and not by its name; raises UserError if it is none of these."""
    for form in reversed(FORMATS.values()):
        if form.detect(source):
            return form
    raise UserError(f"{source.path}: holds no weights that this project knows; expected {described()}")


def described() -> str:
    """All sources that can be read, for help and errors."""
    *first, last = dict.fromkeys(form.described for form in FORMATS.values())
    return f"{', '.join(first)} or {last}"
