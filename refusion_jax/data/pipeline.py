"""From a configured source to batches of token ids.

    examples = load_examples(config, tokenizer, seed)
    batches = batch_iterator(examples, batch_size, process_index, process_count)
    batch = next(batches)

The examples form one endless sequence, and batch t of B rows is its places t*B … t*B + B-1. So a
batch is a function of its number, whatever the number of processes and wherever a run was resumed.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from refusion_jax.data.examples import Encoder, Examples, FiniteExamples, TaskExamples
from refusion_jax.data.sources import load_jsonl
from refusion_jax.data.tasks import TASKS, Task, make_task
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import Tokenizer

_ENDLESS = 2**40  # batches: beyond any run


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how long they may be.

    source: "tasks" (embedded, endless), "jsonl" or "tfds".
    tasks: for "tasks", their names, or the settings of each by its name; they take turns.
    paths: for "jsonl" the files, for "tfds" the one folder of the prepared dataset.
    split: for "tasks" train, validation or test; for "tfds" a split of the dataset ("train[:90%]").
    max_length: tokens of prompt, response and EOS together; longer examples are dropped.
    enable_thinking: false tells the chat template so; true leaves it to the template, as sampling does.
    shuffle: a new order for each epoch of a finite source, instead of the order of the source.
    """

    source: str = "tasks"
    tasks: Mapping[str, Mapping] | Sequence[str] | str = ()
    paths: Sequence[str] | str = ()
    split: str = "train"
    max_length: int = 256
    enable_thinking: bool = True
    shuffle: bool = True


def load_examples(config: DataConfig, tokenizer: Tokenizer, seed: int = 0) -> Examples:
    """Opens the source and scans it once for what can be used; see `Examples.counts`.

    Raises BadInput for settings that do not make sense, for a source that cannot be read, and for
    one of which nothing is left.
    """
    if type(config.max_length) is not int or config.max_length < 2:
        raise BadInput(f"data.max_length is {config.max_length!r}, expected 2 or more tokens")
    template = {} if config.enable_thinking else {"enable_thinking": False}
    encoder = Encoder(tokenizer, config.max_length, template)
    if config.source == "tasks":
        return TaskExamples(encoder, _make_tasks(config.tasks), config.split, seed)

    paths = [config.paths] if isinstance(config.paths, str) else list(map(str, config.paths))
    shuffle_seed = seed if config.shuffle else None
    if config.source == "jsonl":
        if not paths:
            raise BadInput("data.paths is empty, expected at least one JSONL file")
        return FiniteExamples(encoder, load_jsonl(paths), ", ".join(paths), shuffle_seed)
    if config.source == "tfds":
        if len(paths) != 1:
            raise BadInput(f"data.paths has {len(paths)} entries, expected one TFDS folder")
        from refusion_jax.data.tfds_source import TfdsSource  # slow to import, seldom needed

        source = TfdsSource(paths[0], config.split)
        return FiniteExamples(encoder, source, paths[0], shuffle_seed)
    raise BadInput(f"data.source is {config.source!r}, expected tasks, jsonl or tfds")


def _make_tasks(tasks: Mapping[str, Mapping] | Sequence[str] | str) -> list[Task]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise BadInput(f"data.tasks is empty, expected some of {', '.join(TASKS)}")
    settings = tasks if isinstance(tasks, Mapping) else {name: {} for name in names}
    return [make_task(name, settings[name]) for name in names]


def batch_iterator(
    examples: Examples,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> grain.DatasetIterator:
    """This process's rows of every global batch of B = `batch_size` rows, without end.

    Yields int32 arrays: tokens [B/n, L], prompt_len [B/n], total_len [B/n] and index [B/n] (see
    `Examples`), with n = `process_count`. Process p has rows p*B/n … (p+1)*B/n - 1, so that the
    processes' rows one after the other are the batch of a single process. Threads prepare batches
    ahead.

    The state for checkpoints (`get_state`, `set_state`, grain's CheckpointSave) is
    `{"next_index": t}`, t being the number of batches taken, and the same on every process.

    Raises BadInput unless B is a positive multiple of n.
    """
    if batch_size < 1 or batch_size % process_count:
        raise BadInput(
            f"batch_size is {batch_size}, expected a positive multiple of the {process_count} processes"
        )
    rows = batch_size // process_count

    def batch(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size + process_index * rows
        taken = [examples[place] for place in range(first, first + rows)]
        return {key: np.stack([row[key] for row in taken]) for key in taken[0]}

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.range(_ENDLESS).map(batch).to_iter_dataset(options))
