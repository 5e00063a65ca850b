"""The table of versions is what the tests say: a row names tests that exist, a failed or missing one is an error."""

import ast
from pathlib import Path

import pytest

from benchmarks import compiler_support

TESTS = Path(__file__).parent


def written(folder: Path, version: str, changes: dict[str, str]) -> Path:
    """A JUnit file in which every test of the table passed, but for the changes: the inside of their elements."""
    names = [test for rows in compiler_support.ROWS.values() for tests in rows.values() for test in tests]
    cases = "".join(
        f'<testcase classname="tests" name="{name}[case]">{changes.get(name, "")}</testcase>'
        for name in names
        if changes.get(name) != "absent"
    )
    file = folder / f"{version}.xml"
    file.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return file


def table(folder: Path, **changes: dict[str, str]) -> str:
    versions = {"2.9.0": {}, "2.10.0": changes}
    return compiler_support.table(
        compiler_support.read(written(folder, version, found)) for version, found in versions.items()
    )


def test_columns_are_versions_and_cells_are_outcomes(tmp_path):
    text = table(
        tmp_path,
        test_low_precision_compiles='<skipped type="pytest.xfail" message="torch &lt; 2.11: why"/>',
        test_step='<properties><property name="package_us" value="5.4"/></properties>',
    )
    assert "| torch.compile | torch 2.9.0 | torch 2.10.0 |" in text
    assert "| low precision | yes | no [1] |" in text and "[1] torch < 2.11: why" in text
    assert "| ... as a package, us | - | 5.4 |" in text


@pytest.mark.parametrize(
    "found, message",
    [("<failure/>", r"torch 2\.10\.0: tests::test_step\[case\] failed"), ("absent", "no result of test_step")],
)
def test_a_failed_or_missing_test_is_an_error(tmp_path, found, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, test_step=found)


def test_every_row_names_tests_that_exist():
    trees = (ast.parse(file.read_text()) for file in TESTS.glob("test_*.py"))
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for rows in compiler_support.ROWS.values():
        for row, tests in rows.items():
            assert set(tests) <= defined, row


def test_the_document_has_every_row():
    text = compiler_support.DOCUMENT.read_text()
    rows = [row for rows in compiler_support.ROWS.values() for row in rows] + list(compiler_support.MEASURED)
    assert [row for row in rows if f"| {row} |" not in text] == []
