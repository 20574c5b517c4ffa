"""The performance page shows the run that is committed beside it."""

from tests.benchmarks.catalogue import THEMES
from tests.benchmarks.publish import CLIENTS_PLOT, ENTRIES_PLOT, FIGURES, PAGE, RUN, fill_in, sections
from tests.benchmarks.run_file import read_run


def test_the_tables_are_those_of_the_committed_run() -> None:
    page = PAGE.read_text()

    assert fill_in(page, sections(read_run(RUN))) == page, "run python -m tests.benchmarks.publish FILE"


def test_the_committed_run_has_every_row() -> None:
    measured = [result.row.name for result in read_run(RUN).results]

    assert measured == [row.name for theme in THEMES for row in theme.rows]


def test_the_page_shows_the_plots_that_are_there() -> None:
    for plot in (ENTRIES_PLOT, CLIENTS_PLOT):
        assert (FIGURES / plot).read_text().startswith("<?xml")
        assert f"({FIGURES.name}/{plot})" in PAGE.read_text()
