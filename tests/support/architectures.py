"""Well-known architectures in plain torch, with few channels and layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Block of ResNet-18: one in-place ReLU used twice, and an in-place addition."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Block of ResNet-50."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: list[int]) -> None:
        super().__init__()
        self.inputs = 4
        self.conv1 = nn.Conv2d(3, 4, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._make_layer(block, 4, depths[0], 1)
        self.layer2 = self._make_layer(block, 4, depths[1], 2)
        self.layer3 = self._make_layer(block, 6, depths[2], 2)
        self.layer4 = self._make_layer(block, 6, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6 * block.expansion, 5)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, depth: int, stride: int
    ) -> nn.Sequential:
        outputs = planes * block.expansion
        downsample = None
        if stride != 1 or self.inputs != outputs:
            downsample = nn.Sequential(
                conv1x1(self.inputs, outputs, stride), nn.BatchNorm2d(outputs)
            )
        blocks = [block(self.inputs, planes, stride, downsample)]
        self.inputs = outputs
        blocks += [block(outputs, planes, 1, None) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """Normalizes before the convolution; dropout is a function of `training`."""

    def __init__(self, inputs: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inputs, 2 * growth)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(2 * growth, growth)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(x)))
        out = self.conv2(self.relu2(self.norm2(out)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        return out


class DenseBlock(nn.ModuleDict):
    def __init__(self, depth: int, inputs: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(depth):
            self[f"layer{i}"] = DenseLayer(inputs + i * growth, growth, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv3x3(3, 4),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            DenseBlock(2, 4, 3, drop_rate=0.2),
            nn.Sequential(
                nn.BatchNorm2d(10), nn.ReLU(inplace=True), conv1x1(10, 5), nn.AvgPool2d(2)
            ),
            DenseBlock(2, 5, 3, drop_rate=0.2),
            nn.BatchNorm2d(11),
        )
        self.classifier = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class InvertedResidual(nn.Module):
    """Block of MobileNetV2: expansion, depthwise, and a bottleneck that ends in a BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Sequential(conv1x1(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            conv1x1(hidden, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_residual:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(conv3x3(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)),
            InvertedResidual(4, 4, 1, 2),
            InvertedResidual(4, 6, 2, 2),
            InvertedResidual(6, 6, 1, 2),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class BasicConv2d(nn.Module):
    """Layer of Inception: the activation is a function."""

    def __init__(self, inputs: int, outputs: int, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 3, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(inputs, 2, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(2, 3, kernel_size=5, padding=2)
        self.branch_pool = BasicConv2d(inputs, 3, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)),
        ]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 4, kernel_size=3, stride=2)
        self.mixed1 = InceptionBlock(4)
        self.mixed2 = InceptionBlock(9)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed2(F.max_pool2d(self.mixed1(self.stem(x)), 2))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    """Block of UNet: pads by the difference of two shapes, and concatenates two inputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        self.conv = double_conv(inputs, outputs)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        low = self.up(low)
        rows, columns = skip.size(2) - low.size(2), skip.size(3) - low.size(3)
        low = F.pad(low, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, low], dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = double_conv(3, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_conv(4, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_conv(8, 16))
        self.up1 = Up(16, 8)
        self.up2 = Up(8, 4)
        self.outc = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class Residual3d(nn.Module):
    """(2+1)D convolutions; both operands of the addition are BatchNorms."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.temporal = nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.spatial(x)))
        out = self.bn2(self.temporal(out)) + self.bn3(self.shortcut(x))
        return torch.relu(out)


class Net3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.SiLU())
        self.block = Residual3d(3, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean(dim=(2, 3, 4)))


class TemporalBlock(nn.Module):
    """Block of a Conv1d network: dilated, with dropout and a slope read from the module."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.bn1 = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.bn2 = nn.BatchNorm1d(channels)
        self.slope = 0.2

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.leaky_relu(self.bn1(self.conv1(x)), self.slope))
        return F.leaky_relu(x + self.bn2(self.conv2(out)), self.slope)


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList([TemporalBlock(4, d) for d in (1, 2)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).relu().mean(-1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Sigmoid(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8, momentum=None),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8, affine=False),
        nn.PReLU(),
        nn.Linear(8, 5),
    )


@dataclass(frozen=True)
class Architecture:
    """A network to test with.

    Attributes:
        build: returns the network with random weights.
        shape: shape of a batch of inputs.
        unfused: names of the BatchNorms without an addition or activation to fuse.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    unfused: tuple[str, ...] = ()


def _downsampled(layers: str) -> tuple[str, ...]:
    return tuple(f"layer{i}.0.downsample.1" for i in layers)


ARCHITECTURES = {
    "resnet18": Architecture(
        lambda: ResNet(BasicBlock, [2, 2, 2, 2]), (4, 3, 32, 32), _downsampled("234")
    ),
    "resnet50": Architecture(
        lambda: ResNet(Bottleneck, [3, 4, 6, 3]), (4, 3, 32, 32), _downsampled("1234")
    ),
    # The activation of the last BatchNorm is in another module's forward.
    "densenet": Architecture(DenseNet, (4, 3, 8, 8)),
    # The bottleneck of a block without a shortcut is linear.
    "mobilenetv2": Architecture(MobileNetV2, (4, 3, 16, 16), ("features.2.conv.3",)),
    "inception": Architecture(Inception, (4, 3, 13, 13)),
    "unet": Architecture(UNet, (2, 3, 14, 10)),
    # Of two BatchNorms that are added, one is fused with the addition.
    "net3d": Architecture(Net3d, (2, 1, 4, 6, 6), ("block.bn3",)),
    "conv1d": Architecture(Conv1dNet, (4, 2, 9)),
    # The kernels do not have PReLU.
    "mlp": Architecture(mlp, (6, 3, 4), ("8",)),
}
