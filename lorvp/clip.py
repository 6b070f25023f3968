"""Make zero-shot weights with open_clip: text embeddings as the source classes of CLIP's image tower.

    python -m lorvp.clip ViT-B-32 openai --classes NAMES.txt --out imagenet.safetensors

`backbone.zero_shot` names the file. Each text's unit vector is then a source class, whose logit is 100 times the cosine
(Radford et al. 2021), and RLM, FLM, ILM and FM map from these classes. open_clip is the optional extra `clip`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch.nn import functional as F

from lorvp.errors import UserError
from lorvp.utils import cli
from lorvp.utils.files import replacing

TEXTS = "a photo of a {}."
"""Default text of a class."""


def main(
    model: Annotated[str, typer.Argument(help="open_clip model name, as ViT-B-32")],
    pretrained: Annotated[str, typer.Argument(help="its weights: a tag, a file, or an empty text for random ones")],
    classes: Annotated[Path, typer.Option(exists=True, help="a class name a line")],
    out: Annotated[Path, typer.Option(help="safetensors file to write")],
    text: Annotated[list[str], typer.Option(help="with {} for the name; several are averaged")] = [TEXTS],  # noqa: B006
) -> None:
    """Write the text tower's unit vectors of class names."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'lorvp[clip]'") from None
    names = [line.strip() for line in classes.read_text().splitlines() if line.strip()]
    if not names:
        raise UserError(f"--classes {classes}: no class name in it")
    tower = open_clip.create_model(model, pretrained=pretrained or None).eval()
    tokenize = open_clip.get_tokenizer(model)
    with torch.inference_mode():
        embeddings = [
            F.normalize(tower.encode_text(tokenize([template.format(name) for name in names])), dim=1)
            for template in text
        ]
        texts = F.normalize(torch.stack(embeddings).mean(0), dim=1)
    with replacing(out) as temporary:
        save_file({"texts": texts.float().contiguous()}, temporary, metadata={"classes": "\n".join(names)})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    cli.run(app)
