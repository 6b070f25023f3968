"""Each way to go faster gives what the plain backbone gives: in float64, to the last digits, gradients included."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

from lorvp import bench
from lorvp.backbone import Backbone
from lorvp.config import BackboneConfig, SpeedConfig
from lorvp.speed import ClassTokenBlock, SplitConv, accelerate, fold_batchnorm

PLAIN = SpeedConfig(**dict.fromkeys(SpeedConfig.model_fields, False))
KEYS = [key for key in SpeedConfig.model_fields if key != "keep_memory"]  # which is not the backbone's
BACKBONES = {
    "resnet18": {},
    "mobilenetv2_100": {"pad_type": "same"},
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_base_patch16_224_miil": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (3, 6)},
    "lorvp_tiny_32.cifar10": {},
}


def build(name: str, speed: SpeedConfig) -> Backbone:
    torch.manual_seed(0)
    size = 64 if name in ("resnet18", "mobilenetv2_100") else None  # float64 takes its time
    config = BackboneConfig(name=name, pretrained=name.startswith("lorvp"), kwargs=BACKBONES[name], image_size=size)
    backbone = Backbone(config, "fp32", PLAIN)
    with torch.no_grad():
        for module in backbone.modules():  # fresh statistics would make folding trivial
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("lorvp"):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    backbone = backbone.double()
    backbone._first = accelerate(backbone.model, speed, backbone.image_size)
    return backbone


def outputs(backbone: Backbone, images: torch.Tensor, added: torch.Tensor, output: str) -> list[torch.Tensor]:
    """What a step uses: the output without and with a prompt, and the gradients of the prompt and of the images.

    The images' is that of a method which learns how they are placed.
    """
    added, placed = added.clone().requires_grad_(), images.clone().requires_grad_()
    plain = backbone(images, output)
    prompted = backbone(placed, output, added)
    (prompted**2).sum().backward()
    return [plain.detach(), prompted.detach(), added.grad, placed.grad]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("key", ["all", *(pytest.param(key, marks=pytest.mark.slow) for key in KEYS)])
def test_it_is_the_plain_backbone(name, key):
    torch.manual_seed(1)
    speed = SpeedConfig() if key == "all" else PLAIN.model_copy(update={key: True})
    plain, fast = build(name, PLAIN), build(name, speed)
    size = plain.image_size
    images, added = torch.rand(2, 3, size, size, dtype=torch.float64), torch.randn(3, size, size).double() * 0.1
    for output in ("logits", "features"):
        for ours, theirs in zip(
            outputs(fast, images, added, output), outputs(plain, images, added, output), strict=True
        ):
            # outputs are rounded to float32 at their end, so the comparison is of that
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * theirs.abs().max().item())


def test_they_are_used_where_they_apply():
    resnet = build("resnet18", SpeedConfig())
    assert not [m for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert isinstance(resnet.model.conv1, SplitConv)
    assert resnet.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    vit = build("vit_tiny_patch16_224", SpeedConfig())
    assert isinstance(vit.model.blocks[-1], ClassTokenBlock)
    assert isinstance(vit.model.patch_embed.proj, SplitConv)


def test_what_can_not_be_folded_is_left_alone():
    """In a pre-activation network a convolution's output goes to a BatchNorm and past it."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.after = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x + self.after(self.norm(x).relu())

    model = PreActivation().eval().requires_grad_(False)
    model.norm.running_var.fill_(4)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert fold_batchnorm(model, 8) == 0
    assert torch.equal(model(x), before)
    assert fold_batchnorm(timm.create_model("resnet18").eval().requires_grad_(False), 64) == 20


def test_a_batchnorm_that_goes_by_the_batch_is_not_folded():
    norms = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 4, 3), norms[1]).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert fold_batchnorm(model, 8) == 1
    assert model[1] is norms[0]
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_benchmarks_print_their_tables():
    tiny = ["--backbone", "lorvp_tiny_32", "--image-size", "32", "--steps", "2", "--rounds", "1"]
    printed = CliRunner().invoke(bench.app, ["step", *tiny, "--levers"]).output
    for ratio in ("ours : plain", "ours : published", "ours : light", *(f"{key} : plain" for key in KEYS)):
        assert ratio in printed
    printed = CliRunner().invoke(bench.app, ["pack", *tiny, "--most", "2"]).output
    assert "packed 2 : packed 1" in printed
    assert "processes 2 : packed 1" in printed


KEEPS = """
import resource, sys
import torch
from lorvp.speed import keep_memory

torch.set_num_threads(1)
keep_memory(sys.argv[1] == "on")
blocks = [torch.ones(12 << 20) for _ in range(3)]  # of 48 MiB
del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_kept_memory_is_not_asked_for_again():
    """Page faults of blocks that are freed and made again."""
    faults = {
        on: int(subprocess.run([sys.executable, "-c", KEEPS, on], capture_output=True, text=True, check=True).stdout)
        for on in ("on", "off")
    }
    assert faults["off"] > 20 * max(1, faults["on"])
