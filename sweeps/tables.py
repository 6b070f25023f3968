"""python -m sweeps.tables SWEEP...: the results of several sweeps in one table, in Markdown, LaTeX and Parquet.

A row is a network, pre-training, dataset and method with the best config that was found for it, its control, and the
published accuracy where `sweeps/published.yaml` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from lorvp.config import TrialConfig
from lorvp.utils import cli
from lorvp.utils.files import replacing
from sweeps.results.leaderboard import number
from sweeps.results.rows import SCHEMA, Published, Result, published, results

NOT_CONFIRMED = "not confirmed"
BIASED = "published (biased)"
NOTES = {
    NOT_CONFIRMED: "one trial of the search under one seed, the luckiest of many: no sd, no interval",
    BIASED: "select: test_best_epoch: each figure is that of the best epoch on the test set itself (docs/protocol.md)",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


def cells(result: Result, known: Published | None, ood: Sequence[str]) -> dict[str, str]:
    """Return a result as it is shown, by column; of each OOD set the control's figure is in brackets."""
    config, difference = result.entry.trial.config, result.difference
    named = dict(zip(("network", "pre-training", "dataset", "method"), result.key, strict=True))
    return (
        named
        | {"LR": learning_rates_cell(result.lrs())}
        | {"mapping": config.head.kind, "rank": number(config.rank)}
        | {"epochs": str(config.epochs), "batch": str(config.batch_size)}
        | {"top-1": str(result.top1), "n": str(len(result.row.entries))}
        | {"control": str(result.control_top1 or "-"), "difference": str(difference or "-")}
        | {name: ood_cell(result.ood.get(name)) for name in ood}
        | {"published": published_cell(known, config)}
        | {"protocol": protocol(result)}
    )


def published_cell(known: Published | None, config: TrialConfig) -> str:
    """Return a published figure, and in brackets what is known to differ."""
    if known is None:
        return "unknown"
    unlike = known.differs_by(config)
    return f"{known.top1:.1f}" + (f" ({unlike})" if unlike else "")


def learning_rates_cell(lrs: dict[str, float]) -> str:
    """Return one number where all parts share it, as published; none of a head that was fitted."""
    if len(set(lrs.values())) == 1:
        return number(next(iter(lrs.values())))
    return ", ".join(f"{part} {number(lr)}" for part, lr in lrs.items()) or "-"


def ood_cell(top1: dict[str, float] | None) -> str:
    """Format the top-1 on an OOD set, the control's in brackets."""
    if not top1:
        return "-"
    return f"{top1['best']:.2f}" + (f" ({top1['control']:.2f})" if "control" in top1 else "")


def protocol(result: Result) -> str:
    """Name the protocol of a result, and what is biased about it."""
    marks = ["val" if result.select == "val" else BIASED] + [NOT_CONFIRMED] * (not result.confirmed)
    return ", ".join(marks)


def markdown(rows: Sequence[dict[str, str]], sources: Sequence[str]) -> str:
    """Format the rows as a Markdown table, with notes and sources."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines]
    used = [f"- {mark}: {text}" for mark, text in NOTES.items() if any(mark in row["protocol"] for row in rows)]
    return "\n".join([*table, "", "Accuracies in %, differences in points.", "", *used, *sources]).strip() + "\n"


def latex(rows: Sequence[dict[str, str]]) -> str:
    """Return a tabular with booktabs' rules."""
    import pandas  # which takes a second to import

    styler = pandas.DataFrame(rows).style.hide(axis="index")
    styler = styler.format(escape="latex").format_index(escape="latex", axis=1)
    return styler.to_latex(hrules=True).replace("±", r"$\pm$")


@app.command()
def command(
    sweeps: Annotated[list[Path], typer.Argument(metavar="SWEEP...", help="folders of sweeps that have ended")],
    out: Annotated[Path, typer.Option(help="folder to write tables.md, .tex and .parquet into")] = Path("runs"),
) -> None:
    """Gathers the results of sweeps into the rows of a paper's table."""
    known = published()
    rows_found = sorted((result for folder in sweeps for result in results(folder)), key=lambda result: result.key)
    ood = list(dict.fromkeys(name for result in rows_found for name in result.ood))
    published_rows = [result.published(known) for result in rows_found]
    rows = [cells(result, published_row, ood) for result, published_row in zip(rows_found, published_rows, strict=True)]
    cited = {published_row.source for published_row in published_rows if published_row}
    records = [
        result.record(published_row)
        | {f"ood.{name}.{model}": top1 for name, models in result.ood.items() for model, top1 in models.items()}
        for result, published_row in zip(rows_found, published_rows, strict=True)
    ]
    columns = [(f"ood.{name}.{model}", pa.float64()) for name in ood for model in ("best", "control")]
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "tables.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(records, pa.schema([*SCHEMA, *columns])), temporary)
    text = markdown(rows, [f"- published: {source}" for source in sorted(cited)])
    for name, content in (("tables.md", text), ("tables.tex", latex(rows))):
        with replacing(out / name) as temporary:
            temporary.write_text(content)
    console.print(text, highlight=False, markup=False)
    console.print(f"written: {out}/tables.md, tables.tex, tables.parquet", highlight=False)


if __name__ == "__main__":
    cli.run(app)
