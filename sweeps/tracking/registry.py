"""A bundle as a registered model in MLflow, and back.

The model has two flavours: `pyfunc` takes encoded images and gives classes and probabilities, `pytorch` takes pixels
and gives logits. Both run the exported program, which needs neither timm nor its weights; the bundle lies beside it.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array
from PIL import Image

from lorvp.bundle.format import CARD, EXAMPLE, describe
from lorvp.errors import UserError
from lorvp.utils.explain import without_passwords
from lorvp.utils.paths import ROOT
from sweeps.tracking.retry import first_line

MODEL = "best_prompt"
ALIAS = "best"
TRIAL = "lorvp.trial"
MOST_CHARACTERS = 5000
"""That MLflow's table has room for in a description."""
PACKAGES = ("torch", "numpy", "pillow", "pandas")
"""What a served model imports, beside MLflow."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    ),
)


def register(
    client: MlflowClient, uri: str, run_id: str, name: str, bundle: Path, trial: str, verdict: list[str]
) -> str:
    """Log a bundle as the run's model, registers it as `name` and lets the alias `best` mean it; its URI.

    Its description is the bundle's card, and what the sweep found in words (`verdict`). A trial's bundle is registered
    once. Raises UserError where the bundle can't be loaded or exported here.
    """
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version_found = next((model_version for model_version in versions if model_version.tags.get(TRIAL) == trial), None)
    if version_found is None:
        mlflow.set_tracking_uri(uri)
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's own, about what it will change
            logged = Model.log(artifact_path=None, name=MODEL, flavor=_Flavours, bundle=bundle)
            with suppress(mlflow.MlflowException):  # it is there
                client.create_registered_model(name)
            source = f"models:/{logged.model_id}"
            version_found = client.create_model_version(name, source, run_id, {TRIAL: trial}, model_id=logged.model_id)
        metrics = describe(bundle)["metrics"]
        for key in ("val_top1", "test_top1"):
            if metrics[key] is not None:
                client.set_model_version_tag(name, version_found.version, key, f"{metrics[key]:.2f}")
    sweep = "\n".join(["", "## The sweep", "", *(f"- {line}" for line in verdict), ""])
    client.update_model_version(name, version_found.version, ((bundle / CARD).read_text() + sweep)[:MOST_CHARACTERS])
    client.set_registered_model_alias(name, ALIAS, version_found.version)
    return f"models:/{name}@{ALIAS}"


class _Flavours:
    """What `Model.log` takes for a flavour: something that saves a model to a folder."""

    @staticmethod
    def save_model(path: str, mlflow_model: Model, bundle: Path) -> None:
        import torch

        from lorvp import export
        from lorvp.bundle import io as bundles

        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "program"
            program.mkdir()
            method = bundles.load(bundle, module=describe(bundle)["config"]["backbone"].get("module"))
            export.export(method, "torch-export", program / "model.pt2")  # as MLflow calls it
            mlflow.pyfunc.save_model(
                path,
                mlflow_model=mlflow_model,
                python_model=str(Path(__file__).parent / "pyfunc_model.py"),
                artifacts={"bundle": str(bundle), "program": str(program)},
                signature=SIGNATURE,
                input_example=example(bundle),
                code_paths=[str(ROOT / "lorvp")],
                pip_requirements=[f"{package}=={version(package)}" for package in PACKAGES],
            )
        mlflow_model.add_flavor("pytorch", model_data="artifacts/program", pytorch_version=str(torch.__version__))
        mlflow_model.save(os.path.join(path, "MLmodel"))


def example(bundle: Path) -> pd.DataFrame:
    """Return a bundle's example image as the model takes it: a JPEG."""
    file = io.BytesIO()
    with Image.open(bundle / EXAMPLE) as picture:
        picture.save(file, "JPEG")
    return pd.DataFrame({"image": [file.getvalue()]})


def load(uri: str, module: Path | None = None) -> Any:
    """Return the tuned model that MLflow holds at `runs:/RUN/best_prompt`, `runs:/RUN/bundle` or `models:/NAME@best`.

    As `lorvp.load` gives it, which takes `module`. Raises UserError for a URI that MLflow refuses, or that leads to no
    bundle.
    """
    from lorvp.bundle import io as bundles  # it takes torch

    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except (mlflow.MlflowException, OSError) as error:
        place = without_passwords(mlflow.get_tracking_uri())
        raise UserError(f"{uri}: MLflow at {place} does not give it: {first_line(error)}") from None
    inner = folder / "artifacts" / "bundle"
    return bundles.load(inner if inner.is_dir() else folder, module=module)
