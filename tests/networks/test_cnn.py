"""The convolutional encoder: the paper's shape, and what its switches do."""

import torch
from torch import nn

from cryorbit.networks import cnn
from cryorbit.networks.cnn import ConvEncoder


def test_layers_are_those_of_the_paper():
    network = ConvEncoder(64, 6, normalised=False, he=False)
    filters = [layer.out_channels for layer in network.body if isinstance(layer, nn.Conv2d)]
    assert filters == [32, 32, 64, 64, 128, 128]
    assert all(layer.kernel_size == (3, 3) for layer in network.body if isinstance(layer, nn.Conv2d))
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network.body) == 3
    assert [layer.out_features for layer in network.body if isinstance(layer, nn.Linear)] == [512, 512]
    assert network(torch.zeros(2, 64, 64)).shape == (2, 6)


def test_he_start_keeps_the_signal_that_the_default_start_loses(generator):
    images = torch.randn(16, 16, 16, generator=generator)
    spread = {
        he: float(ConvEncoder(16, 6, normalised=False, he=he)(images).detach().std(dim=0).mean())
        for he in (False, True)
    }
    assert spread[False] < 0.1 < spread[True]


def test_bfloat16_changes_little_and_returns_float32(generator, monkeypatch):
    monkeypatch.setattr(cnn, "bfloat16_is_fast", lambda device: True)
    images = torch.randn(16, 16, 16, generator=generator)
    exact, rough = (ConvEncoder(16, 6, bfloat16=reduced)(images).detach() for reduced in (False, True))
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).norm() / exact.norm()) < 0.1


def test_bfloat16_is_left_alone_where_no_instruction_multiplies_in_it(generator, monkeypatch):
    assert cnn.bfloat16_is_fast(torch.device("cpu")) in (False, True)
    monkeypatch.setattr(cnn, "bfloat16_is_fast", lambda device: False)
    images = torch.randn(4, 16, 16, generator=generator)
    assert torch.equal(ConvEncoder(16, 6, bfloat16=True)(images), ConvEncoder(16, 6)(images))
