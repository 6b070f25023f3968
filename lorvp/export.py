"""Export a tuned model to one file that runs without this package: python -m lorvp.export BUNDLE --to FORMAT."""

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
"""Name of the extra file in a torch-export file that holds the values of `about` as JSON."""
TOLERANCE = 1e-4
TRACED = 2
CHECKED = (1, 5)
"""Batch sizes of the images that a program is traced with, and of those that it is checked on."""

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
"""Default file name of each format, and the lines that run it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = cli.make_console()


def export(method: Method, to: Format, out: Path) -> float:
    """Write a loaded bundle, on the CPU, as a program to `out`; return the largest deviation of its logits.

    The program takes images (N, 3, L, L) uint8 of any N, resized to the backbone's L as `lorvp.data.decode` does, and
    returns logits (N, classes) float32. It computes in fp32 whatever the trial's precision was, because half precision
    depends on the device that it will run on.

    The written file is read again, run on a few random images, compared with the bundle in fp32, and then renamed to
    `out`. Raises UserError if a logit deviates by more than 1e-4 of the largest one (of 1 if all are smaller), if the
    model can't be exported, if packages are missing, or if `out` can't be written.
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
    """Return what a program's users need: class names, image size and trial."""
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
    """Export a bundle as a program that runs without this package, and check that its outputs are the same."""
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
    """Draw random pixels, the same each time for the same count."""
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
    """Return the largest deviation from the bundle's logits, relative to the largest logit, or to 1 if larger."""
    deviations = []
    for count in CHECKED:
        images = _images(method, count)
        expected = method(images)
        logits = program(images)
        if (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
            return math.inf
        deviations.append((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack(deviations).max().item()  # NaN where one is


if __name__ == "__main__":
    cli.run(app)
