"""Hidden codecs: what comes back, how far off it is, and that the manifest says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captures import ALL, LAYERS, run, samples_of, signals

from limbeck.store.codec import from_bytes, to_bytes
from limbeck.store.hidden import BFloat16, Float32, Int8, Pca
from limbeck.store.manifest import read_manifest


def states(rows=200, width=24, seed=0):
    """Channels of very unequal size, correlated, and a first token a thousand times as large as others."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 6, generator=random) @ torch.randn(6, width, generator=torch.Generator().manual_seed(9))
    found = (base + 0.05 * torch.randn(rows, width, generator=random)) * torch.logspace(-2, 1, width)
    found[0] *= 1000
    return found


def error(codec, seen, new):
    model = codec.calibrate([seen[:100], seen[100:]])
    kept = codec.decode(model, codec.encode(model, new), np.arange(len(new)), new.shape[1])
    return ((new - kept).norm(dim=1) / new.norm(dim=1)), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_bytes_of_rows_come_back(dtype):
    rows = (torch.randn(5, 7) * 20).to(dtype)
    assert torch.equal(from_bytes(to_bytes(rows), dtype, 7), rows)
    assert torch.equal(from_bytes(to_bytes(rows), dtype, 7, np.array([4, 0])), rows[[4, 0]])
    assert from_bytes(b"", dtype, 7).shape == (0, 7)


def test_float32_is_exact_and_bfloat16_is_near():
    assert error(Float32(), states(), states(seed=1))[0].max() == 0
    short = states(seed=1).bfloat16()
    assert error(BFloat16(), states(), short.float())[0].max() == 0
    assert error(BFloat16(), states(), states(seed=1))[0].max() < 2**-8


def test_int8_keeps_small_channels_and_tokens_beside_large_ones():
    new = states(seed=1)
    errors, model = error(Int8(), states(), new)
    assert errors.max() < 0.02, "of the first token, and of all others"
    codec = Int8()
    kept = codec.decode(model, codec.encode(model, new), np.arange(len(new)), 24)
    by_channel = (new - kept)[1:].norm(dim=0) / new[1:].norm(dim=0)
    assert by_channel.max() < 0.05, "a scale for all channels would lose the small ones"
    assert len(codec.encode(model, new)) == len(new) * (24 + 4)
    assert torch.equal(codec.decode(model, codec.encode(model, new), np.array([7, 3]), 24), kept[[7, 3]])
    assert torch.equal(codec.decode(model, codec.encode(model, torch.zeros(1, 24)), np.array([0]), 24), torch.zeros(1, 24))


def test_pca_keeps_what_varies():
    new = states(seed=1)
    few, enough, all_of_them = (error(Pca(components=count), states(), new)[0].median() for count in (2, 6, 24))
    assert few > enough > all_of_them and all_of_them < 2e-3
    codec, model = Pca(components=6), error(Pca(components=6), states(), new)[1]
    assert len(codec.encode(model, new)) == len(new) * 2 * 6
    assert codec.calibrate([states()])["basis"].equal(model["basis"])
    assert codec.calibrate([states(width=4)])["basis"].shape == (4, 4), "no more components than channels"


@pytest.mark.parametrize(("hidden", "most"), [("{type: bfloat16}", 0.005), ("{type: int8}", 0.03), ("{type: pca, components: 40}", 0.9)])
def test_a_capture_says_what_its_states_lose(base, captured, data, tokenizer, tmp_path, hidden, most):
    path = tmp_path / "store"
    run(base, path, f"capture.hidden={hidden}", "capture.calibrate_on=3")
    manifest = read_manifest(path)
    assert set(manifest.hidden_error) == set(LAYERS) and all(0 < value < most for value in manifest.hidden_error.values())
    is_fitted = manifest.hidden.type != "bfloat16"
    assert (manifest.model is not None) == is_fitted and len(manifest.calibrated_on) == (3 if is_fitted else 0)
    samples = samples_of(data, tokenizer)
    kept, exact = signals(path, samples, tokenizer), signals(captured, samples, tokenizer)
    others = sorted(exact)[3:6]
    for number, layer in enumerate(LAYERS, 2):
        shares = [(kept[one][number] - exact[one][number]).norm(dim=1) / exact[one][number].norm(dim=1) for one in others]
        assert torch.cat(shares).mean().item() == pytest.approx(manifest.hidden_error[layer], rel=1e-3)
    assert all(torch.equal(kept[one][0], exact[one][0]) for one in exact), "the output is another matter"
    assert (path / "shard-00000.parquet").stat().st_size < (captured / "shard-00000.parquet").stat().st_size
    assert ALL.layers == frozenset(LAYERS)


def test_states_of_a_bf16_teacher_are_kept_in_bf16(base, tmp_path):
    manifest = run(base, tmp_path / "store", "teacher.dtype=bfloat16")
    assert manifest.hidden.type == "bfloat16" and set(manifest.hidden_error.values()) == {0.0}
