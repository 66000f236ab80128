"""The teacher of a run: a frozen left-to-right model whose predictions replace part of the hard labels.

`diffusion.distillation` says what it reads and `diffusion.cross_entropy` how its predictions enter the loss.
Its parameters are an argument of the compiled step beside the state, sharded by the same rules as the
student's and stored in `train.dtype`. They are not saved in checkpoints; the run's folder has their digest.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from refusion_jax import loader, sharding
from refusion_jax.buckets import location
from refusion_jax.checkpoints import hugging_face
from refusion_jax.diffusion.cross_entropy import SoftTargets
from refusion_jax.diffusion.distillation import Lesson
from refusion_jax.errors import BadInput
from refusion_jax.files import read_text
from refusion_jax.model.attention import fitting_kernel
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.transformer import Transformer
from refusion_jax.sharding import Layout
from refusion_jax.tokenizer import Tokenizer, load_tokenizer
from refusion_jax.training.run import RunConfig

Array = jax.Array

DIGEST_FILE = "teacher.sha256"
# Letters, digits, spaces and other scripts: tokenizers that differ give other ids.
PROBE = "The 12 quick foxes, x_1 = {3.14};\n\tπ ≈ 3, größer, 日本語."


class Teacher(NamedTuple):
    """A teacher on a mesh.

    Attributes:
      model: the model in the run's dtype.
      layout: mesh and shardings of its parameters.
      params: its parameters; abstract, with shardings, until they are loaded.
    """

    model: Transformer
    layout: Layout
    params: Any

    def soft_targets(self, lesson: Lesson, packed: bool, weight: float, top_k: int) -> SoftTargets:
        """Its predictions for a batch.

        Args:
          lesson: the batch in text order.
          packed: whether rows hold several examples.
          weight: share of the teacher in the loss of the tokens that it teaches.
          top_k: as in SoftTargets.
        """
        segments = lesson.segments if packed else None
        with self.layout.scope(), jax.named_scope("teacher"):
            states, _ = self.model.apply(
                {"params": self.params}, lesson.tokens, lesson.positions, segments=segments, method="hidden"
            )
            head = self.model.apply({"params": self.params}, method="unembedding")
        states = jnp.take_along_axis(states, lesson.reading[..., None], axis=1)
        return SoftTargets(states, head, weight * lesson.taught.astype(jnp.float32), top_k)


def teacher_config(run: RunConfig) -> ModelConfig | None:
    """The shape of the teacher; None for a run without one.

    Raises:
      BadInput: the folder holds no model that can be read, or its vocabulary has another size.
    """
    if not run.train.distill_weight:
        return None
    config = hugging_face.read_config(run.train.teacher)
    if config.vocab_size != run.model.vocab_size:
        raise BadInput(
            f"train.teacher: {run.train.teacher} has a vocabulary of {config.vocab_size} tokens, must be "
            f"model.vocab_size, {run.model.vocab_size}"
        )
    return config


def make_teacher(run: RunConfig, mesh: Mesh) -> Teacher | None:
    """The teacher with abstract parameters; None for a run without one. Raises as `teacher_config`."""
    config = teacher_config(run)
    if config is None:
        return None
    dtype = jnp.dtype(run.train.dtype)
    model = Transformer(
        config,
        dtype,
        dtype,
        run.train.scan_layers,
        kernel=fitting_kernel(mesh.devices.flat[0].platform, dtype, config.head_dim, run.data.max_length),
        max_segments=run.data.max_examples_per_row + 1,  # one more, for padding
    )
    boxed = loader.boxed_params(model)
    layout = sharding.layout(boxed, mesh)
    return Teacher(model, layout, sharding.with_shardings(sharding.unbox(boxed), layout.shardings))


def load_teacher(run: RunConfig, abstract: Any) -> Any:
    """The parameters of the teacher, in the structure, dtypes and shardings of `abstract`."""
    folder = run.train.teacher
    return loader.load_params(folder, hugging_face.read_config(folder), abstract)


def check_vocabulary(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises BadInput if the teacher of a run has a tokenizer that gives other ids than the run's."""
    if not run.train.distill_weight:
        return
    ours, theirs = tokenizer.encode(PROBE), load_tokenizer(run.train.teacher).encode(PROBE)
    if ours != theirs:
        raise BadInput(
            f"train.teacher: the tokenizer of {run.train.teacher} must give the ids of the run's, gives "
            f"{theirs[:8]}… for {PROBE[:12]!r}…, not {ours[:8]}…"
        )


def digest(folder: str | Path) -> str:
    """The SHA-256 of a model folder's config.json and weight files, their names included."""
    folder, total = location(folder), hashlib.sha256()
    for path in [folder / "config.json", *loader.weight_files(folder)]:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def check_same_teacher(folder: Path, run: RunConfig, found: str) -> None:
    """Raises BadInput if the run in `folder` was taught by another teacher than the one of digest `found`."""
    stored = read_text(folder / DIGEST_FILE).strip()
    if stored != found:
        raise BadInput(
            f"train.teacher: {run.train.teacher} has the SHA-256 {found[:12]}…, the teacher of the run in "
            f"{folder} had {stored[:12]}…; give that teacher or choose another --workdir"
        )
