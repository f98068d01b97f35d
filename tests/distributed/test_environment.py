"""What a launcher says in the environment."""

import pytest

from deepkd_plugin.distributed import environment
from deepkd_plugin.errors import UserError


@pytest.mark.parametrize(("size", "refused"), [("4", True), ("1", False), ("", False), (None, False)])
def test_one_of_several_processes_is_refused(monkeypatch, size, refused):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    if not refused:
        environment.one_process()
        return
    with pytest.raises(UserError, match="WORLD_SIZE is 4; this is work for one process"):
        environment.one_process()
