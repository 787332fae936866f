"""Convolutions, then a perceptron: from small square images to a vector each."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryorbit.errors import ConfigError

_BLOCKS = 3
SMALLEST_SIDE = 2**_BLOCKS


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16: GPUs from compute capability 8 on, x86 with AVX-512 BF16.

    On a CPU without it convolutions take 20 times as long as in float32 (32 to 64 channels of 32 x 32 with AVX2: 1.3 s and 0.064 s).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return torch.cpu._is_avx512_bf16_supported()


def convolving(device: torch.device, *, bfloat16: bool) -> torch.autocast:
    """A context whose products are in bfloat16, if wished and fast on ``device``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and bfloat16_is_fast(device))


class _Around(nn.Module):
    """The first column behind the last, and the last before the first."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h v"]:
        return torch.cat([x[..., -1:], x, x[..., :1]], dim=-1)


def convolutions(filters: tuple[int, ...], *, normalised: bool, circular: bool = False) -> list[nn.Module]:
    """For each of ``filters`` two 3 x 3 convolutions of images of one channel, in ``circular`` ones of columns in a circle, and a max-pool."""
    layers: list[nn.Module] = []
    before = 1
    for count in filters:
        for _ in range(2):
            layers += [_Around()] if circular else []
            layers += [nn.Conv2d(before, count, 3, padding=(1, 0) if circular else 1)]
            layers += [nn.BatchNorm2d(count)] if normalised else []
            layers += [nn.ReLU()]
            before = count
        layers += [nn.MaxPool2d(2)]
    return layers


def perceptron(inputs: int, hidden: int, *, normalised: bool) -> list[nn.Module]:
    """Two fully connected layers."""
    layers: list[nn.Module] = []
    for before in (inputs, hidden):
        layers += [nn.Linear(before, hidden)]
        layers += [nn.BatchNorm1d(hidden)] if normalised else []
        layers += [nn.ReLU()]
    return layers


def start_he(body: nn.Module, last: nn.Linear) -> None:
    """He's starting weights for ``body``; the outputs of ``last`` begin with variance 1; biases zero."""
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    for name, parameter in body.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(last.weight, 0.0, 1.0 / math.sqrt(last.in_features))
    nn.init.zeros_(last.bias)


class ConvEncoder(nn.Module):
    """Three blocks of two 3 x 3 convolutions and a max-pool, then two fully connected layers (papers/001 section 3, "Encoder").

    As printed, it learns little from where PyTorch's default weights start it (measured in docs/methods/amortized.md); He's start and batch
    normalisation are the two switches that change that.

    Parameters
    ----------
    side
        Of the images in pixels, at least 8.
    outputs
        Numbers per image.
    filters, hidden
        Of each block, and units of each fully connected layer.
    normalised
        Whether convolutions and fully connected layers are followed by batch normalisation.
    he
        Start from He et al. 2015 (weights of variance 2 / inputs, biases zero) in place of PyTorch's default.
    bfloat16
        Multiply in bfloat16 where the device has instructions for it; what comes out is float32.
    seed
        Of the start.

    Raises
    ------
    ConfigError
        CONF500 images too small for three blocks.
    """

    def __init__(
        self,
        side: int,
        outputs: int,
        *,
        filters: tuple[int, int, int] = (32, 64, 128),
        hidden: int = 512,
        normalised: bool = True,
        he: bool = True,
        bfloat16: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if side < SMALLEST_SIDE:
            raise ConfigError(
                "CONF500", f"images of {side} px are too small to encode, expected {SMALLEST_SIDE} px or more"
            )
        self.reduced = bfloat16
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels = (side // SMALLEST_SIDE) ** 2
            layers = [*convolutions(filters, normalised=normalised), nn.Flatten()]
            layers += perceptron(filters[-1] * pixels, hidden, normalised=normalised)
            self.last = nn.Linear(hidden, outputs)
            self.body = nn.Sequential(*layers)
            if he:
                start_he(self.body, self.last)

    def forward(self, images: Float[Tensor, "b side side"]) -> Float[Tensor, "b outputs"]:
        """One vector per image; images of variance about 1."""
        x = images[:, None].contiguous(memory_format=torch.channels_last)
        with convolving(images.device, bfloat16=self.reduced):
            x = self.body(x)
        return self.last(x.to(images.dtype))
