"""The sweep's best prompt as MLflow loads and serves it; this file travels with the model.

`mlflow.pyfunc.load_model(uri).predict(images)`, and `mlflow models serve`.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class TunedModel(PythonModel):
    """The tuned model as MLflow's pyfunc.

    It takes a column `image` of encoded images (JPEG, PNG ...), of any size, and gives a row of `class`, `probability`
    and all `probabilities`, in the order of the bundle's class names.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported program and the class names."""
        from lorvp.bundle.format import describe

        description = describe(Path(context.artifacts["bundle"]))
        self.class_names: list[str] = description["class_names"]
        self.image_size: int = description["source"]["image_size"]
        self.program = mlflow.pytorch.load_model(str(Path(context.artifacts["program"]).parents[1]))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Classify encoded images. Raises UserError for one that can't be decoded."""
        import numpy as np
        import torch

        from lorvp.data.decode import decode

        decoded = [
            decode(data, self.image_size, name=f"image {i}") for i, data in enumerate(model_input["image"], start=1)
        ]
        with torch.inference_mode():
            probabilities = self.program(torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)).softmax(1)
        top = probabilities.max(1)
        return pd.DataFrame(
            {
                "class": [self.class_names[place] for place in top.indices.tolist()],
                "probability": top.values.tolist(),
                "probabilities": probabilities.tolist(),
            }
        )


mlflow.models.set_model(TunedModel())
