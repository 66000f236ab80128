"""Examples in TensorFlow Datasets' ArrayRecord format: random access to data that does not fit in memory.

Works without TensorFlow. `jsonl_to_tfds` writes a dataset and `TfdsSource` reads it; any TFDS dataset
prepared with `file_format="array_record"` and the features `query` and `response` can be read too. Importing
tfds is slow, so other modules import this one only when it is needed.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from refusion_jax.buckets import is_remote
from refusion_jax.data.sources.example import Broken, Example
from refusion_jax.data.sources.jsonl import read_jsonl, read_record
from refusion_jax.errors import BadInput


class JsonlExamples(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset built from JSONL files; `splits` maps each split to its files."""

    VERSION = tfds.core.Version("1.0.0")

    # TFDS opens an existing dataset by its name alone, without `splits`.
    def __init__(self, splits: Mapping[str, Sequence[str | Path]] | None = None, **kwargs):
        self._paths = splits or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        # `messages` is JSON text; it is empty if `query` is the whole prompt.
        features = tfds.features.FeaturesDict({"query": text, "messages": text, "response": text})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(paths) for split, paths in self._paths.items()}

    def _generate_examples(self, paths: Sequence[str | Path]) -> Iterator[tuple[int, dict]]:
        examples = (example for path in paths for example in read_jsonl(path))
        for number, (query, response) in enumerate(examples):
            if isinstance(query, str):
                yield number, {"query": query, "messages": "", "response": response}
            else:
                messages = json.dumps(query)
                yield number, {"query": "", "messages": messages, "response": response}


def jsonl_to_tfds(splits: Mapping[str, Sequence[str | Path]], folder: str | Path) -> Path:
    """Writes the JSONL files of each split as ArrayRecord under `folder`, in order.

    Returns:
      the folder of the dataset, for `TfdsSource`.

    Raises:
      BadInput: a file is malformed, or `folder` already contains such a dataset, which TFDS would not
        replace.
    """
    builder = JsonlExamples(splits, data_dir=str(folder), file_format="array_record")
    path = Path(builder.data_path)
    if path.exists():
        raise BadInput(f"{path}: exists already; remove it or give another folder")
    with tempfile.TemporaryDirectory() as nothing_to_download:
        builder.download_and_prepare(download_dir=nothing_to_download, file_format="array_record")
    return path


class TfdsSource(Sequence[Example]):
    """One split of a prepared dataset, as a sequence of examples that are read on demand; a `Source`.

    Raises:
      BadInput: the folder has no dataset, or the dataset lacks random access, the split, or the features
        `query` and `response`.
    """

    def __init__(self, folder: str | Path, split: str):
        if is_remote(folder):
            raise BadInput(f"{folder}: a TFDS dataset must be on a local disk; copy it, or use JSONL files")
        path = _dataset_folder(Path(folder))
        try:
            builder = tfds.builder_from_directory(str(path))
        # Damaged metadata makes various parsers raise various exceptions.
        except Exception as error:
            raise BadInput(f"{path}: cannot be read as a TFDS dataset: {error}") from error
        missing = {"query", "response"} - set(builder.info.features)
        if missing:
            raise BadInput(
                f"{path}: has features {sorted(builder.info.features)}, expected query and response"
            )
        try:
            self._records = builder.as_data_source(split=split)
            next(iter(self._records))  # the first read opens the files, so a damaged file fails here
        except NotImplementedError as error:
            raise BadInput(
                f"{path}: is stored as {builder.info.file_format.value}, expected array_record"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise BadInput(
                f"{path}: split {split!r} cannot be read, the dataset has "
                f"{', '.join(sorted(builder.info.splits))}: {error}"
            ) from error
        self._path = path
        self._split = split
        self._read = 0
        self.name = str(folder)

    def entries(self) -> Iterator[tuple[str, Example] | Broken]:
        for number in range(len(self)):
            self._read, where = number, f"{self._path} example {number}"
            try:
                yield where, self[number]
            except BadInput as error:
                yield Broken(where, str(error).removeprefix(f"{where}: "))

    def progress(self) -> float:
        return self._read / max(1, len(self))

    def fingerprint(self, cache: Path) -> str:
        """By size and time of its files: reading them all would take as long as encoding."""
        files = sorted(path for path in self._path.rglob("*") if path.is_file())
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return json.dumps([states, self._split])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends an iteration
        record = {key: _text(value) for key, value in self._records[number].items()}
        messages = record.pop("messages", "")
        if isinstance(messages, str) and messages:
            return Example(json.loads(messages), record["response"])
        return read_record(record, f"{self._path} example {number}")


def _text(value: Any) -> Any:
    """Decodes text, which TFDS returns as bytes. `read_record` reports values of other types."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _dataset_folder(folder: Path) -> Path:
    """The folder with dataset_info.json: `folder` itself, or the only one below it (name/config/version)."""
    patterns = ("", "*/", "*/*/", "*/*/*/")
    found = sorted(p.parent for s in patterns for p in folder.glob(f"{s}dataset_info.json"))
    if len(found) != 1:
        listed = ", ".join(str(path) for path in found) or "none"
        raise BadInput(f"{folder}: expected one prepared TFDS dataset, found {listed}")
    return found[0]
