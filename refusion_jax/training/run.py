"""The configuration of a training run, and the tokenizer, examples and mask token that follow from it."""

import dataclasses
import functools
from collections.abc import Callable

from refusion_jax.config import DTYPES
from refusion_jax.data.examples import Examples
from refusion_jax.data.pipeline import DataConfig, load_examples, load_examples_in_worker, open_tokenizer
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.transformer import REMAT_POLICIES
from refusion_jax.sharding import MeshConfig
from refusion_jax.tokenizer import Tokenizer
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.weights.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and starting point of a run.

    Attributes:
      steps: number of updates of the whole run.
      batch_size: rows per update, over all devices; a row holds one example, or several with data.packing.
      save_every: steps between checkpoints; the last step is always saved.
      log_every: steps between rows of metrics.csv; the last step always has one.
      microbatches: parts into which a batch is split, computed one after another to save memory.
      keep: number of newest good checkpoints that are kept. A checkpoint is good once a step from it was
        finite; until then the newest is kept besides.
      max_bad_steps: steps in a row with a loss or gradient that is not finite after which the run stops.
      seed: seed of the initial parameters, the order of the data and the noise.
      dtype: dtype of activations and matrix products, "float32" or "bfloat16"; parameters are float32.
      remat: activations that a layer keeps for the backward pass: "none" keeps all, "dots" the results of
        matrix products and of attention, "full" nothing but the layer's input.
      loss_chunks: parts of a row whose logits are computed one after another to save memory; must divide
        data.max_length.
      scan_layers: compile one layer and loop over it, instead of compiling every layer.
      init_from: model folder whose weights the run starts from; empty starts from random parameters.
      first_batch: number of the batch of data that the first step takes, counted in batches of this run; for
        a run that goes on with the data of the run in init_from.
      teacher: model folder of a left-to-right model with the same vocabulary, whose predictions replace part
        of the labels; used if distill_weight is above 0.
      distill_weight: share of the teacher in the loss of a token, in [0, 1]; 0 trains without it.
      distill_top_k: number of the teacher's most probable tokens that are compared one by one; all others are
        compared as one.
      tokenizer: folder of the tokenizer; empty takes the tokenizer of init_from, or bytes if that is empty.
      wandb_project: project of Weights & Biases that also receives the metrics; empty sends none.
    """

    steps: int
    batch_size: int
    save_every: int
    log_every: int
    microbatches: int = 1
    keep: int = 3
    max_bad_steps: int = 10
    seed: int = 0
    dtype: str = "float32"
    remat: str = "none"
    loss_chunks: int = 1
    scan_layers: bool = False
    init_from: str = ""
    first_batch: int = 0
    teacher: str = ""
    distill_weight: float = 0.0
    distill_top_k: int = 64
    tokenizer: str = ""
    wandb_project: str = ""

    def __post_init__(self):
        counts = ("steps", "batch_size", "save_every", "log_every", "microbatches", "keep", "loss_chunks")
        for name in (*counts, "distill_top_k", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.first_batch < 0:
            raise ValueError(f"first_batch must be at least 0, got {self.first_batch}")
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight must be in [0, 1], got {self.distill_weight}")
        for name, known in (("dtype", DTYPES), ("remat", REMAT_POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The sections of a configuration file, and its fields outside sections.

    Attributes:
      objective: training objective: "refusion", or a baseline: "ar", "mdm" or "bd3".
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    diffusion: DiffusionConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: str = "refusion"

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise BadInput(f"objective: must be one of {', '.join(OBJECTIVES)}, found {self.objective!r}")
        if self.diffusion.ar_share and self.objective != "refusion":
            raise BadInput(
                f"diffusion.ar_share: must be 0 unless objective is refusion, found "
                f"{self.diffusion.ar_share} and {self.objective}"
            )
        if self.train.distill_weight and (self.objective != "refusion" or not self.train.teacher):
            raise BadInput(
                f"train.distill_weight: is {self.train.distill_weight}, which needs train.teacher and the "
                f"objective refusion, found {self.train.teacher!r} and {self.objective}"
            )
        filled, block_len = self.data.eos_multiple, self.diffusion.block_len
        if self.objective == "bd3" and filled != 1 and filled % block_len:
            raise BadInput(
                f"data.eos_multiple: must be 1 or a multiple of diffusion.block_len, {block_len}, "
                f"found {filled}"
            )
        if self.lora.rank and not self.train.init_from:
            raise BadInput(
                f"lora.rank: is {self.lora.rank}, which needs train.init_from, the model to adapt; found none"
            )
        if self.diffusion.text_order_share and self.objective != "refusion":
            raise BadInput(
                f"diffusion.text_order_share: must be 0 for the objective {self.objective!r}, "
                f"found {self.diffusion.text_order_share}"
            )
        if self.lora.only_masks and not (self.lora.rank and self.objective == "refusion"):
            raise BadInput(
                "lora.only_masks: needs a lora.rank of at least 1 and the objective refusion, "
                f"found lora.rank {self.lora.rank} and objective {self.objective!r}"
            )


def run_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer of a run. Raises BadInput if it has ids outside the model's vocabulary."""
    tokenizer = open_tokenizer(_tokenizer_folder(run))
    highest = max(tokenizer.vocab_size - 1, *tokenizer.special.roles().values())
    if highest >= run.model.vocab_size:
        raise BadInput(
            f"model.vocab_size: must be above {highest}, the tokenizer's highest id, "
            f"found {run.model.vocab_size}"
        )
    return tokenizer


def run_examples(run: RunConfig, tokenizer: Tokenizer) -> Examples:
    """The examples of a run, encoded by its tokenizer; BadInput as in `load_examples`."""
    return load_examples(run.data, tokenizer, run.train.seed)


def worker_examples(run: RunConfig) -> Callable[[], Examples]:
    """A picklable function that gives the same examples in a worker process.

    It holds no part of the run but the data's, so that a worker that unpickles it imports no model code.
    """
    return functools.partial(load_examples_in_worker, run.data, _tokenizer_folder(run), run.train.seed)


def mask_id(run: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The id of the mask token; None for the objective "ar", which uses none.

    Raises:
      BadInput: the objective needs a mask token and the tokenizer has none.
    """
    return None if run.objective == "ar" else tokenizer.need_mask()


def _tokenizer_folder(run: RunConfig) -> str | None:
    return run.train.tokenizer or run.train.init_from or None
