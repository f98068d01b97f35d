"""The networks that docs/networks.md says are tried: each takes an image through the adapter."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from deepkd_plugin import data
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.adapter import Adapter
from deepkd_plugin.hosts.networks import network
from deepkd_plugin.hosts.registry import BUILTIN

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("### Networks that are tried")[2].partition("\n#")[0]
SMALL = 64


def listed():
    """Yield (name, the one size that it takes or None, whether it gives pooled features) of each listed network."""
    for library, about, names in re.findall(r"^- of (\w+)(.*?): (.*(?:\n  .*)*)", SECTION, re.MULTILINE):
        for name, size in re.findall(r"(\w+)(?: \((\d+)\))?", names):
            yield f"{library}:{name}", int(size) if size else None, "pooled_feat" in about


LISTED = list(listed())


def test_the_page_lists_forty():
    assert len({name for name, *_ in LISTED}) == len(LISTED) == 40
    assert "Of these 40" in SECTION
    assert sum(name.startswith("timm:") for name, *_ in LISTED) == 22
    assert {size for _, size, _ in LISTED} == {None, 224, 299}


def made(name, side):
    source = data.Source(
        None, num_classes=7, train=1, test=1, side=side, mean=(0.5,) * 3, std=(0.5,) * 3, zoo="imagenet"
    )
    return network(BUILTIN, source, name, 7)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "pools"), LISTED, ids=[name for name, *_ in LISTED])
def test_a_listed_network_takes_an_image(name, size, pools):
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip('pip install -e ".[networks]" brings timm')
    side = size or SMALL
    adapted = made(name, side)
    assert isinstance(adapted, Adapter)
    with torch.no_grad():
        logits, features = adapted.eval()(torch.randn(1, 3, side, side))
    assert logits.shape == (1, 7)
    assert bool(logits.isfinite().all())
    assert set(features) == adapted.deepkd_features == ({"pooled_feat"} if pools else set())
    if pools:
        pooled = features["pooled_feat"]
        assert pooled.ndim == 2
        assert torch.equal(adapted.get_classifier()(pooled), logits)
    if size:
        with pytest.raises(UserError, match=rf"the network {name} cannot (be made|take images of 64 x 64 pixels) \("):
            made(name, SMALL)
