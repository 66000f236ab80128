"""Folders and files on local disks and in Cloud Storage buckets (`gs://BUCKET/DIR`), as one kind of path.

In a bucket an object appears when it is complete, so a small file needs no temporary name. It cannot grow and
a folder cannot be renamed at once; what needs that asks `is_remote`. Buckets need the extra [gcs]. Local
paths cost nothing here: the packages for buckets are imported for `gs://` only.
"""

import contextlib
import functools
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from refusion_jax.errors import BadInput

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
REMOTE = re.compile(r"gs://([^/]+)(/.*)?")


def location(path: str | Path) -> Path:
    """The path of a file or folder, local or in a bucket; either has the methods of pathlib.Path.

    Raises:
      BadInput: the path names another kind of storage, or a bucket that cannot be reached.
    """
    text = str(path)
    if not SCHEME.match(text):
        return path if isinstance(path, Path) else Path(text)
    found = REMOTE.fullmatch(text)
    if not found:
        advice = "give the path alone" if text.startswith("file://") else "expected a path or gs://BUCKET/DIR"
        raise BadInput(f"{text}: files are read from local disks and from gs:// only; {advice}")
    _reach(found[1])
    from etils import epath

    return epath.Path(text.rstrip("/"))


def size(path: Path) -> int:
    """Bytes of a file. Raises OSError if it is not there."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its folders, by name."""
    if is_remote(folder):
        return [location(f"gs://{name}") for name in sorted(file_system().find(str(folder)))]
    return sorted(path for path in folder.rglob("*") if path.is_file())


def absolute(path: str | Path) -> Path:
    """`location`, independent of the working directory and of symbolic links."""
    path = location(path)
    return path if is_remote(path) else path.resolve()


def is_remote(path: str | Path) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith("gs://")


@functools.lru_cache
def _reach(bucket: str) -> None:
    """Raises BadInput, in one line, unless the bucket can be read."""
    if importlib.util.find_spec("gcsfs") is None:
        raise BadInput(f"gs://{bucket}: needs the package gcsfs: pip install 'refusion_jax[gcs]'")
    try:
        file_system().call("GET", "b/{}/o", bucket, maxResults=1)
    except Exception as error:  # of the credentials, the connection or the service: any kind
        reason = "no such bucket" if isinstance(error, FileNotFoundError) else _one_line(error)
        raise BadInput(f"gs://{bucket}: cannot be reached ({reason})") from None


@functools.cache
def file_system():
    """The file system of all buckets, shared with etils.epath and Orbax."""
    import fsspec

    # Listings that are kept would hide what another process has written since.
    for name in ("gcs", "gs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file on a local disk with the content of `path`: `path` itself unless that is in a bucket."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


class Outbox:
    """A local folder whose files are copied to a folder in a bucket; a context manager.

    Of a local folder it is that folder, and nothing is copied.

    Args:
      folder: the target.

    Attributes:
      path: the local folder, to write files into.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._sent: dict[Path, tuple[int, int]] = {}
        self.path = Path(tempfile.mkdtemp(prefix="outbox-")) if is_remote(folder) else folder

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *error) -> None:
        if self.path != self._folder:
            with contextlib.suppress(Exception) if any(error) else contextlib.nullcontext():
                self.send()
            shutil.rmtree(self.path, ignore_errors=True)

    def send(self) -> None:
        """Copies the files that are new or have changed since they were last sent."""
        if self.path == self._folder:
            return
        for path in files_below(self.path):
            state = path.stat().st_mtime_ns, path.stat().st_size
            if self._sent.get(path) != state:
                self._folder.joinpath(*path.relative_to(self.path).parts).write_bytes(path.read_bytes())
                self._sent[path] = state
