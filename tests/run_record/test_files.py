"""Files: whole or as they were, and never the input they were made from."""

import os

import pytest

from qtuning_kernels.files import refuse_overwrite, write_atomic


def test_a_file_is_synced_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    """Renamed first, a file could be empty after a loss of power: the name is on the disk before the content."""
    path = tmp_path / "new" / "a.txt"
    synced = []

    def fsync(descriptor):
        synced.append((os.pread(descriptor, 100, 0), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with write_atomic(path) as temporary:
        temporary.write_text("content")
    assert synced == [(b"content", False)]
    assert path.read_text() == "content"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("before")

    def fail():
        with write_atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.jsonl").write_text("{}\n")
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["itself", "another path", "symbolic link", "hard link", "through a linked folder"])
def test_an_input_is_refused_under_every_name(folder, tmp_path, name):
    file = folder / "deep" / "a.jsonl"
    output = tmp_path / "output.jsonl"
    if name == "symbolic link":
        output.symlink_to(file)
    elif name == "hard link":
        output.hardlink_to(file)
    elif name == "through a linked folder":
        (tmp_path / "link").symlink_to(folder)
        output = tmp_path / "link" / "deep" / "a.jsonl"
    else:
        output = file if name == "itself" else folder / "deep" / ".." / "deep" / "a.jsonl"
    for given in (file, folder):
        with pytest.raises(FileExistsError, match=r"is a file of the input .*; give another output"):
            refuse_overwrite(output, ["a/hub-name", given])


def test_other_outputs_are_accepted(folder, tmp_path):
    (tmp_path / "old.jsonl").write_text("{}\n")
    for output in (tmp_path / "old.jsonl", folder / "new.jsonl", tmp_path / "nowhere" / "new.jsonl"):
        refuse_overwrite(output, [folder, "a/hub-name"])
    with pytest.raises(IsADirectoryError, match="is a folder; accepted: the name of a file"):
        refuse_overwrite(folder, [])
