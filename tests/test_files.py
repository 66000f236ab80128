"""Atomic writing of files."""

import concurrent.futures
import errno
import os
from pathlib import Path

import pytest

from refusion_jax.errors import BadInput, command
from refusion_jax.files import check_output, check_output_folder, open_atomically, write_atomically


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


def test_of_a_link_the_target_is_replaced(tmp_path):
    target, link = tmp_path / "data" / "figures.json", tmp_path / "figures.json"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert os.listdir(target.parent) == ["figures.json"] and sorted(os.listdir(tmp_path)) == [
        "data",
        "figures.json",
    ]


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_bytes)
        write_atomically(pipe, "text")
        assert read.result(timeout=10) == b"text"
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    with open_atomically(os.devnull) as file:
        file.write(b"text")
    assert Path(os.devnull).is_char_device()


def test_what_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (None, "-", os.devnull, tmp_path / "new", tmp_path / "file"):
        check_output("--output", path)
    for path, reason in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "new", "its folder does not exist"),
    ):
        with pytest.raises(BadInput, match=rf"--output={path}: cannot be written \({reason}\)"):
            check_output("--output", path)
    for path in (None, tmp_path, tmp_path / "a" / "b"):
        check_output_folder("--output", path)
    with pytest.raises(BadInput, match=f"--output={tmp_path}/file/a: cannot be a folder"):
        check_output_folder("--output", tmp_path / "file" / "a")


def test_nothing_is_written_where_there_is_no_permission(monkeypatch):
    """Told by the system, as root may write anywhere but to a file system that is read-only."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check, path in ((check_output, "new"), (check_output_folder, "new"), (check_output, os.devnull)):
        with pytest.raises(BadInput, match=f"--output={path}: cannot be written .no permission"):
            check("--output", path)


def test_a_full_disk_is_one_line(capsys):
    @command
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    assert main() == 1
    assert capsys.readouterr().err == "error: results.json: cannot be written (No space left on device)\n"
