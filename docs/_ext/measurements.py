"""The page of measurements: a section for each CSV file of benchmarks/results, made when the site is built.

It stands in the place of a comment of docs/benchmarks.md, so that the page itself reads well on a code host.
"""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- tables -->"
Row = dict[str, str]

# How a row was made is said above its table, and these are details of it.
_MADE = ("command", "commit", "date", "device", "python", "torch", "triton", "cuda", "guda_fast", "nvcc", "pyarrow")
_DETAILS = ("seeds", "missing", "forwards", "spill_load_bytes", "forget_base", "retain_base", "outside")
_METRICS = ("top-1", "MRR", "NDCG@3", "Spearman")
_LONG = 24  # rows; a longer table is folded


def rows_of(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def described(name: str) -> str:
    """What benchmarks/README.md says of a file: where it names it, or the first paragraph of the benchmark's section.

    Else the first paragraph of the benchmark's own docstring.
    """
    sections = re.split(r"^## (.+)$", (ROOT / "benchmarks" / "README.md").read_text(), flags=re.MULTILINE)
    found = {}
    for title, text in zip(sections[1::2], sections[2::2], strict=True):
        paragraphs = [part for part in text.strip().split("\n\n") if not part.startswith("    ")]
        for paragraph in paragraphs:
            for mentioned in re.findall(r"(\w+)\.csv", paragraph):
                found.setdefault(mentioned, paragraph)
        found.update({key: paragraphs[0] for key in title.split(", ") if key == name})
    module = ROOT / "benchmarks" / f"{name}.py"
    if name not in found and module.is_file():
        found[name] = (ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0]
    if name not in found:
        raise ExtensionError(f"benchmarks/README.md must say what results/{name}.csv is, and has no word of it")
    return found[name]


def _table(header: list[str], lines: list[list[str]]) -> str:
    def cells(line: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"

    right = [
        all(re.fullmatch(r"(?:[-+\d.,e%\[\] ]|&nbsp;)*", line[column]) for line in lines)
        for column in range(len(header))
    ]
    rule = ["---:" if number else "---" for number in right]
    text = "\n".join([cells(header), cells(rule), *map(cells, lines)])
    if len(lines) <= _LONG:
        return text
    return f"<details>\n<summary>{len(lines)} rows</summary>\n\n{text}\n\n</details>"


def _varied(rows: list[Row], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def _ratios(rows: list[Row]) -> str:
    """A line for each case: the rival's milliseconds, and the ratio of every other contender."""
    parts = _varied(rows, ("instruction_set", "threads"))
    keys = [*_varied(rows, ("run", "op")), "shapes", *_varied(rows, ("dtype",))]
    cases: dict[tuple[str, ...], Row] = {}
    for row in rows:
        sets = {other["instruction_set"] for other in rows if other["backend"] == row["backend"]}
        extra = [row[part] for part in parts if part != "instruction_set" or len(sets) > 1]
        if "threads" in parts:
            extra[-1] += " thread" if extra[-1] == "1" else " threads"
        case = cases.setdefault(tuple(row[key] for key in keys), {f"{row['rival']}, ms": row["rival_median_ms"]})
        if row["backend"] != row["rival"]:
            case[", ".join([row["backend"], *extra])] = f"{float(row['ratio']):.3g}"
    columns = list(dict.fromkeys(name for case in cases.values() for name in case))
    return _table([*keys, *columns], [[*case, *(of.get(name, "") for name in columns)] for case, of in cases.items()])


def _interval(row: Row, middle: str) -> str:
    ends = [row[end] for end in ("low", "high")]
    value = f"{float(row[middle]):.3f}" if row[middle] else ""
    return f"{value} [{float(ends[0]):.3f},&nbsp;{float(ends[1]):.3f}]" if all(ends) else value


def _metrics(rows: list[Row]) -> str:
    """A line for each method: the mean of each metric over queries, with its interval."""
    methods: dict[str, Row] = {}
    for row in rows:
        methods.setdefault(row["method"], {})[row["metric"]] = _interval(row, "mean")
    lines = [[method, *(of.get(metric, "") for metric in _METRICS)] for method, of in methods.items()]
    return _table(["method", *_METRICS], lines)


def _plain(rows: list[Row]) -> str:
    """What differs between rows as a table, and what does not before it."""
    shown = [key for key in rows[0] if key not in _MADE + _DETAILS]
    differ = [key for key in shown if key in _varied(rows, tuple(shown)) and key not in ("low", "high")]
    same = ", ".join(f"{key} {rows[0][key]}" for key in shown if key not in differ and key not in ("low", "high"))
    lines = [[_interval(row, key) if key == "share" else row[key] for key in differ] for row in rows]
    return (f"Of all rows: {same}.\n\n" if same else "") + _table(differ, lines)


def section(path: Path, said: dict[str, str]) -> str:
    """The section of one CSV file, as Markdown. said: what was described already, and in which section."""
    rows, name = rows_of(path), path.stem
    text = described(name)
    first = said.setdefault(text, name)
    timed, compared = "rival_median_ms" in rows[0], "metric" in rows[0]
    table = _ratios(rows) if timed else _metrics(rows) if compared else _plain(rows)
    made = dict.fromkeys(tuple(row.get(key) or "" for key in ("command", "commit", "date", "device")) for row in rows)
    lines = [
        f"* `{command}`, commit `{commit}`, {date}" + (f", {device}" if device else "")
        for command, commit, date, device in made
        if command
    ]
    plot = RESULTS / "plots" / f"{name}.svg"
    picture = f"<details>\n<summary>Plot</summary>\n\n![{name}](../benchmarks/results/plots/{name}.svg)\n\n</details>"
    source = f"[{path.name}](../benchmarks/results/{path.name}), {len(rows)} rows" + (", made by" if lines else ".")
    parts = [
        f"## {name}",
        text if first == name else f"See [{first}](#{first}).",
        f"{source}\n\n" + "\n".join(lines),
        table,
    ]
    return "\n\n".join([*parts, picture] if plot.is_file() else parts)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if MARK in source[0]:
        files, said = sorted(RESULTS.glob("*.csv")), dict[str, str]()
        for path in [ROOT / "benchmarks" / "README.md", *files]:
            app.env.note_dependency(str(path))
        source[0] = source[0].replace(MARK, "\n\n".join(section(path, said) for path in files))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this; before what changes links."""
    app.connect("source-read", _fill, priority=400)
    return {"parallel_read_safe": True}
