"""GaLore against float64 NumPy and torch's AdamW, over changes of the projector and over a checkpoint."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lorvp.errors import UserError
from lorvp.optim.galore import GaLore, state_bytes

SHAPES = [(9, 6), (6, 9), (6, 3, 2, 2), (7,)]
RANK, GAP, SCALE, DECAY = 3, 3, 0.25, 0.1


@pytest.fixture(params=[32, 8])
def bits(request: pytest.FixtureRequest) -> int:
    if request.param == 8:
        pytest.importorskip("torchao", reason="8-bit moments need torchao: pip install -e '.[galore8bit]'")
    return request.param


def clear_gradient(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of a matrix whose singular values are a whole 1 apart, so that float32 finds the singular vectors."""
    u, s, vh = np.linalg.svd(random.standard_normal((shape[0], int(np.prod(shape[1:])))), full_matrices=False)
    return (u * np.arange(len(s), 0, -1) @ vh).reshape(shape)


def last_step(gradients: list[np.ndarray], bases: list[np.ndarray], lr: float) -> np.ndarray:
    """What the last of these gradients takes off a weight: moments as sums over all steps, `bases` one a step."""
    t = len(gradients)
    projected = [g @ b if g.shape[0] >= g.shape[1] else b.T @ g for g, b in zip(gradients, bases, strict=True)]
    mean = sum(0.1 * 0.9 ** (t - i) * g for i, g in enumerate(projected, 1)) / (1 - 0.9**t)
    square = sum(0.001 * 0.999 ** (t - i) * g**2 for i, g in enumerate(projected, 1)) / (1 - 0.999**t)
    update, shape = mean / (np.sqrt(square) + 1e-8), gradients[-1].shape
    return lr * SCALE * (update @ bases[-1].T if shape[0] >= shape[1] else bases[-1] @ update)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_papers_algorithm(shape):
    """An SVD leaves the sign of each singular vector open and, where singular values differ, nothing else.

    Within one basis a flipped sign cancels: it flips the projected gradient and mean, and flips them back. Over a
    change of basis it does not, as the mean is carried over as it is. So the reference checks that its own vectors are
    the optimizer's up to the sign, and takes that sign: the result is the algorithm's for one of its valid SVDs.
    """
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape).astype(np.float32)
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = GaLore([parameter], 0.1, DECAY, RANK, GAP, SCALE)
    expected, gradients, bases = weight.astype(np.float64), [], []
    for step in range(7):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        gradient = clear_gradient(random, shape) if len(shape) > 1 else random.standard_normal(shape)
        parameter.grad = torch.from_numpy(gradient).float()
        optimizer.step()

        gradients.append(gradient.reshape(shape[0], -1))
        expected = expected * (1 - lr * DECAY)
        if len(shape) == 1:  # not projected: one basis that is the identity, and no scale
            expected = expected - last_step(gradients, [np.eye(1)] * len(gradients), lr)[:, 0] / SCALE
        else:
            if step % GAP == 0:
                u, _, vh = np.linalg.svd(gradients[-1])
                basis = vh[:RANK].T if gradients[-1].shape[0] >= gradients[-1].shape[1] else u[:, :RANK]
                overlap = (basis * optimizer.state[parameter]["projector"].numpy()).sum(0)
                np.testing.assert_allclose(np.abs(overlap), 1, atol=1e-5)
                basis = basis * np.sign(overlap)
            bases.append(basis)
            expected = expected - last_step(gradients, bases, lr).reshape(shape)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert ("projector" in optimizer.state[parameter]) == (len(shape) > 1)


@pytest.mark.parametrize("rank", [6, 12])
def test_without_a_projection_it_is_adamw(rank):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, ()]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = GaLore(ours, 0.1, DECAY, rank), torch.optim.AdamW(theirs, 0.1, weight_decay=DECAY)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class Net(nn.Sequential):
    """A projected convolution whose moments have 4,096 values, one that is not projected and has more, and the rest."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(1, 128, 8), nn.ReLU(), nn.Conv2d(128, 32, 2)
        super().__init__(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        self.to(dtype=dtype, memory_format=torch.channels_last)

    def optimizer(self, **options: object) -> GaLore:
        first, *others = self.parameters()
        groups = [{"params": [first]}, {"params": others, "lr": 0.005}]
        return GaLore(groups, 0.01, DECAY, rank=32, update_gap=3, **options)

    def steps(self, optimizer: torch.optim.Optimizer, first: int, end: int) -> list[float]:
        losses = []
        for step in range(first, end):
            draw = torch.Generator().manual_seed(step % 2)
            images = torch.randn(32, 1, 9, 9, generator=draw).to(self[0].weight.dtype)
            labels = torch.randint(0, 10, (32,), generator=draw)
            loss = nn.functional.cross_entropy(self(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_goes_on_as_if_never_left(bits, dtype):
    whole, before, after = Net(dtype), Net(dtype), Net(dtype)
    whole.steps(whole.optimizer(bits=bits), 0, 8)
    optimizer = before.optimizer(bits=bits)
    before.steps(optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"model": before.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert b"torchao" not in file.getvalue()  # or another process could not read it before it has imported that
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    after.load_state_dict(state["model"])
    optimizer = after.optimizer(bits=bits)
    optimizer.load_state_dict(state["optimizer"])
    after.steps(optimizer, 4, 8)  # on with the old basis, then with a new one
    assert_same(whole, after)


def test_per_layer_is_the_same_and_keeps_one_gradient(bits):
    plain, per_layer = Net(), Net()
    alive = []
    for parameter in per_layer.parameters():  # before the optimizer's own hooks
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in per_layer.parameters()))
        )
    optimizer = per_layer.optimizer(bits=bits, per_layer=True)
    plain.steps(plain.optimizer(bits=bits), 0, 3)
    per_layer.steps(optimizer, 0, 3)
    optimizer.load_state_dict(optimizer.state_dict())  # the hooks see the new groups
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    per_layer.steps(optimizer, 3, 5)
    assert_same(plain, per_layer)
    assert set(alive) == {1}
    assert all(p.grad is None for p in per_layer.parameters())


def test_it_learns(bits):
    net = Net()
    losses = net.steps(net.optimizer(bits=bits), 0, 60)
    assert losses[0] > 2
    assert losses[-1] < 0.2


def test_8_bits_are_near_32_and_smaller():
    """On the same gradients: left to their own, the two would soon take the SVDs of different ones."""
    pytest.importorskip("torchao", reason="8-bit moments need torchao: pip install -e '.[galore8bit]'")
    moved, sizes = {}, {}
    for bits in (32, 8):
        torch.manual_seed(0)
        shapes = [(128, 64), (4096,), (9,)]  # projected, not, and too small for 8 bits
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        means = [torch.randn_like(p) for p in parameters]
        optimizer = GaLore(parameters, 0.01, rank=32, update_gap=3, bits=bits)
        for _ in range(8):
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean + torch.randn_like(parameter)
            optimizer.step()
        moved[bits], sizes[bits] = [p.detach() for p in parameters], state_bytes(optimizer)
    for few, many in zip(moved[8], moved[32], strict=True):
        assert (few - many).norm() < 0.03 * many.norm()
    moment = 4096 + 4096 // 256 * 4 + 256 * 4  # codes, scales, and the table of what codes mean
    assert sizes == {32: (64 * 32 + 4 * 4096 + 2 * 9) * 4, 8: (64 * 32 + 2 * 9) * 4 + 4 * moment}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_weights(bits, bad):
    net = Net()
    optimizer = net.optimizer(bits=bits)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, bad)
    optimizer.step()
    assert not any(p.isfinite().any() for p in net.parameters())


def test_state_of_a_vit_small():
    """On no data at all: tensors on the meta device have shapes only, and say how many bytes they would take."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=10)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    galore, adamw = GaLore(model.parameters(), 0.01, rank=128), torch.optim.AdamW(model.parameters(), 0.01)
    galore.step()
    adamw.step()
    numbers = sum(p.numel() for p in model.parameters())
    assert state_bytes(adamw) == 2 * 4 * numbers + 4 * len(list(model.parameters()))  # and a step each
    assert state_bytes(galore) / state_bytes(adamw) == pytest.approx(0.393, abs=0.001)


def test_what_it_can_not_do_is_said(monkeypatch):
    with pytest.raises(ValueError, match="bits 16"):
        Net().optimizer(bits=16)
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(UserError, match="pip install 'torchao"):
        Net().optimizer(bits=8)
