"""What timm has: its architectures, their weights' tags, and what is known of each; and what is wrong with a backbone's
name by that.

    python -m lorvp.models.architectures [FILE.py]

prints it as JSON, with the architectures that FILE.py registers. Asking so takes seconds and needs torch, so the answer
is kept in the cache's folder, and a driver reads it there without either.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorvp.config import BackboneConfig, TrialConfig
from lorvp.errors import UserError
from lorvp.utils import plugins
from lorvp.utils.files import cache_folder, replacing
from lorvp.utils.paths import ROOT

HUB, FOLDER = "hf-hub:", "local-dir:"
Problem = tuple[str, str]
"""The key of a trial that is wrong, by dotted path, and why; no key for two that don't go together."""


@dataclass(frozen=True)
class Weights:
    """What a pretrained_cfg says."""

    classes: int
    there: bool
    """Whether timm knows where they are."""


@dataclass(frozen=True)
class Known:
    """What is registered."""

    architectures: dict[str, dict[str, Weights]]
    """By name and tag, the default tag first; nothing by tag where there is no pretrained_cfg."""
    deprecated: dict[str, str | None]
    """Names of earlier versions, and what timm takes them for; None where it is gone."""

    def current(self, name: str) -> str:
        """A name as it is today."""
        architecture, _, tag = name.partition(".")
        new = self.deprecated.get(architecture)
        if new is None:
            return name
        return f"{new.partition('.')[0]}.{tag}" if tag else new

    def near(self, name: str) -> str:
        """The end of an error about `name`: those that look like it."""
        names = list(self.architectures)
        if "." in name:
            names += [f"{each}.{tag}" for each, tags in self.architectures.items() for tag in tags if tag]
        close = difflib.get_close_matches(name, names, n=4)
        close = close or difflib.get_close_matches(name.partition(".")[0], list(self.architectures), n=4)
        return f"; near: {', '.join(close)}" if close else ""


def from_timm(name: str = "") -> Known:
    """What is registered in this process; of a model `name` that is, only what belongs to its architecture.

    To ask timm for all of its models takes a quarter of a second, which a job need not spend.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models

    import lorvp.models.tiny  # noqa: F401  registers ours

    architecture, deprecated = name.partition(".")[0], get_deprecated_models()
    alone = timm.is_model(architecture) and architecture not in deprecated
    found: dict[str, dict[str, Weights]] = {}
    for each in [architecture] if alone else timm.list_models():
        configs = get_arch_pretrained_cfgs(each)
        found[each] = {
            full.partition(".")[2]: Weights(config.num_classes, bool(config.has_weights))
            for full, config in configs.items()
        }
    return Known(found, deprecated)


def known(module: Path | None = None) -> Known | None:
    """What is registered once the file `module` has run; None where timm can't be asked.

    Raises UserError for a file that can't be run.
    """
    if "timm" in sys.modules:
        if module is not None:
            plugins.run_file(module)
        return from_timm()
    try:
        code = [Path(__file__), Path(__file__).with_name("tiny.py"), *([module] if module else [])]
        digest = hashlib.sha256(b"".join([version("timm").encode(), *(path.read_bytes() for path in code)])).hexdigest()
    except OSError as error:
        raise UserError(f"backbone.module: {module} can't be read ({error.strerror})") from None
    kept: Path | None = None
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):  # a cache that may be deleted at any time
        kept = cache_folder() / f"timm-{digest[:24]}.json"
        return _read(kept.read_text())
    asked = _ask(module)
    if asked is not None and kept is not None:
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as temporary:
                temporary.write_text(json.dumps(asdict(asked)))
    return asked


def _ask(module: Path | None) -> Known | None:
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-m", __name__, *([str(module)] if module else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    return _read(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@functools.lru_cache(maxsize=1)
def _read(text: str) -> Known:
    values = json.loads(text)
    found = {
        name: {tag: Weights(**each) for tag, each in tags.items()} for name, tags in values["architectures"].items()
    }
    return Known(found, values["deprecated"])


def problem(config: TrialConfig, known: Known) -> Problem | None:
    """What of a trial's backbone can't be, as far as it is known before the weights are there."""
    backbone = config.backbone
    found = problem_of(backbone, known)
    if found is not None:
        return f"backbone.{found[0]}".rstrip("."), found[1]
    classes = backbone.kwargs.get("num_classes", _classes(backbone, known))
    if config.reads_logits and classes == 0 and backbone.zero_shot is None:
        return "", no_classifier(config)
    return None


def no_classifier(config: TrialConfig) -> str:
    return (
        f"label_mapping {config.label_mapping} reads source classes, and {config.backbone.name} has no classifier: "
        "label_mapping must be lp"
    )


def problem_of(backbone: BackboneConfig, known: Known) -> Problem | None:
    """What of a backbone's own keys can't be."""
    if backbone.name.startswith((HUB, FOLDER)):
        described = description(backbone.name)
        if described is None:
            return None
        if isinstance(described, str):
            return "name", described
        architecture = described.get("architecture")
        if architecture not in known.architectures and architecture not in known.deprecated:
            return "name", f"{backbone.name} is of architecture {architecture!r}, which timm does not have"
        return _missing(backbone, [key for key in ("input_size", "mean", "std") if _of(described, key) is None])
    current = known.current(backbone.name)
    architecture, _, tag = current.partition(".")
    if architecture in known.deprecated:
        return "name", f"timm has {architecture} no more, and nothing in its place"
    if architecture not in known.architectures:
        own = f", nor does {backbone.module} register it" if backbone.module else ""
        return "name", f"timm has no model {backbone.name!r}{own}{known.near(current)}"
    tags = known.architectures[architecture]
    if not tags and tag:
        return "name", f"{architecture} is registered without weights' tags: leave out .{tag}"
    if not tags:
        no_weights = backbone.pretrained and backbone.checkpoint is None
        return _no_weights(architecture, []) if no_weights else _missing(backbone, ["input_size", "mean", "std"])
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, list(tags), n=4) or list(tags)[:8]
        return "name", f"timm has no weights {tag!r} of {architecture}; {_those(architecture, close)}"
    weights = tags[tag] if tag else next(iter(tags.values()))
    overlaid = "file" in backbone.kwargs.get("pretrained_cfg_overlay", {})
    if backbone.pretrained and backbone.checkpoint is None and not weights.there and not overlaid:
        return _no_weights(current, [each for each, found in tags.items() if found.there])
    return None


def description(name: str, ask_the_hub: bool = False) -> dict[str, Any] | str | None:
    """The config.json of a model in a folder or on the hub, or why there is none.

    Of the hub what was downloaded before, else None; with `ask_the_hub` it is downloaded, and is None only where the
    hub can't be reached.
    """
    try:
        if name.startswith(FOLDER):
            path = Path(name.removeprefix(FOLDER)) / "config.json"
        else:
            downloaded = _from_hub(name.removeprefix(HUB), ask_the_hub)
            if downloaded is None:
                return None
            path = Path(downloaded)
        values = json.loads(path.read_text())
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {(error.strerror or type(error).__name__).lower()}; a folder that timm saved a model to has it"
    except ValueError:
        return f"{path}: not JSON"
    return values if isinstance(values, dict) else f"{path}: not what timm writes: a list of keys is expected"


def _from_hub(model: str, download: bool) -> str | None:
    """Where a model's config.json lies. Raises UserError where the hub has none of that name."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        if download:
            return hf_hub_download(repository, "config.json", revision=revision or None)
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        return found if isinstance(found, str) else None
    except HFValidationError:
        form = f"{HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION"
        raise UserError(f"{HUB}{model} is no name of a model: it must be {form}") from None
    except LocalEntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise UserError(f"the hub has no {HUB}{model} for you (HTTP {status})") from None
        return None
    except Exception:  # no way to the hub, in the words of whichever library it goes by; a job may have one
        return None


def _of(described: dict[str, Any], key: str) -> Any:
    """A value of a config.json, of the present layout or of the earlier one."""
    return described.get(key, described.get("pretrained_cfg", {}).get(key))


def _classes(backbone: BackboneConfig, known: Known) -> int | None:
    """The classes of the source; None where that isn't known."""
    if backbone.name.startswith((HUB, FOLDER)):
        described = description(backbone.name)
        return _of(described, "num_classes") if isinstance(described, dict) else None
    architecture, _, tag = known.current(backbone.name).partition(".")
    tags = known.architectures[architecture]
    weights = tags.get(tag) or next(iter(tags.values()), None)
    return weights.classes if weights else None


def _missing(backbone: BackboneConfig, unknown: list[str]) -> Problem | None:
    given = {"input_size": backbone.image_size, "mean": backbone.mean, "std": backbone.std}
    keys = ["image_size" if key == "input_size" else key for key in unknown if given[key] is None]
    if not keys:
        return None
    return "", f"{backbone.name} comes without a pretrained_cfg that says it: give {', '.join(keys)}"


def _no_weights(name: str, tags: list[str]) -> Problem:
    others = f", {_those(name.partition('.')[0], tags)}" if tags else ""
    return "name", f"timm has no weights of {name}{others}: set checkpoint, or pretrained: false for random ones"


def _those(architecture: str, tags: list[str]) -> str:
    return f"it has {', '.join(f'{architecture}.{tag}' for tag in tags)}"


def main(arguments: list[str]) -> int:
    try:
        if arguments:
            import timm  # noqa: F401  what the file registers comes after timm's own

            plugins.run_file(Path(arguments[0]))
        print(json.dumps(asdict(from_timm())))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
