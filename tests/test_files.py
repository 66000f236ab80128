"""Atomic writing of files."""

import os

import pytest

from refusion_jax.files import open_atomically, write_atomically


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    write_atomically(path, "old ü")
    with open_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old ü"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["figures.json"]
    write_atomically(path, b"\xff\n")
    assert path.read_bytes() == b"\xff\n" and os.listdir(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(error), open_atomically(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "figures.json", "new")
    assert os.listdir(tmp_path) == []


def test_a_partial_file_may_be_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt), open_atomically(path, keep_partial=True) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["results.jsonl.partial"]
    assert (tmp_path / "results.jsonl.partial").read_bytes() == b"half"
    with open_atomically(path, keep_partial=True) as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["results.jsonl"] and path.read_bytes() == b"whole"
