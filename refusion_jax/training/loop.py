"""A whole training run: opens or resumes its folder, takes the steps, saves checkpoints, reports metrics.

A run leaves in its folder DIR: config.yaml (the run), config.json and the tokenizer (the model),
checkpoints/STEP, metrics.csv and TensorBoard events.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from refusion_jax import config, loader, sharding
from refusion_jax.buckets import is_remote, location
from refusion_jax.checkpoints import hugging_face
from refusion_jax.checkpoints.orbax_io import Checkpoints, Damaged
from refusion_jax.compilation import use_compilation_cache
from refusion_jax.data.batches import Batches
from refusion_jax.data.examples import Examples, Identity
from refusion_jax.data.pipeline import DataConfig, batch_iterator, row_use
from refusion_jax.errors import BadInput, Failed, Stopped
from refusion_jax.files import write_atomically
from refusion_jax.model.config import ModelConfig
from refusion_jax.tokenizer import Tokenizer
from refusion_jax.training import teacher
from refusion_jax.training.guard import Guard, Spikes
from refusion_jax.training.lock import Lock, sole_writer
from refusion_jax.training.metrics import Reporter, check_wandb
from refusion_jax.training.profiling import Profile
from refusion_jax.training.run import RunConfig, mask_id, run_examples, run_tokenizer, worker_examples
from refusion_jax.training.signals import Preemption
from refusion_jax.training.step import Program, TrainState, make_program
from refusion_jax.training.wall_time import WallTime
from refusion_jax.weights import lora
from refusion_jax.weights.lora import LoraConfig

CONFIG_FILE = "config.yaml"

# A resumed run must keep these fields and its objective: they determine the shape of its state, the numbering
# of its batches and what config.json says of its model.
MUST_NOT_CHANGE = {
    "model": [field.name for field in dataclasses.fields(ModelConfig)],
    # Data are the same by content, see `_check_same_data`, wherever they are and whoever prepares them.
    "data": [
        field.name
        for field in dataclasses.fields(DataConfig)
        if field.name not in ("workers", "paths", "max_broken_share")
    ],
    "train": ["batch_size", "seed", "scan_layers", "first_batch", "distill_weight", "distill_top_k"],
    "diffusion": ["ar_share"],
    "lora": [field.name for field in dataclasses.fields(LoraConfig)],
}

# Defaults for runs saved before these fields existed.
DEFAULTS_OF_OLD_RUNS = {
    "objective": "refusion",
    "data": {"eos_multiple": 1, "eos_extra_blocks": 0},
    "train": {"first_batch": 0, "distill_weight": 0.0, "distill_top_k": 64},
    "diffusion": {"ar_share": 0.0},
    "lora": {"rank": 0, "only_masks": False},
}


class Services(NamedTuple):
    """What the loop uses besides the program and the data.

    Attributes:
      lock: of DIR; another run may have taken it over.
      checkpoints: saves states.
      preemption: whether SIGTERM or SIGINT was received, the same answer in all processes.
      guard: notes steps that were not finite.
      wall_time: the seconds of this process, by what they were spent on.
      profile: traces some of the steps.
      reporter: writes metrics; None in all processes but the first.
      teacher: the parameters of the teacher, the last argument of the step; empty without one.
    """

    lock: Lock
    checkpoints: Checkpoints
    preemption: Preemption
    guard: Guard
    wall_time: WallTime
    profile: Profile
    reporter: Reporter | None
    teacher: tuple[Any, ...]


def run_training(
    run: RunConfig,
    workdir: str | Path,
    profile_steps: range = range(0),
    accept_changed_data: bool = False,
) -> int:
    """Trains to `run.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      run: the configuration.
      workdir: DIR.
      profile_steps: the steps to trace, into DIR/profile.
      accept_changed_data: resume also if the examples are not those that the run had.

    Returns:
      0, or that of `Preemption` after SIGTERM or SIGINT: the current step was finished and saved first.

    Raises:
      BadInput: the configuration, its data or the contents of `workdir` cannot be used.
      Stopped: another run uses `workdir`, its data changed, or too many steps in a row were not finite.
      Failed: a checkpoint could not be written.
    """
    wall_time = WallTime()
    use_compilation_cache()
    check_wandb(run.train.wandb_project)
    tokenizer = run_tokenizer(run)
    mesh = sharding.make_mesh(run.mesh)
    program = make_program(run, mesh, mask_id(run, tokenizer))
    teacher.check_vocabulary(run, tokenizer)
    examples = run_examples(run, tokenizer)
    batches = batch_iterator(
        examples,
        run.train.batch_size,
        *sharding.row_group(mesh),
        workers=run.data.workers,
        open_examples=worker_examples(run),
    )
    folder = _open_folder(workdir)
    with (
        sole_writer(folder) as lock,
        Checkpoints(folder, run.train.keep) as checkpoints,
        Preemption() as preemption,
        contextlib.closing(batches),
    ):
        taught_by = teacher.digest(run.train.teacher) if program.teacher else None
        if checkpoints.latest_step() is not None:
            _check_same_run(folder, run)
            if taught_by is not None:
                teacher.check_same_teacher(folder, run, taught_by)
        restored = _restore_newest(checkpoints, program.state)
        if restored is None:
            done, state = None, first_state(run, program)
            batches.set_state({"next_index": run.train.first_batch})
        else:
            done, state, position = restored
            _check_steps_left(run, folder, done)
            if not accept_changed_data:
                _check_same_data(folder, examples.identity, position.get("data"))
            batches.set_state(position)
        if jax.process_index() == 0:
            _describe(folder, run, tokenizer, taught_by)
            _announce(run, program.state, mesh, done, examples)
            _report_broken_lines(folder, examples)
        with Profile(folder, profile_steps) as profile:
            wall_time.lap("setup")
            with _reporter(run, folder, done or 0, wall_time) as reporter:
                loaded = tuple(teacher.load_teacher(run, abstract) for abstract in program.teacher)
                guard = Guard(folder, run.train.max_bad_steps)
                services = Services(
                    lock, checkpoints, preemption, guard, wall_time, profile, reporter, loaded
                )
                return _take_steps(run, program, state, done or 0, batches, examples.identity, services)


def first_state(run: RunConfig, program: Program) -> TrainState:
    """The state before the first step: random parameters, or the weights in the folder `train.init_from`.

    Raises:
      BadInput: the folder holds no readable model, or a model of another shape.
    """
    folder = run.train.init_from
    if not folder:
        return program.init()
    found = hugging_face.read_config(folder)
    for name in MUST_NOT_CHANGE["model"]:
        ours, theirs = getattr(run.model, name), getattr(found, name)
        if ours != theirs:
            raise BadInput(f"model.{name}: is {ours}, the model in {folder} has {theirs}")
    return program.start(loader.load_params(folder, run.model, program.state.base))


def _take_steps(
    run: RunConfig,
    program: Program,
    state: TrainState,
    done: int,
    batches: Batches,
    data: Identity,
    services: Services,
) -> int:
    """Takes, reports and saves the steps from `done` + 1 to the last; returns the exit code of the run."""
    lock, checkpoints, preemption, guard, wall_time, profile, reporter, taught_by = services
    steps = run.train.steps
    unreported: list[dict[str, jax.Array]] = []
    spikes = Spikes()
    previous: tuple[int, dict[str, jax.Array], np.ndarray] | None = None  # the arguments of `Guard.look`
    is_due = False  # a save that waits for a finite step
    for step in range(done + 1, steps + 1):
        batch = next(batches)
        ids = np.where(batch["total_len"] > 0, batch["example_id"], -1)
        # While the devices are busy with the previous step, waiting for a batch costs nothing.
        wall_time.lap("input" if _is_ready(previous) else "step")
        batch = jax.make_array_from_process_local_data(program.batch_sharding, batch)
        profile.before(step, previous and previous[1])
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = program.step(state, batch, *taught_by)
        profile.after(step, metrics)
        if step == done + 1:
            wall_time.lap("compile")
        unreported.append(metrics)
        # Stay exactly one step ahead of the devices: they never wait for this process, and little is in
        # flight when SIGTERM arrives.
        if previous is not None:
            _judge(guard, checkpoints, *previous)
        previous = step, metrics, ids
        if reporter is not None:
            reporter.advance(step)
        if step % run.train.log_every == 0 or step == steps:
            if reporter is not None:
                taken = jax.device_get(unreported)
                wall_time.lap("step")
                reporter.report(step, taken)
                for line in spikes.lines(step, taken):
                    print(line, file=sys.stderr, flush=True)
            unreported = []
        preempted = preemption.reached(step) and step < steps
        is_due |= preempted or step == steps or step % run.train.save_every == 0
        if is_due:
            # Saved after the rows of metrics.csv up to this step: a resumed run does not repeat them.
            jax.block_until_ready(metrics)  # saving waits for the step; do not count that as saving
            wall_time.lap("step")
            _judge(guard, checkpoints, *previous)
            previous = None
            if not guard.is_bad:
                lock.check()
                if reporter is not None:
                    reporter.flush()
                checkpoints.save(step, _items(state), batches.get_state() | {"data": data._asdict()})
                is_due = False
            wall_time.lap("checkpoint")
        if preempted:
            return _stop(preemption, checkpoints, step, steps)
    if is_due:
        kept = checkpoints.latest_step()
        raise Stopped(
            f"the last step was not finite, so it is not saved; the newest checkpoint is of step {kept}"
        )
    if _is_finite(state.params):
        checkpoints.finish()
    return 0


def _judge(
    guard: Guard, checkpoints: Checkpoints, step: int, metrics: dict[str, jax.Array], ids: np.ndarray
) -> None:
    """Waits for a step; tells guard and checkpoints whether it was finite."""
    guard.look(step, metrics, ids, checkpoints.good_step)
    if not guard.is_bad:
        checkpoints.prove(before=step)


def _stop(preemption: Preemption, checkpoints: Checkpoints, step: int, steps: int) -> int:
    """Says what is saved when a signal ends a run; returns its exit code."""
    saved = checkpoints.latest_step()
    if jax.process_index() == 0:
        what = f"saving step {step} of {steps}" if saved == step else f"step {step} was not finite, not saved"
        print(f"{preemption.name}: {what}, run again to go on", file=sys.stderr)
    return preemption.exit_code


def _check_steps_left(run: RunConfig, folder: Path, done: int) -> None:
    steps = run.train.steps
    if steps < done:
        raise BadInput(f"train.steps: must be at least {done}, which {folder} has reached, found {steps}")


def _reporter(
    run: RunConfig, folder: Path, done: int, wall_time: WallTime
) -> contextlib.AbstractContextManager[Reporter | None]:
    """The Reporter of the first process; None in the others."""
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    settings = config.as_dict(run)
    return Reporter(folder, done, run.train.steps, wall_time, run.train.wandb_project, settings)


def _announce(run: RunConfig, state: TrainState, mesh: Mesh, done: int | None, examples: Examples) -> None:
    """Prints the size of the model, the mesh, where the run begins and how full its rows are."""
    size = f"{_size(state.base):,} parameters"
    if state.frozen:
        size += f" and {_size(state.params):,} that adapt them"
    begin = "from the start" if done is None else f"resuming from step {done} of {run.train.steps}"
    if done is None and run.train.first_batch:
        begin += f", at batch {run.train.first_batch} of the data"
    print(f"{size} on {dict(mesh.shape)}, {begin}", flush=True)
    held, used = row_use(examples)
    print(f"rows of {run.data.max_length} tokens: {held:.1f} examples, {used:.1%} used", flush=True)


def _report_broken_lines(folder: Path, examples: Examples) -> None:
    """Copies the list of the lines of the data that cannot be read into DIR, if there are some."""
    if examples.broken_lines is not None:
        path = folder / "broken_lines.jsonl"
        write_atomically(path, examples.broken_lines.read_bytes())
        print(f"{path}: the broken lines that are skipped", file=sys.stderr, flush=True)


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    """bool []: whether all numbers of the tree are finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _is_ready(previous: tuple[int, dict[str, jax.Array], np.ndarray] | None) -> bool:
    return previous is None or all(array.is_ready() for array in previous[1].values())


def _restore_newest(checkpoints: Checkpoints, state: TrainState) -> tuple[int, TrainState, Any] | None:
    """(step, state, position in the data) of the newest checkpoint that is whole; None without checkpoints.

    Damaged ones are set aside. All processes get the same.

    Raises:
      BadInput: all checkpoints are damaged, or hold another model.
    """
    damaged = None
    while (step := checkpoints.latest_step()) is not None:
        try:
            restored = _restore(checkpoints, step, state)
        except Damaged as error:
            restored, damaged = None, error
        if multihost_utils.process_allgather(np.bool_(restored is not None)).all():
            return step, *restored
        if len(checkpoints.steps) == 1:
            raise damaged or Failed(f"checkpoint {step} could not be restored by another process")
        if jax.process_index() == 0:
            what = f"checkpoint {step}: damaged" if damaged is None else damaged.what
            print(f"{what}: set aside", file=sys.stderr, flush=True)
        checkpoints.set_aside(step)
    return None


def _restore(checkpoints: Checkpoints, step: int, state: TrainState) -> tuple[TrainState, Any]:
    """The state saved at `step`, with the shardings of the abstract `state`, and the position in the data."""
    items, position = checkpoints.restore(step, _items(state))
    saved_step, opt_state = items["optimizer"]
    params, frozen = lora.split(items["params"])
    return TrainState(saved_step, params, opt_state, frozen), position


def _items(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint stores it: all parameters in one tree, readable without the run."""
    params = lora.combine(state.params, state.frozen)
    return {"params": params, "optimizer": (state.step, state.opt_state)}


def _open_folder(workdir: str | Path) -> Path:
    """The run's folder, created if missing; BadInput if it cannot be one."""
    folder = location(workdir)
    try:
        if not is_remote(folder):  # where folders need not be made
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: cannot be made ({error.strerror})") from None
    if (folder / "config.json").exists() and not (folder / CONFIG_FILE).exists():
        raise BadInput(f"--workdir={workdir}: holds a model that no run wrote, choose another folder")
    return folder


def _describe(folder: Path, run: RunConfig, tokenizer: Tokenizer, taught_by: str | None) -> None:
    """Writes the files that resuming and sampling need besides the checkpoints."""
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(config.as_dict(run), sort_keys=False))
    if taught_by is not None:
        write_atomically(folder / teacher.DIGEST_FILE, f"{taught_by}\n")
    tokenizer.save(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad")}
    if len(tokenizer.eos_ids) > 1:
        ids["eos_token_id"] = list(tokenizer.eos_ids)
    hugging_face.write_config(folder, run.model, ids | _how_to_decode(run))


def _how_to_decode(run: RunConfig) -> dict[str, Any]:
    """The fields of config.json that choose how to decode, see `hugging_face.decoding_defaults`."""
    # Left to right, a model with adapters at mask tokens only is the model that it started from.
    reads_left_to_right = run.diffusion.ar_share > 0 or run.lora.only_masks
    fields = {
        "objective": run.objective,
        "first_token": "next" if reads_left_to_right or run.objective == "ar" else "mask",
        "border": "ar",
    }
    if run.objective == "refusion":
        fields["verify"] = "exact" if reads_left_to_right else "threshold"
        fields["slot_sizes"] = list(run.diffusion.slot_sizes)
    if run.objective == "bd3":
        fields["block_len"] = run.diffusion.block_len
    return fields


def _check_same_data(folder: Path, found: Identity, saved: dict[str, Any] | None) -> None:
    """Raises Stopped unless the examples are those of the checkpoint (None in those of older versions)."""
    if saved is None or Identity(**saved) == found:
        return
    had = Identity(**saved)
    raise Stopped(
        f"the data changed: the run in {folder} had {had.examples:,} examples (SHA-256 {had.sha256[:12]}), "
        f"found {found.examples:,} ({found.sha256[:12]}); bring them back, or go on with the new ones by "
        "--accept_changed_data"
    )


def _placeless(value: Any) -> Any:
    """The settings of tasks without the places of their files; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return {name: _placeless(of) for name, of in value.items() if name not in ("path", "test_path")}


def _check_same_run(folder: Path, run: RunConfig) -> None:
    """Raises BadInput naming the first field in which `run` differs from the run in the folder."""
    path = folder / CONFIG_FILE
    try:
        stored = {"lora": {}} | yaml.safe_load(path.read_text())
        old = {"objective": stored.get("objective", DEFAULTS_OF_OLD_RUNS["objective"])}
        for section in MUST_NOT_CHANGE:
            old[section] = DEFAULTS_OF_OLD_RUNS.get(section, {}) | stored[section]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise BadInput(f"{path}: is not the configuration of the run whose checkpoints are here") from None
    new = config.as_dict(run)
    pairs = {"objective": (new["objective"], old["objective"])}
    for section, fields in MUST_NOT_CHANGE.items():
        for field in fields:
            value = new[section][field]
            pairs[f"{section}.{field}"] = _placeless(value), _placeless(old[section].get(field, value))
    for name, (value, before) in pairs.items():
        if before != value:
            raise BadInput(
                f"{name}: is {value!r}, the run in {folder} has {before!r}; "
                "change it back or choose another --workdir"
            )
