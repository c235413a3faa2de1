"""Renders the fault table of docs/reliability.md from the tests' own rows.

`python tests/faults/table.py` writes it between its markers.
"""

import ast
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/reliability.md"
BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"


class Fault(NamedTuple):
    """One row: a test, and what `lives.row` says of it."""

    test: str
    done: str
    observed: str
    lost: str


def read_faults() -> tuple[list[Fault], list[str]]:
    """The rows of all fault tests, and the tests that have none."""
    faults, without = [], []
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            name = f"{path.stem}::{node.name}"
            said = next((texts for d in node.decorator_list if (texts := _texts(d))), None)
            if said is None:
                without.append(name)
            else:
                faults.append(Fault(name, said[0], said[1], said[2]))
    return faults, without


def _texts(decorator: ast.expr) -> list[str] | None:
    is_row = isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "row"
    if not is_row:
        return None
    texts = [ast.literal_eval(argument) for argument in decorator.args]
    texts += [ast.literal_eval(keyword.value) for keyword in decorator.keywords]
    return [*texts, "nothing"][:3]


def render(faults: list[Fault]) -> str:
    """The table as Markdown."""
    lines = ["| what is done | what happens | what is lost | test |", "|---|---|---|---|"]
    for fault in faults:
        lines.append(f"| {fault.done} | {fault.observed} | {fault.lost} | `{fault.test}` |")
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """The page with another table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(
        replace_table(PAGE.read_text(encoding="utf-8"), render(read_faults()[0])), encoding="utf-8"
    )
