"""Parity with everything recorded from the authors' code, for every model folder under REFUSION_ORACLE.

    REFUSION_ORACLE=/path/to/recordings python -m pytest tests/test_parity.py

A folder holds config.json, model.safetensors and the recordings. Numbers of layers, token ids and cases are
read from it. The tolerances are for float32 on the CPU and must not be loosened.
"""

import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_params import load_params, stack_layers

from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape, bucket
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import Transformer

ORACLE = Path(os.environ.get("REFUSION_ORACLE", Path(__file__).parent / "data" / "oracle"))
FOLDERS = sorted(path.parent for path in ORACLE.glob("*/config.json"))
LOGITS = 2e-4  # absolute
LOSS = 1e-5  # relative
GRADIENT_NORM = 1e-4  # relative


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@functools.cache
def load(folder: Path):
    config = hf.read_config(folder)
    return Transformer(config), load_params(folder, config)


@functools.cache
def arrays(folder: Path, kind: str):
    with np.load(folder / f"{kind}.npz") as recorded:
        return {name: recorded[name] for name in recorded.files}


@functools.cache
def records(folder: Path, kind: str):
    return json.loads((folder / f"{kind}.json").read_text())


def special_ids(folder: Path) -> dict[str, int]:
    raw = json.loads((folder / "config.json").read_text())
    return {"mask_id": raw["mask_token_id"], "eos_id": raw["eos_token_id"]}


def needs(folder: Path, *names: str) -> None:
    """Skips the test if the folder has only a selection of the recordings, without these files."""
    for name in names:
        if not (folder / name).exists():
            pytest.skip(f"{folder.name} has no {name}")


def test_there_is_something_to_compare_with():
    assert FOLDERS, f"no model folder under {ORACLE}"


# Forward passes.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_forward(folder, scan_layers):
    needs(folder, "forward.npz")
    model, params = load(folder)
    if scan_layers:
        model, params = model.clone(scan_layers=True), stack_layers(params)
    recorded = arrays(folder, "forward")
    batches = {name.split("/")[0] for name in recorded}
    for name in sorted(batches):
        ids, positions = recorded[f"{name}/input_ids"], recorded[f"{name}/position_ids"]
        real = recorded.get(f"{name}/attention_mask", np.ones_like(ids)) == 1
        logits, _ = jax.jit(model.apply)({"params": params}, ids, positions)
        np.testing.assert_allclose(
            np.asarray(logits)[real], recorded[f"{name}/logits"][real], rtol=0, atol=LOGITS, err_msg=name
        )


def test_forward_through_the_cache(folder):
    """The same input fed in pieces: logits, and keys and values of the first and last layer."""
    needs(folder, "forward.npz")
    model, params = load(folder)
    recorded = arrays(folder, "forward")
    ids, positions = recorded["cache/input_ids"], recorded["cache/position_ids"]
    B, T = ids.shape
    apply = jax.jit(model.apply)
    for split in sorted(name[: -len("/cuts")] for name in recorded if name.endswith("/cuts")):
        borders = [0, *recorded[f"{split}/cuts"].tolist(), T]
        cache = KVCache.zeros(model.config, B, T, jnp.float32)
        pieces = []
        for start, end in itertools.pairwise(borders):
            width = end - start
            # Here the cache is indexed by feeding order; position ids only go to RoPE.
            filled = jnp.broadcast_to(cache.filled[:, None], (B, width, T))
            causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (B, width, width))
            mask = jnp.concatenate([filled, causal], axis=-1)
            logits, fresh = apply(
                {"params": params}, ids[:, start:end], positions[:, start:end], cache.layers, mask
            )
            places = jnp.broadcast_to(jnp.arange(start, end), (B, width))
            cache = cache.commit(fresh, places, jnp.ones((B, width), bool))
            pieces.append(logits)
        np.testing.assert_allclose(
            np.concatenate(pieces, axis=1), recorded[f"{split}/logits"], rtol=0, atol=LOGITS, err_msg=split
        )
        if split == "cache/split2":
            for layer in (0, model.config.num_layers - 1):
                for name, buffer in zip("kv", cache.layers, strict=True):
                    theirs = recorded[f"cache/layer{layer}/{name}"].transpose(0, 2, 1, 3)
                    np.testing.assert_allclose(buffer[layer], theirs, rtol=0, atol=LOGITS)


# The objective.


@functools.partial(jax.jit, static_argnames=("mask_id",))
def rearrange(tokens, prompt_len, total_len, draw, mask_id):
    return diffusion.rearrange(tokens, prompt_len, total_len, draw, mask_id, diffusion.DiffusionConfig())


def noised(folder: Path, record) -> diffusion.Noised:
    """The recorded draws applied to the recorded rows, padded to the size of the largest record.

    Padding rows have no response and must not count in the loss.
    """
    every, recorded = records(folder, "loss"), arrays(folder, "loss")
    B, T = max(r["B"] for r in every), max(r["L"] for r in every)
    rows, eps = record["rows"], diffusion.DiffusionConfig().eps
    slots = diffusion.DiffusionConfig().max_slots(T)
    size, p = np.ones(B, np.int32), np.ones(B, np.float32)
    masked, rank = np.zeros((B, slots), bool), np.tile(np.arange(slots), (B, 1))
    for i, row in enumerate(rows):
        size[i], p[i] = row["slot_size"], (1 - eps) * row["t"] + eps
        masked[i, : len(row["slot_masked"])] = row["slot_masked"]
        rank[i, row["visible_order"]] = np.arange(len(row["visible_order"]))

    ids = recorded[f"{record['name']}/input_ids"]
    tokens, lengths = np.zeros((B, T), np.int32), np.zeros((2, B), np.int32)
    tokens[: len(rows), : ids.shape[1]] = ids
    lengths[0, : len(rows)] = recorded[f"{record['name']}/prompt_lengths"][:, 0]
    lengths[1, : len(rows)] = recorded[f"{record['name']}/attention_mask"].sum(-1)
    return rearrange(
        tokens, *lengths, diffusion.Draw(size, p, masked, rank), mask_id=special_ids(folder)["mask_id"]
    )


def test_rearrangement(folder):
    needs(folder, "loss.npz", "loss.json")
    recorded = arrays(folder, "loss")
    for record in records(folder, "loss"):
        name, ours = record["name"], jax.device_get(noised(folder, record))
        inside = (slice(len(record["rows"])), slice(recorded[f"{name}/fp_labels"].shape[1]))
        masked = ours.diffusion_weights > 0
        labels = np.where((ours.ar_weights > 0) | masked, ours.targets, -100)
        for theirs, array in (
            ("fp_input_ids", ours.tokens),
            ("fp_position_ids", ours.positions),
            ("fp_labels", labels),
            ("fp_masked_indices", masked),
        ):
            np.testing.assert_array_equal(array[inside], recorded[f"{name}/{theirs}"], f"{name} {theirs}")
        weights = masked[inside] / (recorded[f"{name}/fp_p_mask"] * recorded[f"{name}/fp_answer_lengths"])
        np.testing.assert_allclose(ours.diffusion_weights[inside], weights, rtol=1e-6, err_msg=name)
        assert masked.sum() == masked[inside].sum() and ours.has_response.sum() == len(record["rows"]), name


def test_losses_and_gradients(folder):
    needs(folder, "loss.npz", "loss.json")
    model, params = load(folder)
    recorded = arrays(folder, "loss")
    entries = hf.table(model.config)

    @jax.jit
    def value_and_grad(params, noised):
        def objective(params):
            logits, _ = model.apply({"params": params}, noised.tokens, noised.positions)
            loss, parts = diffusion.loss(logits, noised)
            return loss, (parts, logits)

        return jax.value_and_grad(objective, has_aux=True)(params)

    for record in records(folder, "loss"):
        name = record["name"]
        (_, (parts, logits)), grads = jax.device_get(value_and_grad(params, noised(folder, record)))
        want = recorded[f"{name}/logits"]
        real = recorded[f"{name}/attention_mask"][: len(want)] == 1
        logits = logits[: want.shape[0], : want.shape[1]]
        np.testing.assert_allclose(logits[real], want[real], rtol=0, atol=LOGITS, err_msg=name)

        # Without a labelled clean token the authors' mean is 0/0; ours is 0, with the same gradients.
        empty = record["AR_loss"] == "nan"
        ar_loss = 0.0 if empty else record["AR_loss"]
        loss = record["MDM_loss"] if empty else record["loss"]
        np.testing.assert_allclose(parts["ar_loss"], ar_loss, rtol=LOSS, err_msg=name)
        np.testing.assert_allclose(parts["diffusion_loss"], record["MDM_loss"], rtol=LOSS, err_msg=name)
        np.testing.assert_allclose(parts["loss"], loss, rtol=LOSS, err_msg=name)
        compare_gradients(record, recorded, grads, entries)


def compare_gradients(record, recorded, grads, entries) -> None:
    name = record["name"]

    def of(theirs: str) -> np.ndarray:
        """Our gradient of a tensor, in the shape of the Hugging Face checkpoint."""
        entry = entries[theirs]
        grad = functools.reduce(lambda node, key: node[key], entry.path, grads)
        return grad.transpose(np.argsort(entry.order)).reshape(entry.shape)

    norms = {theirs: np.linalg.norm(of(theirs)) for theirs in entries}
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    np.testing.assert_allclose(total, record["global_grad_norm"], rtol=GRADIENT_NORM, err_msg=name)
    for theirs, norm in record["param_grad_norms"].items():
        # A norm below a millionth of the total is rounding noise.
        floor = 1e-6 * total
        np.testing.assert_allclose(
            norms[theirs], norm, rtol=GRADIENT_NORM, atol=floor, err_msg=f"{name} {theirs}"
        )
    for theirs, key in (
        ("model.embed_tokens.weight", "grad_embed_tokens"),
        ("model.layers.0.self_attn.q_proj.weight", "grad_l0_q_proj"),
    ):
        want = recorded[f"{name}/{key}"]
        scale = np.abs(want).max()
        np.testing.assert_allclose(
            of(theirs), want, rtol=0, atol=1e-4 * scale + 1e-9, err_msg=f"{name} {key}"
        )


# Decoding.


def settings(case, folder: Path) -> DecodeConfig:
    asked = case["params"]
    return DecodeConfig(
        **special_ids(folder),
        gen_length=asked["gen_length"],
        slot_size=asked["slot_size"],
        num_blocks=asked["serial_num_blocks"],
        slot_threshold=asked["slot_threshold"],
        token_threshold=asked["token_threshold"],
        semantics="release",
    )


def fitting_shape(folder: Path, rows: int, ahead: int = 0) -> Shape:
    """A shape that holds every recording, and the requests of test_argument_errors except longer prompts."""
    cases = records(folder, "decode")["cases"] if (folder / "decode.json").exists() else []
    largest = DecodeConfig(**special_ids(folder), gen_length=64, slot_size=1, num_blocks=2)
    prompts, configs = [case["prompt"] for case in cases], [settings(case, folder) for case in cases]
    return Shape.exact([*prompts, []], [*configs, largest]).padded(rows=rows, trace=True, ahead=ahead)


def in_batches(cases: list, size: int):
    return (cases[i : i + size] for i in range(0, len(cases), size))


def test_slot_decoding(folder):
    """Ids, forward passes, every step of the trace, and cached keys and values of the last layer."""
    needs(folder, "decode.json")
    model, params = load(folder)
    # Sorted by number of passes, so that a batch does not wait for its last row.
    cases = sorted(records(folder, "decode")["cases"], key=lambda case: case["n_forward"])
    shape = fitting_shape(folder, rows=16)
    for batch in in_batches(cases, shape.rows):
        prompts = [case["prompt"] for case in batch]
        configs = [settings(case, folder) for case in batch]
        prepared = decode.DECODER.prepare(model, prompts, configs, shape)
        state = jax.device_get(decode.DECODER.decode(model, params, *prepared.inputs, shape=shape))
        for row, (case, config) in enumerate(zip(batch, configs, strict=True)):
            of_row = jax.tree.map(lambda x, row=row: x[row], state.replace(cache=None))
            compare_decode(case, config, of_row.replace(cache=state.cache.rows(row)))


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 16])
def test_slot_decoding_ahead_of_need(folder, rows):
    """The same ids and traces at several batch sizes, with at most 3 passes for 4 of the authors'."""
    needs(folder, "decode.json")
    model, params = load(folder)
    cases = sorted(records(folder, "decode")["cases"], key=lambda case: case["n_forward"])
    shape = fitting_shape(folder, rows, ahead=64)
    made = 0
    for batch in in_batches(cases, rows):
        prompts, configs = [case["prompt"] for case in batch], [settings(case, folder) for case in batch]
        prepared = decode.DECODER.prepare(model, prompts, configs, shape)
        state = jax.device_get(decode.DECODER.decode(model, params, *prepared.inputs, shape=shape))
        for row, (case, config) in enumerate(zip(batch, configs, strict=True)):
            of_row = jax.tree.map(lambda x, row=row: x[row], state.replace(cache=None))
            made += int(of_row.row.forwards)
            compare_steps(case, config, of_row.replace(cache=state.cache.rows(row)))
    assert made <= 0.75 * sum(case["n_forward"] for case in cases)


def compare_decode(case, config: DecodeConfig, state: decode.DecodeState) -> None:
    assert state.row.forwards == case["n_forward"], case["id"]
    compare_steps(case, config, state)


def compare_steps(case, config: DecodeConfig, state: decode.DecodeState) -> None:
    name, prompt_len = f"{case['id']} (min margin {case['min_margin']:.1e})", len(case["prompt"])
    places = np.flatnonzero(state.cache.filled)
    assert state.tokens[places].tolist() == case["x"], name
    assert state.row.iterations == len(case["steps"]), name
    keys, values = (x[-1].sum((-1, -2)) for x in state.cache.layers)
    for i, step in enumerate(case["steps"]):
        got = jax.tree.map(lambda x, i=i: x[i], state.trace)
        start = prompt_len + got.block * config.block_len
        committed = (start + np.flatnonzero(got.committed)).tolist()
        assert got.block == step["block"], (name, i)
        assert (start + config.slot_size * np.flatnonzero(got.planned)).tolist() == step["chosen"], (name, i)
        assert ("iterative" if got.iterative else "prefix") == step["branch"], (name, i)
        assert got.rounds == step["loops"], (name, i)
        assert committed == step["pos"], (name, i)
        np.testing.assert_allclose(got.confidence[got.confidence >= 0], step["conf"], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(keys[committed], step["k_sum"], rtol=0, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(values[committed], step["v_sum"], rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(("first_token", "recorded"), [("next", "shift_first"), ("mask", "mask_first")])
def test_left_to_right_decoding(folder, first_token, recorded):
    needs(folder, "ar.json")
    model, params = load(folder)
    runs = records(folder, "ar")
    config = ARConfig(
        **special_ids(folder) | {"eos_id": runs["eos"]},
        gen_length=runs["max_new_tokens"],
        first_token=first_token,
    )
    longest = max(len(case["prompt"]) for case in runs["cases"])
    shape = Shape(rows=16, prompt=bucket(longest), gen=bucket(config.gen_length))
    for batch in in_batches(runs["cases"], shape.rows):
        prompts = [case["prompt"] for case in batch]
        samples = jax.device_get(ar.DECODER.sample(model, params, prompts, config, shape=shape))
        for row, case in enumerate(batch):
            want = case[recorded]["new_tokens"]
            assert samples.raw_ids[row, : samples.num_raw[row]].tolist() == want, case["prompt_id"]
            assert samples.num_forwards[row] == len(want)


def test_argument_errors(folder):
    """Requests that the authors' function refuses raise BadInput here; those that it decodes decode alike."""
    needs(folder, "reference_errors.json", "ar.json")
    model, params = load(folder)
    prompt = records(folder, "ar")["cases"][0]["prompt"]
    compared = 0
    for probe in records(folder, "reference_errors"):
        asked, fed_shape = probe.get("args"), probe.get("prompt_shape")
        if asked is None or len(fed_shape) != 2 or fed_shape[0] != 1 or probe["name"] == "temperature_one":
            continue  # a probe of the loss, or a prompt shape that `sample` cannot be given
        eos_id = special_ids(folder)["eos_id"]
        if probe["name"].startswith("eos_"):
            eos_id = None if probe["name"] == "eos_none" else model.config.vocab_size
        arguments = {
            "mask_id": asked["mask_id"],
            "eos_id": eos_id,
            "gen_length": asked["gen_length"],
            "slot_size": asked["slot_size"],
            "num_blocks": asked["serial_num_blocks"],
            "slot_threshold": asked["slot_threshold"],
            "token_threshold": asked["token_threshold"],
            "semantics": "release",
        }
        fed = probe["x"][: fed_shape[1]] if "x" in probe else prompt
        compared += 1
        if probe["outcome"] == "error":
            with pytest.raises(BadInput, match="must"):
                decode.sample(model, params, [fed], DecodeConfig(**arguments))
        else:
            shape = fitting_shape(folder, rows=1, ahead=64)
            padded = dataclasses.replace(shape, prompt=max(shape.prompt, bucket(len(fed))))
            samples = decode.sample(model, params, [fed], DecodeConfig(**arguments), shape=padded)
            got = samples.raw_ids[0, : samples.num_raw[0]].tolist()
            assert got == probe["x"][fed_shape[1] :], probe["name"]
    assert compared
