from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import digits_values
from PIL import Image
from sklearn.datasets import load_digits
from support.ports import reserve
from support.waiting import LIMIT, answers, wait_for

import lorvp
import sweeps
from lorvp.data import decode
from lorvp.errors import UserError
from lorvp.training.loop import train
from sweeps.tracking import registry

pytestmark = pytest.mark.slow


class Registered:
    """A bundle of a second's training, registered in SQLite."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.bundle = bundle
        self.store = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.store)
        self.client = mlflow.MlflowClient(self.store)
        experiment = self.client.create_experiment("x", artifact_location=(folder / "artifacts").as_uri())
        self.run_id = self.client.create_run(experiment).info.run_id
        self.uri = self.register("a trial")

    def register(self, trial: str) -> str:
        verdict = [f"{trial}: the difference may be none"]
        return registry.register(self.client, self.store, self.run_id, "digits", self.bundle, trial, verdict)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registered")
    list(train(lorvp.TrialConfig.model_validate(digits_values(epochs=1)), folder=folder))
    return Registered(folder, folder / "bundle")


def jpeg(digit: int) -> bytes:
    """A written digit, enlarged, as a file."""
    pixels = (load_digits().images[digit] * 15).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 48)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def test_a_registered_model_says_what_it_is(registered):
    assert registered.uri == "models:/digits@best"
    version = registered.client.get_model_version_by_alias("digits", "best")
    description = json.loads((registered.bundle / "config.json").read_text())
    card = (registered.bundle / "README.md").read_text()
    assert version.description == f"{card}\n## The sweep\n\n- a trial: the difference may be none\n"
    assert version.tags["val_top1"] == f"{description['metrics']['val_top1']:.2f}"
    assert version.run_id == registered.run_id
    info = mlflow.models.get_model_info(registered.uri)
    assert set(info.flavors) == {"python_function", "pytorch"}
    assert info.signature == registry.SIGNATURE
    example = mlflow.pyfunc.load_model(registered.uri).input_example
    with Image.open(io.BytesIO(example["image"][0])) as picture:
        assert picture.format == "JPEG"


def test_a_trial_is_registered_once_and_the_alias_means_the_last(registered):
    registered.register("a trial")
    assert len(registered.client.search_model_versions("name = 'digits'")) == 1
    registered.register("another")
    assert registered.client.get_model_version_by_alias("digits", "best").version == 2
    registered.register("a trial")
    assert registered.client.get_model_version_by_alias("digits", "best").version == 1


def test_both_flavours_give_what_the_bundle_gives(registered):
    method = lorvp.load(registered.bundle)
    files = [jpeg(digit) for digit in range(5)]
    pixels = np.stack([decode.decode(file, method.backbone.image_size) for file in files])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = method(pixels)
        torch.testing.assert_close(mlflow.pytorch.load_model(registered.uri)(pixels), logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(sweeps.load(registered.uri)(pixels), logits, rtol=0, atol=0)
    found = mlflow.pyfunc.load_model(registered.uri).predict(pd.DataFrame({"image": files}))
    expected = logits.softmax(1)
    np.testing.assert_allclose(np.stack(found["probabilities"]), expected.numpy(), atol=1e-4)
    assert list(found["class"]) == [method.class_names[place] for place in expected.argmax(1)]
    np.testing.assert_allclose(found["probability"], expected.max(1).values.numpy(), atol=1e-4)


def test_an_image_that_is_none_is_named(registered):
    model = mlflow.pyfunc.load_model(registered.uri)
    with pytest.raises(UserError, match="'image 2': not a readable image"):
        model.predict(pd.DataFrame({"image": [jpeg(0), b"GIF?"]}))


@pytest.mark.parametrize("uri", ["models:/nothing@best", "models:/digits/99", "runs:/0123/bundle", "nonsense"])
def test_what_mlflow_does_not_hold_is_told_in_a_line(registered, uri):
    with pytest.raises(UserError) as said:
        sweeps.load(uri)
    assert str(said.value).startswith(f"{uri}: ")
    assert "\n" not in str(said.value)


def test_a_served_model_takes_a_jpeg(registered, tmp_path):
    port = reserve()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", registered.uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    environment = os.environ | {"MLFLOW_TRACKING_URI": registered.store, "PATH": path}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        said, ping = (tmp_path / "log").read_text, f"http://127.0.0.1:{port}/ping"
        wait_for("the served model", lambda: answers(ping) or server.poll() is not None, said=said)
        assert server.poll() is None, said()
        image = jpeg(3)
        body = {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image).decode()]]}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        (answer,) = json.loads(urllib.request.urlopen(request, timeout=LIMIT).read())["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(LIMIT)
    method = lorvp.load(registered.bundle)
    pixels = torch.from_numpy(decode.decode(image, method.backbone.image_size)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = method(pixels).softmax(1)[0]
    np.testing.assert_allclose(answer["probabilities"], expected.numpy(), atol=1e-4)
    assert answer["class"] == method.class_names[expected.argmax()]
