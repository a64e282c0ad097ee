"""Two networks that take images as bytes."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from .data import CLASSES


class Network(nn.Module):
    """Bytes to logits: scales the images, and computes in bfloat16 on a GPU."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            return self.layers(images / 127.5 - 1)


def cifar_network() -> nn.Module:
    """torchvision's ResNet-18, its stem cut down for images of 32 x 32."""
    network = resnet18(num_classes=CLASSES)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return Network(network)


def small_network() -> nn.Module:
    """66,000 parameters, for the shapes and a CPU."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 16, 1), *block(16, 32, 2), *block(32, 64, 2), *block(64, 64, 1)]
    return Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)))
