"""Checkpoints of a run, and a warning before the machine goes: the only file that imports Orbax.

    DIR/checkpoints/STEP/params      parameters, each array in shards
    DIR/checkpoints/STEP/optimizer   step and optimiser state
    DIR/checkpoints/STEP/data        where the data iterator stands, JSON

STEP is the number of updates done. A checkpoint is written under another name and renamed when it is
whole, and renamed again before it is deleted; so a directory STEP is a complete checkpoint, whenever the
process was killed.
"""

import contextlib
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils

from refusion_jax.errors import BadInput
from refusion_jax.weights.lazy import Index, LazyArray, bounds

FOLDER = "checkpoints"
OUTDATED = ".outdated"  # where old checkpoints wait for deletion
CHUNK_BYTES = 2**24  # of a converted array, what is read and decompressed at once
TOGETHER_BYTES = 2**26  # of converted arrays, what is written at once, give or take one array
APPEARS_SECONDS = 60  # until every process sees a folder that process 0 made; NFS may take 30

# What a launcher sees of a process that SIGTERM ended. SLURM requeues a preempted job whatever its code;
# Kubernetes and xpk restart on 128 + signal number by default.
PREEMPTED_EXIT_CODE = 128 + signal.SIGTERM


class Checkpoints:
    """The checkpoints of one training run, for the process (or processes) that write them.

    Args:
      folder: DIR, the run's folder, on a disk that all processes see.
      keep: how many of the newest checkpoints stay; those before are deleted.

    Raises:
      BadInput: process 0 made a folder that this one does not see.
    """

    def __init__(self, folder: str | Path, keep: int):
        self._folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, todelete_subdir=OUTDATED, cleanup_tmp_directories=True
        )
        with _orbax_silent():
            self._manager = ocp.CheckpointManager(self._folder / FOLDER, options=options)
        patience = time.monotonic() + APPEARS_SECONDS
        while not (self._folder / FOLDER).is_dir():
            if time.monotonic() > patience:
                raise BadInput(f"{self._folder}: must be on a disk that all processes see")
            time.sleep(0.5)
        self._delete_leftovers()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self._manager.close()
        self._delete_leftovers()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, None without any; one being written counts.

        That of process 0 in all, as a network's file system may show the others an older state. To be called
        by all processes.
        """
        step = self._manager.latest_step()
        agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if agreed < 0 else agreed

    def save(self, step: int, trees: Mapping[str, Any], data: Any) -> None:
        """Saves in the background; arrays and `data` are as they were when this returns.

        Waits for a save that is still under way. To be called by all processes.

        Args:
          step: updates done.
          trees: a tree of arrays for each item ("params", "optimizer").
          data: the state of the data iterator, JSON; the same in all processes, so that a run can go on
            with another number of them.
        """
        self._manager.wait_until_finished()  # until then Orbax may be moving a checkpoint into OUTDATED
        self._delete_in_background()
        items = {name: ocp.args.StandardSave(tree, _layer_by_layer(tree)) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(data)), force=True)

    def restore(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The trees and the data iterator's state saved at `step`.

        Args:
          step: which checkpoint.
          trees: for each item its tree of ShapeDtypeStructs, with the shardings wanted.

        Raises:
          BadInput: the checkpoint is damaged or holds other shapes.
        """
        folder = self._folder / FOLDER / str(step)
        for name, tree in trees.items():
            check_shapes(folder / name, _metadata(folder / name), tree)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        restored = _reading(folder, lambda: self._manager.restore(step, args=args))
        return {name: restored[name] for name in trees}, restored["data"]

    # Orbax moves an old checkpoint into OUTDATED in one go and leaves it there. Deleting it in place would
    # leave half a checkpoint under its proper name if the process were killed meanwhile.

    def _delete_in_background(self) -> None:
        outdated = self._folder / FOLDER / OUTDATED
        if jax.process_index() == 0 and outdated.exists():
            doomed = outdated.rename(f"{outdated}-{time.time_ns()}")
            threading.Thread(target=shutil.rmtree, args=(doomed, True)).start()

    def _delete_leftovers(self) -> None:
        if jax.process_index() == 0:
            for doomed in (self._folder / FOLDER).glob(f"{OUTDATED}*"):
                shutil.rmtree(doomed, ignore_errors=True)


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest checkpoint in DIR; None without any."""
    path = Path(folder) / FOLDER
    return max(ocp.utils.checkpoint_steps(path), default=None) if path.is_dir() else None


def saved_params(folder: str | Path) -> dict[str, Any]:
    """The newest parameters in DIR, yet to be read: nested dict of LazyArray.

    Raises:
      BadInput: DIR holds no checkpoint, or a damaged one; reading an array raises it too.
    """
    path = _newest(folder) / "params"
    return jax.tree.map(lambda leaf: _lazy_array(path, leaf), _metadata(path))


def write_params(folder: str | Path, params: Any) -> None:
    """Writes DIR/checkpoints/0 with parameters alone, one array in memory at a time.

    Args:
      folder: DIR, without checkpoints yet.
      params: nested dict of LazyArray.

    Raises:
      BadInput: an array cannot be read.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    item = ocp.args.PyTreeSave(params, save_args=chunks)
    path = Path(folder).resolve() / FOLDER
    with _orbax_silent():
        registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
        handlers = {"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)}
        with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
            manager.save(0, args=ocp.args.Composite(params=item))


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """How Orbax saves arrays that are on disk already: as numpy arrays, but a few at a time."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        together = []  # each write waits for the disk, so small arrays share one
        for item in zip(values, infos, args, strict=True):
            together.append(item)
            if sum(value.nbytes for value, _, _ in together) > TOGETHER_BYTES or item[0] is values[-1]:
                stored, *rest = zip(*together, strict=True)
                for written in await super().serialize([value.whole() for value in stored], *rest):
                    written.result()
                together = []
        return []


class Preemption:
    """Notes SIGTERM, so that the loop can finish its step and save; restores the old handler on exit."""

    def __init__(self):
        self._noticed = False

    def __enter__(self) -> "Preemption":
        # With several processes JAX's own service listens: it agrees on a step for all of them.
        self._ours = jax.process_count() == 1
        if self._ours:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *error) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; to be asked by all processes after each step."""
        return self._noticed if self._ours else multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = True


def _newest(folder: str | Path) -> Path:
    step = latest_step(folder)
    if step is None:
        raise BadInput(f"{Path(folder) / FOLDER}: holds no checkpoint")
    return Path(folder).resolve() / FOLDER / str(step)


def _metadata(path: Path) -> Any:
    """The tree of array descriptions of one item of a checkpoint."""
    metadata = _reading(path, lambda: ocp.StandardCheckpointHandler().metadata(epath.Path(path)))
    return metadata.tree


def _layer_by_layer(tree: Any) -> Any:
    """How to save a tree: a scanned model's layers in chunks of their own, so that one can be read alone."""

    def of(key: tuple, leaf: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if "layers" in _name(key).split("/") else ())

    return jax.tree_util.tree_map_with_path(of, tree)


def _lazy_array(path: Path, leaf: Any) -> LazyArray:
    """One array of a checkpoint, of its description."""
    # What Orbax writes unless told otherwise: a Zarr array in an OCDBT database.
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{leaf.name}/"},
        "fill_missing_data_reads": False,
    }

    def read(index: Index) -> np.ndarray:
        spans = tuple(slice(*ends) for ends in bounds(index, leaf.shape))
        return _reading(path, lambda: tensorstore.open(spec, open=True).result()[spans].read().result())

    return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), read, f"{path}: {leaf.name}")


def check_shapes(path: Path, saved: Any, wanted: Any) -> None:
    """Raises BadInput naming the first array of two trees that the other has not in that shape."""
    saved, wanted = (
        {_name(key): tuple(leaf.shape) for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (saved, wanted)
    )
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            found, expected = saved.get(name, "missing"), wanted.get(name, "none")
            raise BadInput(
                f"{path}: {name} is {found}, this model makes it {expected}; was it another model?"
            )


def _name(key: tuple) -> str:
    # Orbax stores named tuples as dicts and tuples as lists: the same place is called differently.
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key)


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, with whatever a damaged checkpoint makes Orbax raise turned into BadInput."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: None if "loop is closed" in str(event.exc_value) else report(event)
    try:
        with _orbax_silent():
            value = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # too large for this machine, which is no damage
    except Exception as error:  # Orbax raises anything, bare Exception too
        # The reads of other arrays fail later and into the void; without the hook above, which stays,
        # and this, their errors would follow ours on stderr.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = str(error.__cause__ or error).split(" [tensorstore_spec", 1)[0]
        step = next(folder for folder in (path, *path.parents) if folder.parent.name == FOLDER)
        raise BadInput(
            f"{path}: damaged checkpoint ({reason}); delete {step} to use the one before"
        ) from None
    sys.unraisablehook = report
    return value


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """Orbax logs about missing files before it raises; the exception is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
