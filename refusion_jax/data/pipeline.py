"""The data pipeline: from DataConfig to batches of token ids.

    examples = load_examples(config, tokenizer, seed)
    batches = batch_iterator(examples, batch_size, process_index, process_count)
    batch = next(batches)

The examples, one per row or packed (`data.packing`), form one endless sequence of rows. Batch t of B rows has
rows t * B to t * B + B - 1. So a batch is a function of its number, whatever the number of processes and
wherever a run was resumed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refusion_jax.data.batches import Batches, by_processes, by_threads, stacked
from refusion_jax.data.encoding import Encoder
from refusion_jax.data.examples import Examples, FiniteExamples, TaskExamples
from refusion_jax.data.index import open_index
from refusion_jax.data.index_builder import Source
from refusion_jax.data.packing import PackedExamples, PackedTaskExamples
from refusion_jax.data.sources.jsonl import JsonlSource
from refusion_jax.data.tasks.registry import TASKS, Task, make_task
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of training examples and their layout in rows.

    Attributes:
      source: kind of source: "tasks" (endless), "jsonl" or "tfds".
      tasks: for "tasks": names of tasks, or a mapping of name to settings. The tasks take turns; the setting
        `share` is the number of turns of a task per turn of the others.
      paths: for "jsonl" the files, for "tfds" the one folder of the prepared dataset.
      split: for "tasks" train, validation or test; for "tfds" a split of the dataset ("train[:90%]").
      query_field: for "jsonl" the field with the prompt text.
      response_field: for "jsonl" the field with the response text.
      max_length: tokens per row. Examples (prompt, response and EOS) that are longer are dropped.
      packing: put as many examples in a row as fit; they do not attend to each other. Otherwise one per row.
      examples_per_row: most examples in a packed row; 0 is one per 32 tokens. On GPUs the cost of attention
        grows with this number, used or not, so the best value is slightly above the number that rows contain.
      eos_multiple: pad responses with EOS to a multiple of this many tokens; 1 adds one EOS. The losses
        include all EOS, so that a decoder with fixed lengths learns to fill the rest of a response.
      eos_extra_blocks: add up to this many times eos_multiple further EOS, a random number per example.
      enable_thinking: false is passed to the chat template; true leaves the choice to the template, as in
        sampling.
      shuffle: a new order in each epoch of a finite source, instead of the order of the source.
      workers: processes per host that prepare batches; 0 uses threads of the training process. A thread makes
        3,000 to 10,000 examples of tasks per second, and all threads share one core.
      max_broken_share: for "jsonl" and "tfds" the largest share of lines or records that cannot be read, such
        as invalid JSON or a missing field. They are skipped, counted, and listed in broken_lines.jsonl of the
        run; with more of them the run does not start.
    """

    source: str = "tasks"
    tasks: Mapping[str, Mapping] | Sequence[str] | str = ()
    paths: Sequence[str] | str = ()
    split: str = "train"
    query_field: str = "query"
    response_field: str = "response"
    max_length: int = 256
    packing: bool = False
    examples_per_row: int = 0
    eos_multiple: int = 1
    eos_extra_blocks: int = 0
    enable_thinking: bool = True
    shuffle: bool = True
    workers: int = 0
    max_broken_share: float = 0.01

    @property
    def max_examples_per_row(self) -> int:
        """E, the most examples per row."""
        return (self.examples_per_row or max(1, self.max_length // 32)) if self.packing else 1


def load_examples(config: DataConfig, tokenizer: Tokenizer, seed: int = 0) -> Examples:
    """Opens the source and returns its rows.

    The examples of a finite source are encoded once per host, see `index`.

    Raises:
      BadInput: a setting is invalid, the source cannot be read, or it has no usable example.
    """
    if type(config.max_length) is not int or config.max_length < 2:
        raise BadInput(f"data.max_length is {config.max_length!r}, expected 2 or more tokens")
    if type(config.workers) is not int or config.workers < 0:
        raise BadInput(f"data.workers is {config.workers!r}, expected 1 or more processes, or 0")
    if type(config.examples_per_row) is not int or config.examples_per_row < 0:
        raise BadInput(f"data.examples_per_row is {config.examples_per_row!r}, expected 1 or more, or 0")
    if not 0 <= config.max_broken_share <= 1:
        raise BadInput(f"data.max_broken_share is {config.max_broken_share}, expected a share from 0 to 1")
    for name, least in (("eos_multiple", 1), ("eos_extra_blocks", 0)):
        if getattr(config, name) < least:
            raise BadInput(f"data.{name} is {getattr(config, name)}, expected {least} or more")
    template = {} if config.enable_thinking else {"enable_thinking": False}
    encoder = Encoder(tokenizer, config.max_length, template, config.eos_multiple, config.eos_extra_blocks)
    if config.source == "tasks":
        tasks, shares = make_tasks(config.tasks)
        drawn = TaskExamples(encoder, tasks, config.split, seed, shares)
        return (
            PackedTaskExamples(drawn, config.max_length, config.max_examples_per_row)
            if config.packing
            else drawn
        )
    shuffle_seed = seed if config.shuffle else None
    source = _open_source(config)
    index = open_index(encoder, source, config.max_broken_share)
    examples = FiniteExamples(encoder, index, source.name, shuffle_seed)
    return (
        PackedExamples(examples, config.max_length, config.max_examples_per_row, shuffle_seed)
        if config.packing
        else examples
    )


def load_examples_in_worker(config: DataConfig, tokenizer_folder: str | None, seed: int) -> Examples:
    """`load_examples` with arguments that pickle: a worker process opens the tokenizer itself."""
    return load_examples(config, open_tokenizer(tokenizer_folder), seed)


def open_tokenizer(folder: str | None) -> Tokenizer:
    """The tokenizer in a model folder; without a folder, bytes."""
    return load_tokenizer(folder) if folder else ByteTokenizer()


def _open_source(config: DataConfig) -> Source:
    """A finite source."""
    paths = [config.paths] if isinstance(config.paths, str) else list(map(str, config.paths))
    if config.source == "jsonl":
        if not paths:
            raise BadInput("data.paths is empty, expected at least one JSONL file")
        return JsonlSource(paths, (config.query_field, config.response_field))
    if config.source == "tfds":
        if len(paths) != 1:
            raise BadInput(f"data.paths has {len(paths)} entries, expected one TFDS folder")
        from refusion_jax.data.sources.tfds import TfdsSource  # slow to import, seldom needed

        return TfdsSource(paths[0], config.split)
    raise BadInput(f"data.source is {config.source!r}, expected tasks, jsonl or tfds")


def make_tasks(tasks: Mapping[str, Mapping] | Sequence[str] | str) -> tuple[list[Task], list[int]]:
    """The tasks of `DataConfig.tasks`, and their shares.

    Raises:
      BadInput: there is no task, or a task is unknown or has an invalid setting.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise BadInput(f"data.tasks is empty, expected some of {', '.join(TASKS)}")
    settings = tasks if isinstance(tasks, Mapping) else {name: {} for name in names}
    made, shares = [], []
    for name in names:
        fields = settings[name]
        share = 1
        if isinstance(fields, Mapping):
            fields = dict(fields)
            share = fields.pop("share", 1)
        if type(share) is not int or share < 1:
            raise BadInput(f"{name}.share is {share!r}, expected 1 or more turns")
        made.append(make_task(name, fields))
        shares.append(share)
    return made, shares


def batch_iterator(
    examples: Examples,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    workers: int = 0,
    open_examples: Callable[[], Examples] | None = None,
) -> Batches:
    """An endless iterator over this process's rows of every global batch of B rows.

    It yields int32 arrays: tokens [B/n, L], prompt_len [B/n], total_len [B/n] and example_id [B/n] (see
    `Examples`; for packed rows the last three are [B/n, E]), where n is the number of processes. Process p
    has rows p*B/n to (p+1)*B/n - 1, so that the rows of all processes in order are the batch of a single
    process. Its state (`get_state`, `set_state`) is `{"next_index": t}`, where t is the number of batches
    taken, the same on every process.

    Args:
      examples: the rows.
      batch_size: B, rows per global batch.
      process_index: p.
      process_count: n.
      num_threads: threads that prepare batches ahead, if there are no workers.
      workers: processes that prepare batches ahead instead. The batches are the same.
      open_examples: called in each worker to open the examples; pickled.

    Raises:
      BadInput: B is not a positive multiple of n.
    """
    if batch_size < 1 or batch_size % process_count:
        raise BadInput(
            f"batch_size is {batch_size}, expected a positive multiple of the {process_count} processes"
        )
    rows = batch_size // process_count
    of_batch = {"batch_size": batch_size, "first": process_index * rows, "rows": rows}
    if workers:
        return by_processes(open_examples, workers, **of_batch)
    return by_threads(functools.partial(stacked, examples, **of_batch), num_threads)


def row_use(examples: Examples, rows: int = 64) -> tuple[float, float]:
    """(examples per row, fraction of tokens that are not padding), means over the first `rows` rows."""
    taken = [examples[row_index] for row_index in range(rows)]
    held = sum(np.count_nonzero(row["total_len"]) for row in taken)
    used = sum(int(np.sum(row["total_len"])) for row in taken)
    return held / rows, used / sum(len(row["tokens"]) for row in taken)
