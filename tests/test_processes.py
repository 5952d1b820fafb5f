"""What the processes of a job have in common."""

import gc

import pytest

from minisgl.processes import freeze_what_is_loaded


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


def test_the_collector_looks_only_at_what_is_made_later(unfrozen):
    freeze_what_is_loaded()
    assert gc.get_freeze_count() > 10_000  # pytest alone has as much
    assert len(gc.get_objects()) < gc.get_freeze_count() // 10
