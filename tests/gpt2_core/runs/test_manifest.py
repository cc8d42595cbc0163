import json
import random

import pytest

from gpt2_core.runs.manifest import damage, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "5"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "array").write_bytes(bytes(range(256)) * 4)
    (folder / "metadata").write_text("{}")
    write_manifest(folder)
    return folder


def test_a_checkpoint_as_it_was_written_is_whole(checkpoint):
    assert damage(checkpoint) is None
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == {"state/d/array", "metadata"}


def test_any_flipped_bit_is_seen(checkpoint):
    file = checkpoint / "state" / "d" / "array"
    content = file.read_bytes()
    for position in random.Random(0).sample(range(8 * len(content)), 50):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        assert damage(checkpoint).startswith("state/d/array isn't what was written")
    file.write_bytes(content)
    assert damage(checkpoint) is None


def test_a_missing_or_shorter_file_is_named(checkpoint):
    file = checkpoint / "state" / "d" / "array"
    file.write_bytes(file.read_bytes()[:-1])
    assert damage(checkpoint) == "state/d/array has 1,023 bytes instead of 1,024"
    file.unlink()
    assert damage(checkpoint) == "state/d/array is missing"


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"files": 3}', b'{"files": {"metadata": 7}}', b"\xff"])
def test_a_damaged_manifest_is_damage(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    assert damage(checkpoint).startswith("manifest.json can't be read")


def test_a_checkpoint_of_earlier_versions_has_no_manifest_and_is_taken(checkpoint):
    (checkpoint / "manifest.json").unlink()
    assert damage(checkpoint) is None
