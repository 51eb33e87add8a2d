"""The classifiers: teachers and students, each a family over its width. A network's name tells its layers."""

# B images, C channels, H rows, W columns, K classes

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainbook.workflows.distillation.methods import Outputs

RESNET_STAGES = {"resnet18": (2, 2, 2, 2), "resnet8": (1, 1, 1)}  # blocks per stage; each stage doubles the channels
MOBILE_CHANNELS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2))  # of each separable block: width multiple, stride


class Classifier(nn.Module):
    """Stages of convolutions, then a head; `forward` gives logits, or everything with `features`.

    Args:
        stages: each a module from feature map to feature map.
        to_vector: from the last feature map to the penultimate features.
        output: from those to logits.
    """

    def __init__(self, stages: list[nn.Module], to_vector: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.stages, self.to_vector, self.output = nn.ModuleList(stages), to_vector, output

    def forward(self, images: Tensor, features: bool = False) -> Tensor | Outputs:
        """Logits, (B, C, H, W) -> (B, K); or all `Outputs`."""
        for stage in self.stages:
            images = stage(images)
        vector = self.to_vector(images)
        logits = self.output(vector)
        return Outputs(logits, vector, images) if features else logits


class BasicBlock(nn.Module):
    """y = relu(x' + norm(conv(relu(norm(conv(x)))))), x' = x or, where the shape changes, norm(1x1 conv(x)).

    Source: He et al. (2016), Deep Residual Learning for Image Recognition, figure 2 and section 3.3, option B.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = stride == 1 and channels == out_channels
        projection = (nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return torch.relu(self.shortcut(images) + self.residual(images))


def _normed(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _pooled(channels: int, num_classes: int) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, num_classes)


def resnet(name: str, width: int, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Residual network with a 3x3 stem and no max-pooling; the channels start at `width` and double with each stage."""
    stages: list[nn.Module] = [nn.Sequential(*_normed(shape[0], width, 3))]
    channels = width
    for index, num_blocks in enumerate(RESNET_STAGES[name]):
        out, stride = width * 2**index, 1 if index == 0 else 2
        blocks = [BasicBlock(channels if block == 0 else out, out, stride if block == 0 else 1) for block in range(num_blocks)]
        stages.append(nn.Sequential(*blocks))
        channels = out
    return Classifier(stages, *_pooled(channels, num_classes))


def mobilenet(width: int, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """A convolution of `width` channels, then six depthwise-separable blocks up to 16 times as many.

    Source: Howard et al. (2017), MobileNets, section 3.1, without its first stride and its last blocks.
    """
    stages: list[nn.Module] = [nn.Sequential(*_normed(shape[0], width, 3))]
    channels = width
    for multiple, stride in MOBILE_CHANNELS:
        depthwise = _normed(channels, channels, 3, stride, groups=channels)
        stages.append(nn.Sequential(*depthwise, *_normed(channels, width * multiple, 1)))
        channels = width * multiple
    return Classifier(stages, *_pooled(channels, num_classes))


def simple_cnn(width: int, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Three convolutions of w, 2w and 2w channels with biases, each halved by max-pooling, and a hidden layer of 4w units."""
    channels, stages = shape[0], []
    for out in (width, 2 * width, 2 * width):
        stages.append(nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)))
        channels = out
    hidden = nn.Linear(channels * (shape[1] // 8) * (shape[2] // 8), 4 * width)
    return Classifier(stages, nn.Sequential(nn.Flatten(), hidden, nn.ReLU()), nn.Linear(4 * width, num_classes))


def small_cnn(width: int, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Two normed convolutions of w and 2w channels, each halved by max-pooling; no hidden layer."""
    channels, stages = shape[0], []
    for out in (width, 2 * width):
        stages.append(nn.Sequential(*_normed(channels, out, 3), nn.MaxPool2d(2)))
        channels = out
    return Classifier(stages, nn.Flatten(), nn.Linear(channels * (shape[1] // 4) * (shape[2] // 4), num_classes))


def family(name: str, shape: tuple[int, int, int], num_classes: int) -> Callable[[int], Classifier]:
    """A network as a function of its width.

    Args:
        name: resnet18, resnet8, mobilenet, simple_cnn or small_cnn.
        shape: of an image, (C, H, W).
        num_classes: K.
    """
    if name in RESNET_STAGES:
        return lambda width: resnet(name, width, shape, num_classes)
    build = {"mobilenet": mobilenet, "simple_cnn": simple_cnn, "small_cnn": small_cnn}[name]
    return lambda width: build(width, shape, num_classes)


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def multiply_accumulates(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiplications of convolutions and linear layers for one image, counted while it passes through on the CPU."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * (layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features)

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    was_training = module.training
    module.eval()(torch.zeros(1, *shape, device=next(module.parameters()).device))
    module.train(was_training)
    for hook in hooks:
        hook.remove()
    return total
