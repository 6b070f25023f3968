"""Where MLflow keeps what a sweep sends it, known without MLflow: it takes 2 to 4 s of CPU to import and to open."""

from __future__ import annotations

import importlib.util
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from lorvp.utils.explain import without_passwords
from sweeps.spec.model import Spec

SQLITE = "sqlite:///"


def tracking_uri(spec: Spec) -> str:
    """Return the spec's, else the environment's, else SQLite in the output folder."""
    return spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{spec.output / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """Return the command that shows the store."""
    uri = without_passwords(uri)
    return f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def is_sure_to_open(uri: str, experiment: str) -> bool:
    """Return whether MLflow will open the store without an error, as far as a look at a SQLite file can tell.

    That is a file yet to be made, or one with the tables of the MLflow that is installed, which has not got the
    experiment in its trash. Of any other store: False.
    """
    if not uri.startswith(SQLITE) or "?" in uri:
        return False
    path = Path(uri.removeprefix(SQLITE))
    if not path.exists():
        return path.parent.is_dir() and os.access(path.parent, os.W_OK)
    try:
        with closing(sqlite3.connect(path)) as database:
            (revision,) = database.execute("select version_num from alembic_version").fetchone()
            query = "select count(*) from experiments where name = ? and lifecycle_stage != 'active'"
            (deleted,) = database.execute(query, (experiment,)).fetchone()
    except (sqlite3.Error, TypeError):  # not a database, of another kind, or one that is being made
        return False
    return not deleted and revision == _installed_revision() and os.access(path, os.W_OK)


def _installed_revision() -> str | None:
    """Return the revision of the tables that the installed MLflow makes: the one that no other follows."""
    package = importlib.util.find_spec("mlflow")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    texts = [file.read_text() for file in folder.glob("*.py")]
    revisions = {
        key: set(re.findall(rf'^{key} = "(\w+)"', "\n".join(texts), re.M)) for key in ("revision", "down_revision")
    }
    last = revisions["revision"] - revisions["down_revision"]
    return last.pop() if len(last) == 1 else None
