"""python -m lorvp.export BUNDLE --to torch-export|onnx: a tuned model as one file that runs without this package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from torch.export import Dim, ExportedProgram

from lorvp import bundle, cli
from lorvp.errors import UserError
from lorvp.files import replacing
from lorvp.methods import Method

Format = Literal["torch-export", "onnx"]
FILE_NAMES: dict[Format, str] = {"torch-export": "model.pt2", "onnx": "model.onnx"}
ABOUT = "lorvp.json"
"""Of a torch-export file's extra files: the class names, the image size and the trial's hash."""

TOLERANCE = 1e-4
TRACED, CHECKED = 2, (1, 5)
"""Images of the batch that a program is made from, and of those that it is checked on."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(soft_wrap=True)


def export(method: Method, to: Format, out: Path) -> float:
    """Writes a loaded bundle, on the CPU, as a program to `out`; how far its logits are from the bundle's, at most.

    The program takes images (N, 3, L, L) uint8 of any N, resized to the backbone's L as `lorvp.images.decode` does, and
    returns logits (N, classes) float32. It computes in fp32 whatever the trial's precision was, since half precision
    is a matter of the device it will run on, and is compared with the bundle in fp32.

    The written file is read again and run on a few random images, and takes its place only then. Raises UserError if a
    logit differs by more than 1e-4 of the largest one, or of 1 where all are smaller; for a model that can't be
    exported, packages that are missing, and an `out` that can't be written.
    """
    if to == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    write, read = {"torch-export": (_write_program, _read_program), "onnx": (_write_onnx, _read_onnx)}[to]
    try:
        with replacing(out) as temporary, _in_fp32(method), torch.no_grad():
            temporary.touch()  # fails at once where it would after minutes
            write(_traced(method), method, temporary)
            deviation = _deviation(method, read(temporary))
            if not deviation <= TOLERANCE:  # NaN included
                raise UserError(
                    f"{out}: not written: its logits differ from the bundle's by {deviation:.1e}, "
                    f"which must be {TOLERANCE:.0e} at most"
                )
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror})") from None
    return deviation


def about(method: Method) -> dict[str, str]:
    """What a program's user has to know, each value as JSON."""
    values = {
        "class_names": method.class_names,
        "image_size": method.backbone.image_size,
        "trial": method.config.content_hash(),
    }
    return {name: json.dumps(value) for name, value in values.items()}


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--to onnx needs {", ".join(missing)}: pip install "lorvp[onnx]"')


@contextmanager
def _in_fp32(method: Method) -> Iterator[None]:
    own, method.backbone.dtype = method.backbone.dtype, torch.float32
    try:
        yield
    finally:
        method.backbone.dtype = own


def _images(method: Method, count: int) -> torch.Tensor:
    side = method.backbone.image_size
    return torch.randint(
        256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


def _traced(method: Method) -> ExportedProgram:
    return torch.export.export(
        method, (_images(method, TRACED),), dynamic_shapes={"images": {0: Dim("N", min=1)}}
    )


def _write_program(program: ExportedProgram, method: Method, path: Path) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={ABOUT: json.dumps(about(method))})


def _read_program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(program: ExportedProgram, method: Method, path: Path) -> None:
    onnx = torch.onnx.export(program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    onnx.model.metadata_props.update(about(method))
    onnx.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _deviation(method: Method, program: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest difference of a logit, in units of the largest logit, or of 1 where all are smaller."""
    found = []
    for count in CHECKED:
        images = _images(method, count)
        expected = method(images)
        found.append((program(images) - expected).abs().max() / expected.abs().max().clamp(min=1))
    return max(found).item()
