"""List timm's architectures and their weights' tags, and check a backbone's name against them.

    python -m lorvp.models.architectures [FILE.py]

prints the list as JSON, with the architectures that FILE.py registers. Making the list takes seconds and needs torch,
so it is kept in the cache's folder, where a driver reads it without torch.
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
FAMILIES = {"VisionTransformer": "vit", "VisionTransformerDistilled": "vit", "SwinTransformer": "swin"}
"""The families that adapters tell apart, by timm's class."""
Problem = tuple[str, str]
"""The dotted path of a trial's wrong key, and the reason; an empty path if two keys don't go together."""


@dataclass(frozen=True)
class Weights:
    """Hold what a pretrained_cfg says about weights."""

    classes: int
    available: bool
    """Whether timm knows where to get them."""


@dataclass(frozen=True)
class Registry:
    """Hold the architectures that are registered with timm."""

    architectures: dict[str, dict[str, Weights]]
    """Weights by architecture and tag, the default tag first; no tags if there is no pretrained_cfg."""
    deprecated: dict[str, str | None]
    """Names of earlier versions and their present names; None if the architecture is gone."""
    families: dict[str, str]
    """`vit`, `swin` or `other` by architecture, as far as it is known."""

    def current(self, name: str) -> str:
        """Return the present form of a name of an earlier version."""
        architecture, _, tag = name.partition(".")
        new = self.deprecated.get(architecture)
        if new is None:
            return name
        return f"{new.partition('.')[0]}.{tag}" if tag else new

    def suggest(self, name: str) -> str:
        """Return the end of an error about `name`: up to four similar names, or nothing."""
        names = list(self.architectures)
        if "." in name:
            names += [
                f"{architecture}.{tag}" for architecture, tags in self.architectures.items() for tag in tags if tag
            ]
        close = difflib.get_close_matches(name, names, n=4)
        close = close or difflib.get_close_matches(name.partition(".")[0], list(self.architectures), n=4)
        return f"; near: {', '.join(close)}" if close else ""


def from_timm(name: str = "") -> Registry:
    """Read timm's registry in this process; for a registered model `name`, its architecture alone.

    Listing all of timm's models takes a quarter of a second, which a job need not spend.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models

    import lorvp.models.tiny  # noqa: F401  registers ours

    architecture, deprecated = name.partition(".")[0], get_deprecated_models()
    alone = timm.is_model(architecture) and architecture not in deprecated
    weights: dict[str, dict[str, Weights]] = {}
    for model_name in [architecture] if alone else timm.list_models():
        configs = get_arch_pretrained_cfgs(model_name)
        weights[model_name] = {
            full.partition(".")[2]: Weights(config.num_classes, bool(config.has_weights))
            for full, config in configs.items()
        }
    return Registry(weights, deprecated, {name: family for name in weights if (family := _family_of(name))})


def _family_of(architecture: str) -> str | None:
    """Return the family by the class that timm's function for the architecture says it returns; None if it doesn't."""
    import timm

    returned = timm.model_entrypoint(architecture).__annotations__.get("return")
    name = returned if isinstance(returned, str) else getattr(returned, "__name__", None)
    return None if name is None else FAMILIES.get(name, "other")


def load_registry(module: Path | None = None) -> Registry | None:
    """Return the registry once the file `module` has run, from the cache if possible; None if timm can't be asked.

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
    cache_path: Path | None = None
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):  # a cache that may be deleted at any time
        cache_path = cache_folder() / f"timm-{digest[:24]}.json"
        return _parse_registry(cache_path.read_text())
    registry = _query_subprocess(module)
    if registry is not None and cache_path is not None:
        with suppress(OSError):
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache_path) as temporary:
                temporary.write_text(json.dumps(asdict(registry)))
    return registry


def _query_subprocess(module: Path | None) -> Registry | None:
    """Run this module in a process of its own, as timm imports torch."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-m", __name__, *([str(module)] if module else [])]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode == 2:
        raise UserError(process.stderr.strip().splitlines()[-1])
    return _parse_registry(process.stdout.splitlines()[-1]) if process.returncode == 0 else None


@functools.lru_cache(maxsize=1)
def _parse_registry(text: str) -> Registry:
    values = json.loads(text)
    weights = {
        name: {tag: Weights(**fields) for tag, fields in tags.items()} for name, tags in values["architectures"].items()
    }
    return Registry(weights, values["deprecated"], values["families"])


def find_problem(config: TrialConfig, registry: Registry) -> Problem | None:
    """Find what is wrong with a trial's backbone, as far as this can be told before its weights are loaded."""
    backbone = config.backbone
    problem = find_backbone_problem(backbone, registry)
    if problem is not None:
        return f"backbone.{problem[0]}".rstrip("."), problem[1]
    classes = backbone.kwargs.get("num_classes", _source_classes(backbone, registry))
    if config.head.input == "logits" and classes == 0 and backbone.zero_shot is None:
        return "head.kind", no_classifier(config.head.kind, backbone.name)
    family = _family(backbone, registry)
    unfit = None if family is None else config.adapter.backbone_problem(backbone.name, family, config.prompt.trained)
    return (f"adapter.{unfit[0]}".rstrip("."), unfit[1]) if unfit else None


def no_classifier(head: str, backbone: str) -> str:
    """Return the error for a head that needs source classes on a backbone that has none."""
    return f"head {head} reads source classes, and {backbone} has no classifier: head.kind must be lp"


def find_backbone_problem(backbone: BackboneConfig, registry: Registry) -> Problem | None:
    """Find what is wrong with a backbone's own keys. The key is relative to the backbone."""
    if backbone.name.startswith((HUB, FOLDER)):
        model_config = description(backbone.name)
        if model_config is None:
            return None
        if isinstance(model_config, str):
            return "name", model_config
        architecture = model_config.get("architecture")
        if architecture not in registry.architectures and architecture not in registry.deprecated:
            return "name", f"{backbone.name} is of architecture {architecture!r}, which timm does not have"
        return _missing(
            backbone, [key for key in ("input_size", "mean", "std") if _model_value(model_config, key) is None]
        )
    current = registry.current(backbone.name)
    architecture, _, tag = current.partition(".")
    if architecture in registry.deprecated:
        return "name", f"timm has {architecture} no more, and nothing in its place"
    if architecture not in registry.architectures:
        own = f", nor does {backbone.module} register it" if backbone.module else ""
        return "name", f"timm has no model {backbone.name!r}{own}{registry.suggest(current)}"
    tags = registry.architectures[architecture]
    if not tags and tag:
        return "name", f"{architecture} is registered without weights' tags: leave out .{tag}"
    if not tags:
        no_weights = backbone.pretrained and backbone.checkpoint is None
        return _no_weights(architecture, []) if no_weights else _missing(backbone, ["input_size", "mean", "std"])
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, list(tags), n=4) or list(tags)[:8]
        return "name", f"timm has no weights {tag!r} of {architecture}; {_list_weights(architecture, close)}"
    weights = tags[tag] if tag else next(iter(tags.values()))
    overlaid = "file" in backbone.kwargs.get("pretrained_cfg_overlay", {})
    if backbone.pretrained and backbone.checkpoint is None and not weights.available and not overlaid:
        return _no_weights(current, [name for name, other in tags.items() if other.available])
    return None


def description(name: str, ask_the_hub: bool = False) -> dict[str, Any] | str | None:
    """Read the config.json of a model in a folder or on the hub, or return the reason why it can't be read.

    For a model on the hub, read the downloaded copy, and return None if there is none. With `ask_the_hub` the file is
    downloaded, and the result is None only if the hub can't be reached.
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
    """Return the path of a hub model's config.json, or None. Raises UserError if the hub has no such model."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        if download:
            return hf_hub_download(repository, "config.json", revision=revision or None)
        path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        return path if isinstance(path, str) else None
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
    except Exception:  # the hub can't be reached, whichever library says so; a job may reach it
        return None


def _model_value(model_config: dict[str, Any], key: str) -> Any:
    """Return a value of a config.json in the present layout or the earlier one."""
    return model_config.get(key, model_config.get("pretrained_cfg", {}).get(key))


def _source_classes(backbone: BackboneConfig, registry: Registry) -> int | None:
    """Return the number of source classes; None if it isn't known."""
    if backbone.name.startswith((HUB, FOLDER)):
        model_config = description(backbone.name)
        return _model_value(model_config, "num_classes") if isinstance(model_config, dict) else None
    architecture, _, tag = registry.current(backbone.name).partition(".")
    tags = registry.architectures[architecture]
    weights = tags.get(tag) or next(iter(tags.values()), None)
    return weights.classes if weights else None


def _family(backbone: BackboneConfig, registry: Registry) -> str | None:
    """Return the backbone's family; None if it isn't known before the backbone is built."""
    if not backbone.name.startswith((HUB, FOLDER)):
        return registry.families.get(registry.current(backbone.name).partition(".")[0])
    model_config = description(backbone.name)
    return registry.families.get(str(model_config.get("architecture"))) if isinstance(model_config, dict) else None


def _missing(backbone: BackboneConfig, unknown: list[str]) -> Problem | None:
    own_values = {"input_size": backbone.image_size, "mean": backbone.mean, "std": backbone.std}
    keys = ["image_size" if key == "input_size" else key for key in unknown if own_values[key] is None]
    if not keys:
        return None
    return "", f"{backbone.name} comes without a pretrained_cfg that says it: give {', '.join(keys)}"


def _no_weights(name: str, tags: list[str]) -> Problem:
    others = f", {_list_weights(name.partition('.')[0], tags)}" if tags else ""
    return "name", f"timm has no weights of {name}{others}: set checkpoint, or pretrained: false for random ones"


def _list_weights(architecture: str, tags: list[str]) -> str:
    return f"it has {', '.join(f'{architecture}.{tag}' for tag in tags)}"


def main(arguments: list[str]) -> int:
    """Print the registry as JSON; return the exit code, 2 for a file that can't be run."""
    try:
        if arguments:
            import timm  # noqa: F401  timm's own models must be registered before the file's

            plugins.run_file(Path(arguments[0]))
        print(json.dumps(asdict(from_timm())))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
