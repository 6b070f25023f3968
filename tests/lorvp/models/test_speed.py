"""Each way to go faster gives what the plain backbone gives: in float64, to the last digits, gradients included."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from lorvp.bench import __main__ as bench
from lorvp.config import BackboneConfig, SpeedConfig
from lorvp.models.backbone import Backbone
from lorvp.models.speed import (
    AttentionByProducts,
    ClassTokenBlock,
    FasterAttention,
    SplitConv,
    accelerate,
    fold_batchnorm,
    probe_outputs,
)

PLAIN = SpeedConfig(**dict.fromkeys(SpeedConfig.model_fields, False))
OTHERS = ("attention_by_products", "keep_memory")  # of bf16 alone, and not the backbone's
KEYS = [key for key in SpeedConfig.model_fields if key not in OTHERS]
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
    backbone._split_conv = accelerate(backbone.model, speed, backbone.image_size)
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


@cache
def given(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and a prompt for a backbone."""
    draw, size = torch.Generator().manual_seed(1), build(name, PLAIN).image_size
    images = torch.rand(2, 3, size, size, dtype=torch.float64, generator=draw)
    return images, torch.randn(3, size, size, generator=draw).double() * 0.1


@cache
def plain_outputs(name: str) -> list[list[torch.Tensor]]:
    plain = build(name, PLAIN)
    return [outputs(plain, *given(name), output) for output in ("logits", "features")]


LARGE = ("resnet18", "mobilenetv2_100", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in BACKBONES])
@pytest.mark.parametrize("key", ["all", *(pytest.param(key, marks=pytest.mark.slow) for key in KEYS)])
def test_it_is_the_plain_backbone(name, key):
    fast = build(name, SpeedConfig() if key == "all" else PLAIN.model_copy(update={key: True}))
    for output, expected in zip(("logits", "features"), plain_outputs(name), strict=True):
        for ours, theirs in zip(outputs(fast, *given(name), output), expected, strict=True):
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


class Net(nn.Module):
    """A model of layers, in timm's words."""

    num_classes = 0

    def __init__(self, *layers: nn.Module, first: str = "") -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.pretrained_cfg = {"first_conv": first or None}
        self.eval().requires_grad_(False)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_what_can_not_be_folded_is_left_alone(capsys):
    """In a pre-activation network a convolution's output goes to a BatchNorm and past it."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.after = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x + self.after(self.norm(x).relu())

    inner = PreActivation()
    model = Net(inner)
    inner.norm.running_var.fill_(4)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    accelerate(model, PLAIN.model_copy(update={"fold_batchnorm": True}), 8)
    assert norms(model) == [inner.norm]
    assert torch.equal(model(x), before)
    assert "speed.fold_batchnorm is left out" in capsys.readouterr().out
    resnet = timm.create_model("resnet18").eval().requires_grad_(False)
    accelerate(resnet, SpeedConfig(), 64)
    assert norms(resnet) == []
    assert not capsys.readouterr().out


def test_a_batchnorm_that_goes_by_the_batch_is_not_folded():
    by_batch, by_itself = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
    model = Net(nn.Conv2d(3, 4, 3), by_batch, nn.Conv2d(4, 4, 3), by_itself)
    by_itself.running_var.fill_(4)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    undo = fold_batchnorm(model, 8)
    assert norms(model) == [by_batch]
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    undo()
    assert norms(model) == [by_batch, by_itself]
    assert torch.equal(model(x), before)


class Patches(nn.Module):
    """The image's quarters as images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part for half in x.chunk(2, 2) for part in half.chunk(2, 3)])


class Together(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(x.chunk(4)).mean(0)


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


class NoGradient(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x - x.detach()) * 3


FIRST = {
    "that does not see the image": (nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 3)),  # as tresnet's
    "that sees parts of it as images": (Patches(), nn.Conv2d(3, 4, 3), Together()),
    "that sees it changed": (Squared(), nn.Conv2d(3, 4, 3)),
    "of which only the gradient differs": (NoGradient(), nn.Conv2d(3, 4, 3)),
    "that is no convolution": (nn.Identity(), nn.ReLU(), nn.Conv2d(3, 4, 3)),
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_first_layer_is_not_split(kind, capsys):
    layers = FIRST[kind]
    model = Net(*layers, nn.Tanh(), first="layers.1")
    before = list(model.modules())
    assert accelerate(model, SpeedConfig(), 16) is None
    assert list(model.modules()) == before
    said = capsys.readouterr().out.splitlines()
    wanted = "speed.split_first_layer is left out: with it the backbone would not say the same"
    assert said == ([] if kind == "that is no convolution" else [wanted])


def test_where_no_gradients_are_taken_the_backbone_is_the_same(capsys):
    config = BackboneConfig(name="lorvp_tiny_32.cifar10")
    with torch.inference_mode():
        made = Backbone(config, "fp32")
    with torch.no_grad():
        assert [type(m) for m in made.modules()] == [type(m) for m in Backbone(config, "fp32").modules()]
    assert made._split_conv is not None
    assert not capsys.readouterr().out


def test_a_model_that_can_not_be_tried_stays_as_it_is(capsys):
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    model = Net(Detached(), nn.Conv2d(3, 4, 3), first="layers.1")
    assert accelerate(model, SpeedConfig(), 16) is None
    assert "the backbone can't be tried: " in capsys.readouterr().out


def test_attention_that_would_differ_is_left_out(monkeypatch, capsys):
    config = BackboneConfig(name="lorvp_tiny_vit_32.cifar10")
    assert Backbone(config, "bf16")._faster_attention
    assert not Backbone(config, "fp32")._faster_attention
    apply = AttentionByProducts.apply
    monkeypatch.setattr(AttentionByProducts, "apply", lambda q, k, v: apply(q, k, v.flip(2)))
    assert not Backbone(config, "bf16")._faster_attention
    assert "speed.attention_by_products is left out" in capsys.readouterr().out


FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""The smallest model of each of timm's modules."""
TOO_LARGE = {"deepseek_vit": "412 M parameters", "gemma4_vit": "167 M parameters"}
SIZES = {"byoanet": 256, "crossvit": 240, "csatv2": 64, "efficientformer": 224}
SIZES |= {"inception_resnet_v2": 96, "inception_v3": 96, "inception_v4": 96, "volo": 64}
"""The smallest that they take, where that is above 32."""
LEFT_OUT = {"maxxvit": ["fold_batchnorm"], "tresnet": ["split_first_layer"]}
"""Pre-activation; and a first convolution that sees the image's pixels as channels."""


def disturb(model: nn.Module) -> None:
    """Fresh statistics, scales and biases would hide what is done with them."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in norms(model):
            if module.running_mean is not None:
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=random))
                module.running_var.copy_(0.5 + 1.5 * torch.rand(module.running_var.shape, generator=random))
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


def test_each_family_is_tried_or_left_out_with_a_reason():
    folder = Path(timm.models.__file__).parent
    families = {module for module in timm.list_modules() if (folder / f"{module}.py").exists()}
    assert families - FAMILIES.keys() - TOO_LARGE.keys() == set()


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *TOO_LARGE])
def test_each_family_says_the_same(family, capsys):
    if family in TOO_LARGE:
        pytest.skip(f"its smallest model has {TOO_LARGE[family]}")
    if not timm.is_model(FAMILIES[family]):
        pytest.skip(f"timm {timm.__version__} has no {FAMILIES[family]}")
    config = BackboneConfig(name=FAMILIES[family], pretrained=False, image_size=SIZES.get(family, 32))
    backbone = Backbone(config, "fp32", PLAIN)
    disturb(backbone.model)
    capsys.readouterr()
    expected = probe_outputs(backbone.model, backbone.image_size)
    accelerate(backbone.model, SpeedConfig(), backbone.image_size)
    lines = [
        f"speed.{key} is left out: with it the backbone would not say the same" for key in LEFT_OUT.get(family, [])
    ]
    assert capsys.readouterr().out.splitlines() == lines
    *ours, gradient = probe_outputs(backbone.model, backbone.image_size)
    *theirs, wanted = expected
    assert wanted.norm() > 0
    for mine, plain in zip(ours, theirs, strict=True):
        assert (mine - plain).norm() < 1e-4 * plain.norm()
    assert (gradient - wanted).norm() < 3e-2 * wanted.norm()  # a unit at its kink is some of it


def attention_and_gradients(attend, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of 5 images, whose scores reach as far as a trained model's."""
    random = torch.Generator().manual_seed(0)
    query, key, value, grad = torch.randn(4, 5, 3, 50, 64, generator=random).bfloat16()
    given = [t.to(dtype).requires_grad_() for t in (3 * query, 3 * key, value)]
    seen = attend(*given)
    seen.backward(grad.to(dtype))
    return [t.double() for t in (seen.detach(), *(each.grad for each in given))]


@pytest.mark.parametrize("images", [1, 2, 5])
def test_attention_by_products_errs_no_more_than_torchs(images, monkeypatch):
    monkeypatch.setattr(AttentionByProducts, "CACHE_BYTES", images * 4 * 3 * 50 * 50)
    exact = attention_and_gradients(F.scaled_dot_product_attention, torch.float64)
    torchs = attention_and_gradients(F.scaled_dot_product_attention, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention_and_gradients(AttentionByProducts.apply, torch.bfloat16)
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        assert (mine - wanted).norm() < 1.3 * (theirs - wanted).norm()


@pytest.mark.slow  # without the hardware, bf16 takes its time
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_attention_by_products_is_used_where_there_is_no_mask(name, monkeypatch):
    calls, apply = [], AttentionByProducts.apply
    monkeypatch.setattr(AttentionByProducts, "apply", lambda *given: calls.append(1) or apply(*given))
    config = BackboneConfig(name=name, pretrained=False, kwargs=BACKBONES[name])
    plain, fast = (Backbone(config, "bf16", PLAIN.model_copy(update={"attention_by_products": on})) for on in (0, 1))
    fast.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    images, added = torch.rand(2, 3, 224, 224), torch.randn(3, 224, 224) * 0.1
    calls.clear()  # the probe's
    expected = outputs(plain, images, added, "features")
    assert not calls
    for ours, theirs in zip(outputs(fast, images, added, "features"), expected, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert len(calls) == (2 * 3 if name.startswith("vit") else 0)


@pytest.mark.parametrize("option", [{"scale": 1.0}, {"is_causal": True}, {"attn_mask": torch.ones(50, 50).tril() > 0}])
def test_other_attention_stays_torchs(option):
    given = torch.randn(3, 2, 3, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.scaled_dot_product_attention(*given, **option)
    with FasterAttention():
        assert F.scaled_dot_product_attention(*given, **option).equal(expected)
        assert F.scaled_dot_product_attention(*given[:, 0]).shape == (3, 50, 64)
    assert not F.scaled_dot_product_attention(*given).equal(expected)


@pytest.mark.slow
def test_the_benchmarks_print_their_tables():
    tiny = ["--backbone", "lorvp_tiny_32", "--image-size", "32", "--steps", "2", "--rounds", "1"]
    printed = CliRunner().invoke(bench.app, ["step", *tiny, "--levers"]).output
    for ratio in ("ours : plain", "ours : published", "ours : light", *(f"{key} : plain" for key in KEYS)):
        assert ratio in printed
    assert "ours : published" in CliRunner().invoke(bench.app, ["step", *tiny, "--jpegs"]).output
    printed = CliRunner().invoke(bench.app, ["pack", *tiny, "--most", "2"]).output
    assert "packed 2 : packed 1" in printed
    assert "processes 2 : packed 1" in printed
    printed = CliRunner().invoke(bench.app, ["augment", "--image-size", "16", "--batch-size", "8", *tiny[-4:]]).output
    assert "color_jitter : crop_flip" in printed


KEEPS = """
import ctypes, resource, sys
import torch
from lorvp.models.speed import keep_memory

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a huge page would take a single fault
torch.set_num_threads(1)
keep_memory(sys.argv[1] == "on")
blocks = [torch.ones(12 << 20) for _ in range(3)]  # of 48 MiB
del blocks
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # the system may take pages back meanwhile
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_kept_memory_is_not_asked_for_again():
    """Page faults of blocks that are freed and made again."""
    faults = {}
    for on in ("on", "off"):  # in a new process: where a forked one's heap may grow is another matter
        done = subprocess.run([sys.executable, "-c", KEEPS, on], capture_output=True, text=True, check=True)
        faults[on] = int(done.stdout)
    assert faults["off"] > 20 * max(1, faults["on"])
