"""Checkpoints of a training run; the only file that imports Orbax.

    DIR/checkpoints/STEP/params      parameters, sharded
    DIR/checkpoints/STEP/optimizer   step and optimizer state
    DIR/checkpoints/STEP/data        state of the data iterator, and checksums of all arrays, JSON

STEP is the number of updates done. A checkpoint is written under a temporary name and renamed when it is
complete, and renamed again before it is deleted. In a bucket it is written in place, an object MARKER makes
it complete, and that is deleted before the rest. So a directory STEP (with its MARKER) is always a complete
checkpoint, no matter when the process is killed. Arrays that are read are compared with their checksums
(checksums.py), but for those of which a process reads a part.
"""

import contextlib
import logging
import os
import re
import shutil
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

from refusion_jax import errors
from refusion_jax.buckets import absolute, files_below, is_remote, location
from refusion_jax.checkpoints.checksums import checksum, checksums
from refusion_jax.errors import BadInput, Failed
from refusion_jax.weights.lazy import Index, LazyArray, bounds

FOLDER = "checkpoints"
OUTDATED = ".outdated"  # folder of old checkpoints that are to be deleted
MARKER = "commit_success.txt"  # Orbax's name
DAMAGED = "damaged"  # folder of the run with checkpoints that could not be restored
CHECKSUMS = "checksums"  # in the item "data": name of an array -> its checksum
OF_THE_DISK = re.compile("(" + "|".join(os.strerror(number) for number in errors.OF_THE_DISK) + ")")
CHUNK_BYTES = 2**24  # of a converted array, read and decompressed at a time
BATCH_BYTES = 2**26  # of converted arrays, written at a time; one more array may exceed it
APPEARS_SECONDS = 60  # longest wait until a process sees a folder made by process 0; NFS may take 30 s


class Checkpoints:
    """Saves and restores the checkpoints of one training run. All processes of the run call its methods.

    A checkpoint is *good* once a step from it was finite, which the run tells by `prove`. Good ones are
    never deleted for one that is not proven yet.

    Args:
      folder: DIR, the folder of the run, on a file system shared by all processes.
      keep: number of newest good checkpoints that are kept; older ones are deleted.

    Raises:
      BadInput: process 0 created a folder that this process does not see.
      Failed: a checkpoint could not be written, from the method that notices it.

    Attributes:
      steps: of the checkpoints that are there, ascending.
      good_step: of the newest good one; None if there is none.
    """

    def __init__(self, folder: str | Path, keep: int):
        self._folder = absolute(folder)
        self._keep = keep
        self._has_failed = False
        self._silent = contextlib.ExitStack()
        options = ocp.CheckpointManagerOptions(todelete_subdir=OUTDATED, cleanup_tmp_directories=True)
        with _orbax_silent():
            self._manager = ocp.CheckpointManager(self._folder / FOLDER, options=options)
        deadline = time.monotonic() + APPEARS_SECONDS
        while not is_remote(folder) and not (self._folder / FOLDER).is_dir():
            if time.monotonic() > deadline:
                raise BadInput(f"{self._folder}: must be on a disk that all processes see")
            time.sleep(0.5)
        self._delete_leftovers()
        self.steps = sorted(self._manager.all_steps())
        self.good_step = self.steps[-2] if len(self.steps) > 1 else None

    def __enter__(self) -> "Checkpoints":
        self._silent.enter_context(_orbax_silent())  # saves run, and fail, in the background
        return self

    def __exit__(self, kind, *error) -> None:
        # An exception that is on its way says more than one of closing.
        with contextlib.suppress(Failed) if kind else contextlib.nullcontext():
            self._writing(self._manager.close)
        self._delete_leftovers()
        if not self._has_failed:  # else other writes of the same save fail later
            self._silent.close()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, a save in progress included; None if there is no checkpoint.

        All processes must call this. They get the answer of process 0, since a network file system may show
        the others an older state.
        """
        step = self._manager.latest_step()
        agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if agreed < 0 else agreed

    def save(self, step: int, trees: Mapping[str, Any], data: Any) -> None:
        """Saves a checkpoint in the background. All processes must call this.

        Waits for a save in progress to finish first. The arrays and `data` may change once this returns.

        Args:
          step: number of updates done.
          trees: item ("params", "optimizer") -> tree of arrays.
          data: state of the data iterator, JSON. It is the same in all processes, so that a run can resume
            with another number of processes.
        """
        self._delete_outdated()
        items = {name: ocp.args.StandardSave(tree, _layer_by_layer(tree)) for name, tree in trees.items()}
        # Waits for the state, which the next step overwrites.
        found = jax.device_get({name: checksums(tree) for name, tree in trees.items()})
        data = data | {CHECKSUMS: {_name(key): int(leaf) for key, leaf in _leaves(found)}}
        args = ocp.args.Composite(**items, data=ocp.args.JsonSave(data))
        self._writing(lambda: self._manager.save(step, args=args, force=True))
        self.steps.append(step)

    def prove(self, before: int) -> None:
        """Notes that the checkpoints of steps below `before` are good: the step `before` was finite."""
        if self.steps and self.steps[-1] < before:
            self.good_step = self.steps[-1]

    def finish(self) -> None:
        """Waits for the last save, of a run that has ended well, and deletes what is over `keep` then."""
        self._delete_outdated()

    def restore(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Restores the trees and the state of the data iterator saved at `step`.

        Args:
          step: step of the checkpoint.
          trees: item -> tree of ShapeDtypeStructs, with the shardings of the result.

        Raises:
          BadInput: the checkpoint is damaged or has other shapes.
        """
        folder = self._folder / FOLDER / str(step)
        saved = {name: _metadata(folder / name) for name in trees}
        for name, tree in trees.items():
            check_shapes(folder / name, saved[name], tree)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        restored = _reading(folder, lambda: self._manager.restore(step, args=args))
        data, trees = restored["data"], {name: restored[name] for name in trees}
        _check_checksums(folder, trees, saved, data.pop(CHECKSUMS, {}))
        return trees, data

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to DIR/damaged/STEP. All processes must call this."""
        if jax.process_index() == 0:
            aside = self._folder / DAMAGED
            aside.mkdir(exist_ok=True)
            _move(self._folder / FOLDER / str(step), aside / f"{step}-{time.time_ns()}")
        multihost_utils.sync_global_devices("set_aside")
        self._manager.reload()
        self.steps = sorted(self._manager.all_steps())

    def _writing(self, write: Callable[[], Any]) -> None:
        """Calls `write`, and turns what Orbax raises for a save that failed into Failed."""
        try:
            write()
        except Exception as error:
            self._has_failed = True
            complete = latest_step(self._folder)
            kept = "no checkpoint is complete" if complete is None else f"checkpoint {complete} is complete"
            raise Failed(
                f"{self._folder / FOLDER}: a checkpoint could not be written ({_reason(error)}); {kept}"
            ) from None

    # Orbax moves an old checkpoint into OUTDATED by one rename and leaves it there. If it were deleted in
    # place, a kill in the middle would leave half a checkpoint under its final name.

    def _delete_outdated(self) -> None:
        self._writing(self._manager.wait_until_finished)  # before that, the newest is not complete
        for step in self.steps[: -self._keep]:
            self._writing(lambda step=step: self._delete(step))
        self.steps = self.steps[-self._keep :]
        outdated = self._folder / FOLDER / OUTDATED
        if is_remote(outdated):
            return
        if jax.process_index() == 0 and outdated.exists():
            renamed = outdated.rename(f"{outdated}-{time.time_ns()}")
            threading.Thread(target=shutil.rmtree, args=(renamed, True)).start()

    def _delete(self, step: int) -> None:
        if is_remote(self._folder) and jax.process_index() == 0:
            (self._folder / FOLDER / str(step) / MARKER).unlink(missing_ok=True)
        self._manager.delete(step)

    def _delete_leftovers(self) -> None:
        if jax.process_index() == 0 and not is_remote(self._folder):
            for leftover in (self._folder / FOLDER).glob(f"{OUTDATED}*"):
                shutil.rmtree(leftover, ignore_errors=True)


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest checkpoint in DIR; None if there is no checkpoint."""
    path = location(folder) / FOLDER
    return max(ocp.utils.checkpoint_steps(path), default=None) if path.is_dir() else None


def saved_params(folder: str | Path) -> dict[str, Any]:
    """The parameters of the newest checkpoint in DIR: nested dict of LazyArray, nothing read yet.

    Raises:
      BadInput: DIR has no checkpoint, or it is damaged. Reading an array raises it too.
    """
    step = _newest(folder)
    wanted = _read_checksums(step)
    return jax.tree_util.tree_map_with_path(
        lambda key, leaf: _lazy_array(step / "params", leaf, wanted.get(f"params/{_name(key)}")),
        _metadata(step / "params"),
    )


def write_params(folder: str | Path, params: Any) -> None:
    """Writes DIR/checkpoints/0 with parameters only, a few arrays in memory at a time (BATCH_BYTES).

    Reads every array twice, because checksums are stored before what they are of.

    Args:
      folder: DIR, without checkpoints.
      params: nested dict of LazyArray.

    Raises:
      BadInput: an array cannot be read.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    item = ocp.args.PyTreeSave(params, save_args=chunks)
    found = {f"params/{_name(key)}": checksum(leaf.whole()) for key, leaf in _leaves(params)}
    path = absolute(folder) / FOLDER
    with _orbax_silent():
        registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
        }
        with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
            data = ocp.args.JsonSave({CHECKSUMS: found})
            manager.save(0, args=ocp.args.Composite(params=item, data=data))


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler for LazyArrays: reads a few at a time and saves them as numpy arrays."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        batch = []  # every write waits for the disk, so small arrays are written together
        for item in zip(values, infos, args, strict=True):
            batch.append(item)
            if sum(value.nbytes for value, _, _ in batch) > BATCH_BYTES or item[0] is values[-1]:
                lazy, *rest = zip(*batch, strict=True)
                for written in await super().serialize([value.whole() for value in lazy], *rest):
                    written.result()
                batch = []
        return []


def _move(folder: Path, target: Path) -> None:
    """Renames a folder; in a bucket copies it, and deletes the marker before the rest."""
    if not is_remote(folder):
        folder.rename(target)
        return
    for path in files_below(folder):
        target.joinpath(*path.relative_to(folder).parts).write_bytes(path.read_bytes())
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmtree()


def _newest(folder: str | Path) -> Path:
    step = latest_step(folder)
    if step is None:
        raise BadInput(f"{location(folder) / FOLDER}: holds no checkpoint")
    return absolute(folder) / FOLDER / str(step)


def _metadata(path: Path) -> Any:
    """The metadata of one item of a checkpoint: a tree of array descriptions."""
    metadata = _reading(path, lambda: ocp.StandardCheckpointHandler().metadata(epath.Path(path)))
    return metadata.tree


def _layer_by_layer(tree: Any) -> Any:
    """SaveArgs that store each layer of a scanned model in its own chunks, so that it can be read alone."""

    def of(key: tuple, leaf: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if "layers" in _name(key).split("/") else ())

    return jax.tree_util.tree_map_with_path(of, tree)


def _read_checksums(step: Path) -> dict[str, int]:
    """The checksums in a checkpoint; none in one of an older version."""
    path = step / "data"
    if not path.is_dir():
        return {}
    data = _reading(path, lambda: ocp.JsonCheckpointHandler().restore(epath.Path(path)))
    return data.get(CHECKSUMS, {})


def _check_checksums(folder: Path, trees: Any, saved: Any, wanted: Mapping[str, int]) -> None:
    """Raises BadInput that names the first array whose checksum is not that of the checkpoint."""
    found = jax.device_get(checksums(trees))
    dtypes = {_name(key): leaf.dtype for key, leaf in _leaves(saved)}
    for (key, ours), (_, leaf) in zip(_leaves(found), _leaves(trees), strict=True):
        name = _name(key)
        if name in wanted and dtypes[name] == leaf.dtype and wanted[name] != int(ours):
            raise Damaged(folder, f"{name} is not what was saved")


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _lazy_array(path: Path, leaf: Any, wanted: int | None) -> LazyArray:
    """One array of a checkpoint as a LazyArray, from its description `leaf` and its checksum."""
    base = f"{path}/" if is_remote(path) else f"file://{path}/"
    # The default format of Orbax: a Zarr array in an OCDBT database.
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{leaf.name}/"},
        "fill_missing_data_reads": False,
    }

    def read(index: Index) -> np.ndarray:
        spans = tuple(slice(*ends) for ends in bounds(index, leaf.shape))
        array = _reading(path, lambda: tensorstore.open(spec, open=True).result()[spans].read().result())
        if wanted is not None and array.shape == tuple(leaf.shape) and checksum(array) != wanted:
            raise Damaged(path, f"{leaf.name} is not what was saved")
        return array

    return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), read, f"{path}: {leaf.name}")


def check_shapes(path: Path, saved: Any, wanted: Any) -> None:
    """Raises BadInput that names the first array that is not in both trees with the same shape."""
    saved, wanted = (
        {_name(key): tuple(leaf.shape) for key, leaf in _leaves(tree)} for tree in (saved, wanted)
    )
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            found, expected = saved.get(name, "missing"), wanted.get(name, "none")
            raise BadInput(
                f"{path}: {name} is {found}, this model makes it {expected}; was it another model?"
            )


def _name(key: tuple) -> str:
    # Orbax stores named tuples as dicts and tuples as lists, so the key of an entry has another type.
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key)


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """Calls `read`, and turns any exception that Orbax raises for a damaged checkpoint into BadInput."""
    try:
        with _orbax_silent():
            return read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # not damage: too large for this machine
    except Exception as error:  # Orbax raises many kinds, bare Exception too
        raise Damaged(path, _reason(error)) from None


class Damaged(BadInput):
    """A checkpoint that cannot be read, or is not what was saved.

    Attributes:
      what: the damage, without what to do about it.
    """

    def __init__(self, path: Path, reason: str):
        step = next(folder for folder in (path, *path.parents) if folder.parent.name == FOLDER)
        self.what = f"{path}: damaged checkpoint ({reason})"
        super().__init__(f"{self.what}; delete {step} to use the one before")


def _reason(error: BaseException) -> str:
    """What an exception of Orbax says, in one line: the system's own words, or all but specifications."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec", 1)[0].split())
    of_the_system = re.search(r": ([^:]+) \[os_error_code=", text) or OF_THE_DISK.search(text)
    return of_the_system[1] if of_the_system else text or type(error).__name__


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """A context in which Orbax prints nothing; what it raises says the same.

    It logs missing files before it raises for them. After an exception the other reads and writes fail
    later, in the background, so the context stays in force then.
    """
    hook, filters = sys.unraisablehook, [(name, _FromOrbax(name)) for name in ("absl", "asyncio")]
    sys.unraisablehook = lambda event: None if "loop is closed" in str(event.exc_value) else hook(event)
    for name, drop in filters:
        logging.getLogger(name).addFilter(drop)
    yield
    sys.unraisablehook = hook
    for name, drop in filters:
        logging.getLogger(name).removeFilter(drop)


class _FromOrbax(logging.Filter):
    """Drops what Orbax logs, under its own name or that of its event loops."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != "asyncio" and "orbax" not in record.pathname
