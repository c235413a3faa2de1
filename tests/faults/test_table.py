"""The table of docs/reliability.md is the tests', row by row."""

from table import BEGIN, END, PAGE, read_faults, render, replace_table


def test_the_page_has_the_row_of_every_fault_test_and_no_other() -> None:
    faults, without = read_faults()
    assert [name for name in without if not name.startswith("test_table::")] == []
    assert len(faults) > 10
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == replace_table(page, render(faults)), "run python tests/faults/table.py"
