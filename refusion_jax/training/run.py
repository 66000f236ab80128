"""The configuration of a training run, and the tokenizer, mask token and examples that follow from it."""

import dataclasses

from refusion_jax.data.examples import Examples
from refusion_jax.data.pipeline import DataConfig, open_examples
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.config import DTYPES, ModelConfig
from refusion_jax.model.transformer import REMAT_POLICIES
from refusion_jax.sharding import MeshConfig
from refusion_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.weights.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
      steps: updates in all.
      batch_size: rows an update, over all devices: of one example each, or of several with data.packing.
      save_every: steps between checkpoints; the last step is always saved.
      log_every: steps between rows of metrics.csv; the last step always has one.
      microbatches: parts a batch is computed in, one after the other, to save memory.
      keep: newest checkpoints that are kept.
      seed: of parameters, data order and noise.
      dtype: of activations and matrix products, "float32" or "bfloat16"; parameters are float32.
      remat: what a layer keeps for the backward pass, "none" (everything), "dots" or "full" (nothing).
      loss_chunks: parts the logits of a row are computed in, to save memory; divides data.max_length.
      scan_layers: compile one layer and loop over it, instead of all layers in a row.
      init_from: Hugging Face model folder to start from; empty starts from random parameters.
      tokenizer: folder with the tokenizer; empty takes that of init_from, or bytes without one.
      wandb_project: of Weights & Biases, where metrics go too; empty leaves that out.
    """

    steps: int
    batch_size: int
    save_every: int
    log_every: int
    microbatches: int = 1
    keep: int = 3
    seed: int = 0
    dtype: str = "float32"
    remat: str = "none"
    loss_chunks: int = 1
    scan_layers: bool = False
    init_from: str = ""
    tokenizer: str = ""
    wandb_project: str = ""

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_every", "log_every", "microbatches", "keep", "loss_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("dtype", DTYPES), ("remat", REMAT_POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A configuration file: its sections, and what stands above them.

    Attributes:
      objective: what the model is trained to do, "refusion", or one of the baselines "ar", "mdm" and "bd3".
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

    @property
    def tokenizer_folder(self) -> str:
        """The folder with the tokenizer; empty for bytes."""
        return self.train.tokenizer or self.train.init_from


def run_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
      BadInput: the tokenizer cannot be read, or has ids beyond the model's vocabulary.
    """
    tokenizer = load_tokenizer(run.tokenizer_folder) if run.tokenizer_folder else ByteTokenizer()
    highest = max(tokenizer.vocab_size - 1, *tokenizer.special.roles().values())
    if highest >= run.model.vocab_size:
        raise BadInput(
            f"model.vocab_size: must be above {highest}, the tokenizer's highest id, "
            f"found {run.model.vocab_size}"
        )
    return tokenizer


def mask_id(run: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The mask token of a run, None if its objective needs none; BadInput when it is missing."""
    return None if run.objective == "ar" else tokenizer.need_mask()


def run_examples(run: RunConfig) -> Examples:
    """The examples of a run; errors as those of `load_examples`."""
    return open_examples(run.data, run.tokenizer_folder, run.train.seed)
