import pytest

from deepkd_plugin import builtin
from deepkd_plugin.config import add_deepkd_config


@pytest.fixture
def cfg():
    tree = builtin.CFG.clone()
    add_deepkd_config(tree)
    return tree
