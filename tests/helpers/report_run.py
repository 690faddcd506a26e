"""A made-up evaluation and its report, for the tests of what is on the page and of how a browser draws it."""

from __future__ import annotations

import shutil
from pathlib import Path

import evaluation_rows
import pytest

from keepkv.report import Report, arrange, read
from keepkv.report.page import page


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_rows.write(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(directory: Path) -> Report:
    return arrange(read(directory))


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page(report)


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))
