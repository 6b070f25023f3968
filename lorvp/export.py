"""python -m lorvp.export BUNDLE --to torch-export|onnx: a tuned model as one file that runs without this package."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch.export import Dim, ExportedProgram

from lorvp.bundle import io as bundle
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.utils import cli
from lorvp.utils.files import replacing

Format = Literal["torch-export", "onnx"]
Program = Callable[[torch.Tensor], torch.Tensor]

ABOUT = "lorvp.json"
"""Of a torch-export file's extra files the one that has, as JSON, what `about` says."""
TOLERANCE = 1e-4
TRACED = 2
CHECKED = (1, 5)
"""Images of the batch that a program is made from, and of those that it is checked on."""

USE: dict[Format, tuple[str, str, str]] = {
    "torch-export": (
        "model.pt2",
        'program = torch.export.load("{file}").module()',
        "logits = program(images)  # a tensor (N, 3, {side}, {side}) uint8 to one (N, {classes}) float32",
    ),
    "onnx": (
        "model.onnx",
        'session = onnxruntime.InferenceSession("{file}")',
        'logits, = session.run(None, {{"images": images}})  '
        "# an array (N, 3, {side}, {side}) uint8 to one (N, {classes}) float32",
    ),
}
"""What a program's file is called unless told, and how it is run."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = cli.make_console()


def export(method: Method, to: Format, out: Path) -> float:
    """Writes a loaded bundle, on the CPU, as a program to `out`; the largest deviation of its logits from the bundle's.

    The program takes images (N, 3, L, L) uint8 of any N, resized to the backbone's L as `lorvp.data.decode` does, and
    returns logits (N, classes) float32. It computes in fp32 whatever the trial's precision was, since half precision
    is a matter of the device that it will run on, and it is compared with the bundle in fp32.

    The written file is read again and run on a few random images, and only then it takes its place. Raises UserError
    where a logit deviates by more than 1e-4 of the largest one (of 1, where all are smaller), and for a model that
    can't be exported, missing packages, and an `out` that can't be written.
    """
    if to == "onnx":
        _check_installed("onnx", "onnxscript", "onnxruntime")
    write, read = {"torch-export": (_write_program, _read_program), "onnx": (_write_onnx, _read_onnx)}[to]
    try:
        with replacing(out) as temporary, _in_fp32(method), torch.no_grad():
            temporary.touch()  # what can't be written shows now, not after minutes
            write(method, temporary)
            deviation = _deviation(method, read(temporary))
            if not deviation <= TOLERANCE:  # NaN is no number to be below it
                limit = f"{TOLERANCE:.0e} of the largest one at most"
                raise UserError(f"{out}: not written: logits deviate from the bundle's by {deviation:.2g}, {limit}")
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror})") from None
    return deviation


def about(method: Method) -> dict[str, Any]:
    """What one has to know to use a program."""
    return {
        "class_names": method.class_names,
        "image_size": method.side,
        "trial": method.config.content_hash(),
    }


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a tuned prompt")],
    to: Annotated[Format, typer.Option(help="what kind of program")],
    out: Annotated[Path | None, typer.Option(help="the file to write; default: model.pt2 or model.onnx, here")] = None,
    module: cli.Module = None,
) -> None:
    """Exports a bundle as a program that runs without this package, and checks that it says the same."""
    file_name, *lines = USE[to]
    out = out or Path(file_name)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of what it leaves unsimplified
    method = bundle.load(folder, module=module)
    deviation = export(method, to, out)
    console.print(f"written: {out}, {out.stat().st_size / 2**20:.2f} MiB", highlight=False)
    console.print(f"its logits are the bundle's, in fp32: the largest deviation is {deviation:.2g}", highlight=False)
    for line in lines:
        filled = line.format(file=out, side=method.side, classes=method.classes)
        console.print(f"    {filled}", markup=False, highlight=False)


def _check_installed(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--to onnx needs {", ".join(missing)}: pip install "lorvp[onnx]"')


@contextmanager
def _in_fp32(method: Method) -> Iterator[None]:
    own = method.backbone.dtype
    method.backbone.dtype = torch.float32
    try:
        yield
    finally:
        method.backbone.dtype = own


def _images(method: Method, count: int) -> torch.Tensor:
    """Random pixels, of each count always the same."""
    side = method.side
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def _traced(method: Method) -> ExportedProgram:
    with _refused(method):
        return torch.export.export(method, (_images(method, TRACED),), dynamic_shapes=({0: Dim("N", min=1)},))


def _write_program(method: Method, path: Path) -> None:
    program = _traced(method)
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # it knows contiguous ones only, no channels_last
        torch.export.save(program, file, extra_files={ABOUT: json.dumps(about(method))})


def _read_program(path: Path) -> Program:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(method: Method, path: Path) -> None:
    program = _traced(method)
    with _refused(method):
        onnx = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "N"}},  # its name; that it is dynamic the program knows
            verbose=False,
        )
    assert onnx is not None  # without dynamo it may be
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about(method).items()}
    onnx.model.metadata_props.update(texts)
    onnx.save(path, external_data=False)


def _read_onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextmanager
def _refused(method: Method) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the exporters each raise their own kinds
        config = method.config
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{config.method} on {config.backbone.name} can't be exported: {reason}") from error


def _deviation(method: Method, program: Program) -> float:
    """How far logits are from the bundle's at most, as a share of the largest one, or of 1 where all are smaller."""
    found = []
    for count in CHECKED:
        images = _images(method, count)
        expected = method(images)
        logits = program(images)
        if (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
            return math.inf
        found.append((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack(found).max().item()  # NaN where one is


if __name__ == "__main__":
    cli.run(app)
