"""Every file in configs/: it loads, its state has a place on a mesh, and its text says how to run it."""

import ast
import math
from pathlib import Path

import jax
import pytest

from refusion_jax import config
from refusion_jax.sharding import make_mesh
from refusion_jax.training.run import RunConfig
from refusion_jax.training.step import make_program

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("configs/*.py"))
PARAMETERS = {
    "tiny": 140_160,
    "small": 5_576_960,
    "comparison": 134_516_160,
    "smollm2_135m": 134_516_160,  # and two tokens more than the original
    "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_state_on_eight_devices(path):
    run = config.load(path, [], RunConfig)
    mesh = make_mesh(run.mesh)
    state = make_program(run, mesh, mask_id=0).state
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[path.stem]
    for place, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding), place
        split = math.prod(leaf.sharding.shard_shape(leaf.shape)) < leaf.size
        # What is small may lie everywhere: norms over heads, counters.
        assert split or run.mesh.fsdp == 1 or leaf.size <= 36 * 128, place


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_text_has_its_command(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python -m refusion_jax.train --config=configs/{path.name} --workdir=runs/{path.stem}" in text
