"""RoPE scaling against figures of `transformers` 5.23 on PyTorch, and the fields that a scaling requires."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax import config
from refusion_jax.model.rope import RopeScaling, frequencies, rope_tables
from refusion_jax.model.transformer import ModelConfig

HEAD_DIM, THETA = 16, 500000.0
DEEPSEEK = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
EXACT = {
    "rope_type": "yarn",
    "factor": 2.5,
    "original_max_position_embeddings": 1000,
    "truncate": False,
    "attention_factor": 0.75,
}
# (fields, factor of cosines and sines, inv_freq)
RECORDED = [
    (
        None,
        1.0,
        [1.0, 0.19392276, 0.03760603, 0.007292665, 0.0014142134, 0.0002742482, 5.3182957e-05, 1.0313385e-05],
    ),
    (
        {"rope_type": "linear", "factor": 4.0},
        1.0,
        [
            0.25,
            0.04848069,
            0.009401508,
            0.0018231663,
            0.00035355336,
            6.856205e-05,
            1.3295739e-05,
            2.5783463e-06,
        ],
    ),
    (
        LLAMA3,
        1.0,
        [
            1.0,
            0.19392276,
            0.010538231,
            0.00091158313,
            0.00017677668,
            3.4281024e-05,
            6.6478697e-06,
            1.2891732e-06,
        ],
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        1.138629436111989,
        [
            1.0,
            0.19392276,
            0.028204523,
            0.0036463323,
            0.00035355336,
            6.856205e-05,
            1.3295739e-05,
            2.5783463e-06,
        ],
    ),
    (
        DEEPSEEK,
        0.9210423553163399,
        [
            1.0,
            0.19392276,
            0.03760603,
            0.0037374909,
            3.5355337e-05,
            6.8562044e-06,
            1.3295739e-06,
            2.578346e-07,
        ],
    ),
    (
        EXACT,
        0.75,
        [1.0, 0.192709, 0.026691541, 0.0031051731, 0.0005656854, 0.00010969927, 2.1273183e-05, 4.125354e-06],
    ),
]


@pytest.mark.parametrize(("fields", "magnitude", "recorded"), RECORDED)
def test_frequencies_are_those_of_transformers(fields, magnitude, recorded):
    ours, factor = frequencies(HEAD_DIM, THETA, fields and RopeScaling.from_fields(fields))
    assert ours.dtype == np.float32 and factor == pytest.approx(magnitude, rel=1e-15)
    np.testing.assert_array_max_ulp(ours, np.float32(recorded), maxulp=1)


def test_tables_are_those_of_transformers():
    """Also at large positions, where an angle is thousands of turns."""
    tables = rope_tables(jnp.asarray([[7, 30000]]), HEAD_DIM, THETA, RopeScaling.from_fields(DEEPSEEK))
    cos = [
        [
            0.694375932,
            0.195005342,
            0.889313757,
            0.920727193,
            0.921042382,
            0.921042382,
            0.921042382,
            0.921042382,
        ],
        [
            -0.54933685,
            0.786662817,
            -0.865471661,
            0.518679976,
            0.449741423,
            0.901627779,
            0.920309841,
            0.921014845,
        ],
    ]
    sin = [
        [
            0.605112493,
            0.90016222,
            0.2396667,
            0.024093965,
            0.000227946352,
            4.42039854e-05,
            8.57215764e-06,
            1.662336e-06,
        ],
        [
            -0.739288866,
            -0.479041397,
            -0.31508404,
            -0.76111114,
            0.803773403,
            0.188112661,
            0.03672808,
            0.007124227,
        ],
    ]
    np.testing.assert_allclose(tables[0][0, :, 0], cos, rtol=0, atol=1e-6)
    np.testing.assert_allclose(tables[1][0, :, 0], sin, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rope_type": "dynamic"}, "rope_type must be one of linear, llama3, yarn, got 'dynamic'"),
        ({"rope_type": "longrope"}, "rope_type must be one of"),
        ({"rope_type": None}, "rope_type must be one of"),
        ({"factor": None}, "factor is needed for rope_type 'llama3'"),
        ({"low_freq_factor": None}, "low_freq_factor is needed"),
        ({"factor": 0.0}, "factor must be a positive number, got 0.0"),
        ({"factor": "8"}, "factor must be a positive number, got '8'"),
        ({"factor": float("nan")}, "factor must be a positive number"),
        ({"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor, got 1.0 and 1.0"),
        ({"truncate": 1}, "truncate must be true or false, got 1"),
        ({"short_factor": 1.0}, "short_factor is no field of RoPE scaling"),
    ],
)
def test_a_scaling_that_is_not_whole(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        RopeScaling.from_fields(LLAMA3 | change)


def test_a_scaling_is_a_field_of_the_model_and_of_configuration_files(tmp_path):
    plain = ModelConfig.tiny()
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling.from_fields(DEEPSEEK))
    mapping = dataclasses.asdict(scaled)
    assert isinstance(mapping["rope_scaling"], dict)
    assert ModelConfig(**mapping) == scaled != plain
    assert hash(ModelConfig(**mapping)) == hash(scaled)
    assert RopeScaling.from_fields(scaled.rope_scaling.as_fields()) == scaled.rope_scaling
    assert scaled.rope_scaling.as_fields() == DEEPSEEK

    @dataclasses.dataclass(frozen=True)
    class Run:
        model: ModelConfig

    file = tmp_path / "run.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({{'model': {mapping}}})\n"
    )
    loaded = config.load(file, [], Run)
    assert loaded.model == scaled
    assert config.build(Run, config.as_dict(loaded), "config.yaml") == loaded
    changed = config.load(file, ['--config.model.rope_scaling={"rope_type": "linear", "factor": 2}'], Run)
    assert changed.model.rope_scaling == RopeScaling("linear", 2)
    assert config.load(file, ["--config.model.rope_scaling=None"], Run).model.rope_scaling is None
    with pytest.raises(config.BadInput, match=r"model\.rope_type must be one of"):
        config.load(file, ['--config.model.rope_scaling={"rope_type": "dynamic", "factor": 2}'], Run)
