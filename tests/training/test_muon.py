"""Muon and AdamW behind one optimizer: who trains what, schedules, and going on after a load."""

import copy

import pytest
import torch

from videollama3.training.muon import RATE_FACTOR, MuonWithAdamW, is_muon_parameter

from .synthetic import tiny_model


def _network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"layers": torch.nn.Linear(6, 5), "head": torch.nn.Linear(5, 3, bias=False)})


def _optimizer(network, rate=0.01):
    matrix = [network["layers"].weight]
    others = [network["layers"].bias, network["head"].weight]
    return MuonWithAdamW(
        [
            {"params": matrix, "lr": rate, "weight_decay": 0.0, "muon": True},
            {"params": others, "lr": rate, "weight_decay": 0.0, "muon": False},
        ]
    )


def _steps(network, optimizer, number):
    inputs = torch.randn(number, 7, 6, generator=torch.Generator().manual_seed(1))
    for values in inputs:
        network["head"](network["layers"](values).relu()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_each_algorithm_does_its_own_step():
    network = _network()
    before = copy.deepcopy(network)
    _steps(network, _optimizer(network), 1)
    moved = network["layers"].weight - before["layers"].weight
    # Muon's step is close to orthogonal: all singular values between 0.7 and 1.2 of the rate.
    values = torch.linalg.svdvals(moved.detach()) / (0.01 * RATE_FACTOR)
    assert 0.6 < values.min() < values.max() < 1.3
    # The first step of AdamW is the rate, whatever the gradient.
    moved = (network["head"].weight - before["head"].weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), atol=1e-5, rtol=0)


def test_a_schedule_reaches_both():
    network = _network()
    optimizer = _optimizer(network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    _steps(network, optimizer, 1)
    schedule.step()
    before = copy.deepcopy(network.state_dict())
    _steps(network, optimizer, 1)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    whole = _network()
    _steps(whole, _optimizer(whole), 1)
    network = _network()
    first = _optimizer(network)
    _steps(network, first, 1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = _optimizer(network, rate=0.5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["lr"] for group in second.param_groups] == [0.01 * RATE_FACTOR, 0.01]
    other = copy.deepcopy(network)
    third = _optimizer(other)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    _steps(network, second, 2)
    _steps(other, third, 2)
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    fresh = copy.deepcopy(whole)
    _steps(fresh, _optimizer(fresh), 2)
    assert not torch.equal(fresh["layers"].weight, network["layers"].weight), "the state matters"


def test_matrices_of_layers_only():
    model, _ = tiny_model()
    names = {name for name, parameter in model.named_parameters() if is_muon_parameter(name, parameter)}
    assert any("vision_model.encoder.layers" in name for name in names)
    assert any("language_model.layers" in name for name in names)
    for part in ("embed_tokens", "lm_head", "patch_embedding", "readout", "norm", "bias"):
        assert not [name for name in names if part in name]


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match=r"Expected torch 2\.9 or newer .* set schedule\.optimizer=adamw_torch"):
        _optimizer(_network())
