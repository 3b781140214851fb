"""Packed linear layers: the same values and the same parameters, and never a weight of yesterday."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from llmrec_lib.language_models._packed import pack_linears
from tests.unit.tiny_models import tiny_llama


def pair(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 40, bias=bias), nn.GELU(), nn.Linear(40, 24, bias=bias)).to(dtype)
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    return plain, packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_values_are_those_of_the_plain_layer(dtype, tolerance, bias):
    plain, packed = pair(dtype, bias)
    with torch.inference_mode():
        for shape in ((48,), (1, 48), (7, 48), (300, 48), (2, 5, 48), (0, 48)):  # one packing serves all shapes
            rows = torch.randn(shape).to(dtype)
            torch.testing.assert_close(packed(rows), plain(rows), atol=tolerance, rtol=tolerance)
        strided = torch.randn(48, 9).to(dtype).T
        torch.testing.assert_close(packed(strided), plain(strided), atol=tolerance, rtol=tolerance)


def test_parameters_stay_what_they_were():
    plain, packed = pair()
    with torch.no_grad():
        packed(torch.randn(3, 48))
    assert list(packed.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), plain.parameters(), strict=True))
    assert all(isinstance(packed[place], nn.Linear) for place in (0, 2))


def test_gradients_flow_as_before():
    plain, packed = pair()
    rows = torch.randn(5, 48)
    for model in (plain, packed):
        with torch.no_grad():
            model(rows)  # packed by now
        model(rows).square().sum().backward()
    for ours, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("change", ["optimizer", "load", "to", "assign"])
def test_changed_weights_are_packed_anew(change):
    plain, packed = pair()
    rows = torch.randn(5, 48)
    with torch.no_grad():
        before = packed(rows)
    for model in (plain, packed):
        if change == "optimizer":
            model(rows).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        elif change == "load":
            model.load_state_dict({name: -value for name, value in model.state_dict().items()})
        elif change == "to":
            model.to(torch.bfloat16)
        else:
            model[0].weight = nn.Parameter(-model[0].weight.detach())
    rows = rows.to(plain[0].weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(packed(rows), plain(rows), atol=2e-2 if change == "to" else 1e-5, rtol=1e-2)
        assert change == "to" or not torch.allclose(packed(rows), before)


def test_packed_models_can_be_copied_and_pickled():
    _, packed = pair()
    rows = torch.randn(5, 48)
    with torch.no_grad():
        expected = packed(rows)
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(twin(rows), expected)
            twin[0].weight.mul_(2)
            assert torch.equal(packed(rows), expected)


def test_a_language_model_with_tied_head_is_the_same():
    plain, packed = tiny_llama(), tiny_llama()
    pack_linears(packed)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    tokens = torch.randint(0, 320, (3, 11))
    with torch.inference_mode():
        torch.testing.assert_close(packed(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_is_not_a_plain_linear_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = Doubled(4, 4)
    pack_linears(layer)
    assert type(layer) is Doubled


def test_without_the_operation_nothing_changes(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    _, packed = pair()
    assert type(packed[0]) is nn.Linear
