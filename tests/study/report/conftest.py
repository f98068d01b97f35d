import pytest

from deepkd_plugin.study.report import published


@pytest.fixture
def vouched(monkeypatch):
    """As if somebody who can be named stood for every published number, and nothing were known of protocols."""
    known = tuple(
        row | {"source": "a note", "certainty": row["certainty"].removeprefix("hearsay; "), "protocol": ""}
        for row in published.rows()
        if row["certainty"].startswith("hearsay; ")
    )
    others = tuple(row for row in published.rows() if not row["certainty"].startswith("hearsay"))
    monkeypatch.setattr(published, "rows", lambda: (*others, *known))
