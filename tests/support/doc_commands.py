"""What the documentation has a reader type: commands and Python, in its pages and at the head of the sweeps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cluster.snapshot import CHECKOUT

PAGES = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
    *sorted((CHECKOUT / "sweeps").glob("*.yaml")),
]
SHELL = re.compile(r"(python3?|pip|make|mlflow|git|squeue|sbatch|scancel|kill|export|\.venv/bin/\w+)( +[^ ]|$)")
PYTHON = re.compile(r"(import |from \S+ import |with |for |\w+ = |[a-z]\w*(\.\w+)+)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every one on a page: in its blocks, after a `$ ` or without, and in the midst of its text."""
    text = page.read_text()
    if page.suffix == ".yaml":
        text = "".join(line[2:] for line in re.findall(r"^#.*\n", text, re.MULTILINE))
    blocks = [block for kind, block in FENCED.findall(text) if kind in ("", "sh", "bash", "console", "shell")]
    blocks += [block for kind, block in FENCED.findall(text) if kind == "python" and not block.startswith("# ")]
    text = FENCED.sub("", text)
    blocks += re.findall(r"^    .*\n", re.sub(r"\\\n\s*", "", text), re.MULTILINE)
    spans = [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*\n", "", text, flags=re.MULTILINE))
    ]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [*filter(None, map(_command, lines)), *(span for span in spans if SHELL.match(span) and " " in span)]


def _command(line: str) -> str:
    """What there is to type in a line of a block, without its comment; nothing in a line of output."""
    line = re.sub(r"\s+#.*| &$", "", line.strip().removeprefix("$ ")).strip()
    return line if SHELL.match(line) or is_python(line) else ""


def is_python(line: str) -> bool:
    """Whether a line is a statement, and not a command or its output; a bare annotation is a key of YAML."""
    try:
        return bool(PYTHON.match(line)) and not isinstance(ast.parse(line).body[0], ast.AnnAssign)
    except SyntaxError:
        return False
