"""Order: heavy tests after all quick ones, so that a plain mistake shows within the first minutes."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("heavy") is not None)  # stable: the rest stays in place
