import pytest

from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.hosts import builtin


@pytest.fixture
def cfg():
    tree = builtin.CFG.clone()
    add_deepkd_config(tree)
    return tree
