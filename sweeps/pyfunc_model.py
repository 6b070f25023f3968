"""The sweep's best prompt as MLflow loads it: `mlflow.pyfunc.load_model(uri).predict(images)`."""

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext


class TunedModel(PythonModel):
    """Takes (N, H, W, 3) uint8 images of any size and returns downstream logits (N, classes) float32."""

    def load_context(self, context: PythonModelContext) -> None:
        import lorvp

        self.model = lorvp.load(context.artifacts["bundle"])

    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            images = torch.from_numpy(np.ascontiguousarray(model_input)).permute(0, 3, 1, 2)
            return self.model(images).numpy()


mlflow.models.set_model(TunedModel())
