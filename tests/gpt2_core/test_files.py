"""Atomic writes, under a disk that forgets at a power cut what it wasn't told to keep."""

import os
from pathlib import Path

import pytest

from gpt2_core.files import publish, write_atomically, writing


@pytest.fixture
def power_cut(monkeypatch):
    """At every rename the power fails: of each file that is renamed, or lies in a folder that is, only what was synced
    before is there afterwards, and nothing of a file whose folder wasn't synced."""
    synced: dict[int, int] = {}
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(descriptor):
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_mtime_ns

    def forget(source):
        for path in [Path(source), *Path(source).rglob("*")]:
            if path.is_file() and not path.is_symlink() and synced.get(path.stat().st_ino) != path.stat().st_mtime_ns:
                path.write_bytes(b"")

    def failing(move):
        def moving(source, target, **options):
            forget(source)
            move(source, target, **options)

        return moving

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", failing(rename))
    monkeypatch.setattr(os, "replace", failing(replace))
    return synced


def test_a_control_loses_what_was_not_synced(tmp_path, power_cut):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b""


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, power_cut):
    write_atomically(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"
    assert tmp_path.stat().st_ino in power_cut  # and then its name


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path, power_cut):
    temporary = tmp_path / ".new"
    (temporary / "deep").mkdir(parents=True)
    (temporary / "deep" / "a").write_bytes(b"content")
    publish(temporary, tmp_path / "new")
    assert (tmp_path / "new" / "deep" / "a").read_bytes() == b"content"
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "deep")} <= set(power_cut)


def test_after_an_error_the_old_file_stays_and_nothing_else_is_there(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="no"), writing(tmp_path / "a") as file:
        file.write(b"new")
        raise ValueError("no")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
