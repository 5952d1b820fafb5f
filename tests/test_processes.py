import gc

from minisgl.processes import started


def test_what_was_made_to_start_is_not_searched_for_garbage():
    before = gc.get_freeze_count()
    with started():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0
