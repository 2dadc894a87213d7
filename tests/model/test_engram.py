"""The Engram layer equals the published demo's outputs, and its conv state carries across any cut."""

import numpy as np
import pytest
import torch

from engrid.model.engram import EngramLayer
from tests.model.conftest import GOLDEN


def golden(branches):
    data = np.load(GOLDEN / "engram_layer.npz")
    prefix = f"M{branches}/"
    part = {key.removeprefix(prefix): torch.from_numpy(data[key]) for key in data if key.startswith(prefix)}
    weights = {key.removeprefix("w/"): value for key, value in part.items() if key.startswith("w/")}
    layer = EngramLayer(16, 32, 3, branches=branches)
    names = {"norm1": "key_norms", "norm2": "query_norms", "short_conv.norms": "conv_norms"}
    state = {"conv_weight": weights["short_conv.conv.weight"][:, 0].T.reshape(4, branches, 16)}
    for name, value in weights.items():
        for theirs, ours in names.items():
            if name.startswith(theirs):
                state[name.replace(theirs, ours)] = value
        if name.startswith(("key_projs", "value_proj")):
            state[name] = value
    layer.load_state_dict(state)
    rows = weights["multi_head_embedding.embedding.weight"][part["row_ids"]]
    return layer, part["hidden_in"], rows, part["out"]


@pytest.mark.parametrize("branches", [1, 4])
def test_golden_output(branches):
    layer, hidden, rows, expected = golden(branches)
    out, _, gates = layer(hidden, rows, layer.start(1))
    assert torch.allclose(out, expected, atol=1e-5), float((out - expected).abs().max())
    assert gates.shape == (1, 22, branches)
    assert (gates > 0).all()
    assert (gates < 1).all()


@pytest.mark.parametrize("cuts", [[1] * 22, [5, 1, 16], [21, 1]])
def test_conv_state_carries_across_cuts(cuts):
    layer, hidden, rows, _ = golden(4)
    whole, last, _ = layer(hidden, rows, layer.start(1))
    state, pieces, at = layer.start(1), [], 0
    for cut in cuts:
        out, state, _ = layer(hidden[:, at : at + cut], rows[:, at : at + cut], state)
        pieces.append(out)
        at += cut
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    assert torch.allclose(state, last, atol=1e-6)
    assert state.shape == (1, 9, 4, 16), "3 * N normalised u per branch"


def test_dead_positions_have_gate_zero_and_add_nothing_of_their_own():
    layer, hidden, rows, _ = golden(1)
    dead = torch.zeros(1, 22, dtype=torch.bool)
    dead[0, 7] = True
    rows = rows.masked_fill(dead[..., None, None], 0)
    _, _, gates = layer(hidden, rows, layer.start(1), dead_BT=dead)
    assert gates[0, 7] == 0
    with torch.no_grad():
        layer.conv_weight.zero_()
        out, _, _ = layer(hidden, rows, layer.start(1), dead_BT=dead)
    assert (out[0, 7] == 0).all()
    assert (out[0, 6] != 0).any()
