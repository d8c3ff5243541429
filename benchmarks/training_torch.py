"""The other side of `training.py`: the same network and the same steps in PyTorch, as fast as a user would have them.

torchvision's MobileNetV2 and timm's tf_efficientnet_lite0, BatchNorm folded into the convolutions as ours has it, up
to the layers that ours ends with; channels last, frozen layers without a gradient, fused AdamW, inference mode.
"""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Written out here: a process that starts PyTorch alone loads nothing of ours.
VOID = 255
BAND_WIDTHS = (3, 5)
INPUT_SCALINGS = {"tf": (127.5, 127.5), "efficientnet_lite": (127.0, 128.0)}  # mean and standard deviation


def _fold(module):
    """Puts every BatchNorm into the convolution that is defined before it; what it does besides stays."""
    last = None
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            last = name
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, last, fuse_conv_bn_eval(getattr(module, last).eval(), child.eval()))
            setattr(module, name, child.act if hasattr(child, "act") else nn.Identity())  # timm's norms activate
        else:
            _fold(child)
    return module


class _Same(nn.Conv2d):
    """TensorFlow's "SAME" padding, as of the weights that ours takes: what is odd goes to the end."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _mobilenet_v2(freeze_until):
    """(frozen, trained) layers up to block_13_expand."""
    features = _fold(torchvision.models.mobilenet_v2().features)
    first = 1 + int(re.fullmatch(r"block_(\d+)", freeze_until)[1])
    return features[:first], nn.Sequential(*features[first:14], features[14].conv[0])


def _efficientnet_lite0(freeze_until):
    """(frozen, trained) layers up to stage5_0_expand, and beside it stage6_0 at its own stride."""
    net = _fold(timm.create_model("tf_efficientnet_lite0"))
    first = int(re.fullmatch(r"stage(\d)_0", freeze_until)[1])
    last, *later = net.blocks[5]
    frozen = nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:first])
    output = nn.Sequential(*net.blocks[first:5], last.conv_pw, last.bn1)
    return frozen, _Joined(
        output, nn.Sequential(last.conv_dw, last.bn2, last.conv_pwl, last.bn3, *later, net.blocks[6])
    )


class _Joined(nn.Module):
    """Features of an output and of later layers, these at a root mean square of 1 in each cell."""

    def __init__(self, output, later):
        super().__init__()
        self.output, self.later = output, later

    def forward(self, x):
        x = self.output(x)
        deep = self.later(x)
        deep = deep * torch.rsqrt(deep.square().mean(1, keepdim=True) + 1e-6)
        return torch.cat([x, _resize(deep, x.shape[2:])], dim=1)


BACKBONES = {"mobilenet_v2": _mobilenet_v2, "efficientnet_lite": _efficientnet_lite0}


class Net(nn.Module):
    """Images uint8 [B, H, W, 3] -> scores [B, K, h, w].

    padding: "own", the library's, or "same", TensorFlow's, for a comparison of outputs.
    """

    def __init__(self, config, padding="own"):
        super().__init__()
        m = config.model
        self.scales, self.windows = m.scales, sorted(m.pyramid_windows)
        self.frozen, self.trained = BACKBONES[m.backbone](getattr(m, m.backbone).freeze_until)
        self.frozen.requires_grad_(False)
        parts = (self.trained.output, self.trained.later) if m.backbone == "efficientnet_lite" else (self.trained,)
        channels = sum([x for x in part.modules() if isinstance(x, nn.Conv2d)][-1].out_channels for part in parts)
        self.block6 = nn.ModuleList(self._block6(m.block6, channels) for _ in self.scales)
        self.width = m.block6[-1][1] * (1 + len(self.windows))
        self.first = nn.Linear(len(self.scales) * self.width, m.hidden)
        self.last = nn.Conv2d(m.hidden, config.data.num_classes, 1)
        self.mean, self.std = INPUT_SCALINGS[m.input_scaling]
        if padding == "same":
            for conv in self.modules():
                if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1:
                    conv.__class__ = _Same
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _block6(convs, channels):
        layers = []
        for kernel, width in convs:
            layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
            channels = width
        return nn.Sequential(*layers)

    def forward(self, images):
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # channels last as they come
        height, width = x.shape[2:]
        # The first layer of the head is linear as upsampling is, so it goes first, as in ours; it is faster here too.
        weights = self.first.weight.split(self.width, dim=1)
        hidden, grid = [], None
        for scale, block6, weight in zip(self.scales, self.block6, weights, strict=True):
            size = max(1, round(scale * height)), max(1, round(scale * width))
            maps = self._maps(_resize(x, size), block6)
            hidden.append(F.conv2d(maps, weight[:, :, None, None]))
            grid = max(grid or (0, 0), tuple(maps.shape[2:]))
        total = sum(_resize(part, grid) for part in hidden) + self.first.bias.view(1, -1, 1, 1)
        return self.last(F.relu(total))

    def _maps(self, x, block6):
        with torch.no_grad():
            x = self.frozen(x)
        x = block6(self.trained(x))
        pooled, done = [x], 1
        for window in self.windows:  # 9 is 5 after 5
            step = window - done + 1
            pooled.append(F.max_pool2d(pooled[-1], step, stride=1, padding=step // 2))
            done = window
        return torch.cat(pooled, dim=1)

    def groups(self, options):
        """AdamW's groups: the backbone and the rest, kernels with weight decay and biases without."""
        backbone, groups = {id(p) for p in self.trained.parameters()}, []
        for of_backbone, decayed in itertools.product((True, False), (True, False)):
            params = [p for p in self.parameters() if p.requires_grad]
            params = [p for p in params if (id(p) in backbone) == of_backbone and (p.ndim > 1) == decayed]
            factor, decay = options.backbone_factor if of_backbone else 1.0, options.weight_decay if decayed else 0.0
            groups.append(dict(params=params, weight_decay=decay, factor=factor))
        return groups

    @torch.no_grad()
    def take(self, layers):
        """Our parameters, (kernel, bias) of layer after layer."""
        modules = [*self.frozen.modules(), *self.trained.modules(), *self.block6.modules()]
        own = [*(x for x in modules if isinstance(x, nn.Conv2d)), self.first, self.last]
        for module, (kernel, bias) in zip(own, layers, strict=True):
            kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
            module.weight.copy_(torch.tensor(kernel).view(*kernel.shape, *[1] * (module.weight.ndim - kernel.ndim)))
            module.bias.copy_(torch.tensor(bias))


def _resize(x, size):
    """Bilinear, antialiased where it shrinks."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    shrinks = size[0] < x.shape[2]
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=shrinks)


class Torch:
    """A network with its optimizer; its steps take batches of the host.

    config: of ours, as JSON. layers: our parameters, which it begins with.
    """

    def __init__(self, config, padding="own", layers=None, compiled=False):
        self.config = config = json.loads(config, object_hook=lambda section: SimpleNamespace(**section))
        self.net = Net(config, padding)
        if layers is not None:
            self.net.take(layers)
        self._call = torch.compile(self.net) if compiled else self.net
        self._optimizer = torch.optim.AdamW(self.net.groups(config.optimizer), fused=True)
        self._trained = [p for p in self.net.parameters() if p.requires_grad]
        self._taken, self._confusion = 0, np.int64(0)

    def num_params(self):
        return sum(p.numel() for p in self.net.parameters())

    def train(self, batch):
        """(loss, norm of the gradient) of a training step."""
        options, num_steps = self.config.optimizer, self.config.train.steps
        warm, after = self._taken + 1, max(self._taken - options.warmup_steps, 0)
        share = min(warm / (options.warmup_steps + 1), 1.0) * (1 - after / (num_steps - options.warmup_steps)) ** 0.9
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * share * group["factor"]
        self._optimizer.zero_grad()
        total, count = self._likelihood(self._call(torch.from_numpy(batch["image"])), torch.from_numpy(batch["label"]))
        loss = -total / count.clamp(min=1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._trained, options.clip_norm)
        self._optimizer.step()
        self._taken += 1
        return loss.item(), norm.item()

    @torch.inference_mode()
    def evaluate(self, batch):
        """(int64 confusions [1 + bands, K, K], sum and count of the log-likelihood) of a batch."""
        labels = torch.from_numpy(batch["label"])
        scores = self._call(torch.from_numpy(batch["image"]))
        log_probs = F.log_softmax(scores, dim=1)
        pixels = F.interpolate(log_probs, tuple(labels.shape[1:]), mode="bilinear", align_corners=False)
        confusion = _confusions(pixels.argmax(dim=1), labels, self.config.data.num_classes)
        self._confusion = self._confusion + confusion
        return confusion, tuple(x.item() for x in self._likelihood(scores, labels))

    @torch.inference_mode()
    def scores(self, images):
        return self.net(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()

    def _likelihood(self, scores, labels):
        """Sum and count of the log-likelihood at the centres of cells, classes balanced in each image."""
        rows, cols = (
            (2 * torch.arange(n) + 1) * size // (2 * n)
            for n, size in zip(scores.shape[2:], labels.shape[1:], strict=True)
        )
        grid = labels[:, rows[:, None], cols].long()
        num_classes = scores.shape[1]
        counts = torch.stack([torch.bincount(x[x != VOID], minlength=num_classes) for x in grid]).float()
        balance = counts.clamp(min=1) ** -self.config.loss.balance_power
        balance *= (counts.sum(1) / (counts * balance).sum(1).clamp(min=1e-12))[:, None]
        valid = grid != VOID
        weight = torch.where(valid, balance.gather(1, torch.where(valid, grid, 0).flatten(1)).view_as(grid), 0.0)
        losses = F.cross_entropy(scores, grid, ignore_index=VOID, reduction="none")
        return -(weight * losses).sum(), weight.sum()


def _confusions(predictions, labels, num_classes):
    """int64 [1 + bands, K, K] of the frame and of the bands along boundaries, by one count."""
    shifted = labels[:, None].float()
    inside = torch.zeros_like(labels, dtype=torch.int64)
    for width in BAND_WIDTHS:  # each lies in the next
        window, pad = 2 * width + 1, width
        highest, lowest = (
            F.max_pool2d(F.max_pool2d(x, (window, 1), 1, (pad, 0)), (1, window), 1, (0, pad))
            for x in (shifted, -shifted)
        )
        inside += (highest != -lowest)[:, 0]
    index = (inside * num_classes + labels) * num_classes + predictions
    counts = torch.bincount(index[labels != VOID], minlength=(1 + len(BAND_WIDTHS)) * num_classes**2)
    # Whole frame, the widest band, ..., the narrowest; ours has the bands the other way.
    counts = counts.view(-1, num_classes, num_classes).flip(0).cumsum(0).flip(0)
    return counts[[0, *range(len(BAND_WIDTHS), 0, -1)]].numpy()
