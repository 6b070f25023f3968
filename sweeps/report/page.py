"""The page of a report, and its pictures: what a sweep found, in the sweep's folder."""

from __future__ import annotations

import base64
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from lorvp.utils.files import replacing
from sweeps.report.drawing import picture_of, png
from sweeps.report.figures import SECTIONS
from sweeps.report.stopping import stopping_lines
from sweeps.results.leaderboard import MARKS, Leaderboard
from sweeps.results.next_steps import next_steps
from sweeps.results.outcome import Outcome

REPORT, PICTURES = "report.html", "report"


def write(outcome: Outcome) -> Path:
    """Write report.html and its figures, report/NAME.png, into the sweep's folder; return the page's path.

    The page needs no other file and no server. An earlier report is replaced.
    """
    folder, sections = outcome.spec.folder, []
    with replacing(folder / PICTURES) as temporary:
        temporary.mkdir()
        for name, section in SECTIONS.items():
            made = section.make(outcome)
            content: dict[str, Any] = {
                "name": name,
                "title": section.title,
                "text": section.caption if made else section.otherwise,
            }
            if made:
                picture = png(picture_of(made) if isinstance(made, Table) else made)
                (temporary / f"{name}.png").write_bytes(picture)
                content |= _shown(made) if isinstance(made, Table) else {"picture": base64.b64encode(picture).decode()}
            sections.append({"picture": None, "table": None} | content)
    path = folder / REPORT
    with replacing(path) as temporary:
        temporary.write_text(_page(outcome, sections))
    return path


def _shown(table: Table) -> dict[str, Any]:
    return {"table": table, "rows": list(zip(*(column.cells for column in table.columns), strict=True))}


def _page(outcome: Outcome, sections: list[dict[str, Any]]) -> str:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    spec = outcome.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return environment.get_template("report.jinja").render(
        name=outcome.spec.name,
        when=_when(outcome.board),
        trials=_trials(outcome.board),
        verdict=[*outcome.verdict(), *outcome.board.rung_correlation(), *stopping_lines(outcome.board)],
        steps=next_steps(outcome),
        spec=json.dumps(spec, indent=2),
        sections=sections,
    )


def _when(board: Leaderboard) -> str:
    """From the first epoch's start to the last one's end."""
    results = [result for entry in board.entries for result in entry.results]
    start = min(result["time"] - result["seconds"] for result in results)
    end = max(result["time"] for result in results)
    first, last = (f"{datetime.fromtimestamp(time).astimezone():%Y-%m-%d %H:%M %Z}" for time in (start, end))
    return f"{first} to {last}"


def _trials(board: Leaderboard) -> str:
    """Count the trials, by how they ended."""
    ends = Counter(MARKS[entry.end.state] or "finished" if entry.end else "unfinished" for entry in board.entries)
    return f"{len(board.entries)} trials: {', '.join(f'{count} {end}' for end, count in ends.most_common())}"
