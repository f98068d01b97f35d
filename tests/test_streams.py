import pytest
import torch

from deepkd_plugin.streams import assign_losses, backward_by_set, merge_streams


def test_streams_merge_only_where_every_group_agrees():
    assert merge_streams([{"a": 1, "b": 2, "c": 1}]) == (("a", "c"), ("b",))
    assert merge_streams([{"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 1, "c": 2}]) == (("a",), ("b",), ("c",))


def test_losses_go_to_their_streams():
    losses = {"tog": torch.tensor(1.0), "loss_feat": torch.tensor([2.0, 4.0]), "extra": torch.tensor(5.0)}
    by_stream = assign_losses(losses, ("tog", "ncg"), {"loss_feat": "ncg", "extra": "ncg"})
    assert {name: value.item() for name, value in by_stream.items()} == {"tog": 1.0, "ncg": 8.0}
    assert assign_losses(losses, ("task",), {})["task"].item() == 9.0
    with pytest.raises(ValueError, match="loss 'loss_feat' belongs to no stream"):
        assign_losses(losses, ("tog", "ncg"), {})


@pytest.fixture
def graph():
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    hidden = x.sin()
    return (x, y), {"a": (hidden * y).sum(), "b": hidden.sum(), "c": (y**2).sum()}


def test_each_set_gets_the_gradient_of_its_sum(graph):
    params, losses = graph
    first, second = backward_by_set(losses, (("a", "c"), ("b",)), params)
    x, y = (p.detach() for p in params)
    torch.testing.assert_close(first[0], x.cos() * y)
    torch.testing.assert_close(first[1], x.sin().sum() + 2 * y)
    torch.testing.assert_close(second[0], x.cos())
    assert second[1] is None


def test_the_graph_is_freed_after_the_last_pass_unless_asked(graph):
    params, losses = graph
    sets = (("a", "c"), ("b",))
    backward_by_set(losses, sets, params, retain_graph=True)
    backward_by_set(losses, sets, params)
    with pytest.raises(RuntimeError, match="second time"):
        backward_by_set(losses, sets, params)


def test_streams_without_a_loss_or_a_graph_have_no_gradient(graph):
    params, losses = graph
    constant = {"b": losses["b"], "c": torch.tensor(2.0)}
    assert backward_by_set(constant, (("a",), ("b",), ("c",)), params)[0] == [None, None]
    with pytest.raises(RuntimeError, match=r"none of the losses \['c'\] needs a gradient"):
        backward_by_set({"c": torch.tensor(2.0)}, (("c",),), params)


def test_bad_losses(graph):
    params, losses = graph
    with pytest.raises(ValueError, match=r"unknown stream 'd'; the streams are \['a', 'b', 'c'\]"):
        backward_by_set(losses | {"d": losses["a"]}, (("a", "b"), ("c",)), params)
    with pytest.raises(ValueError, match="must be a scalar, got shape"):
        backward_by_set({"a": params[0] * 2}, (("a",),), params)


def test_gradients_never_share_memory():
    """autograd gives one tensor for w1 + w2 and an expanded one for a sum; adding to them must be safe."""
    w1, w2, w3 = (torch.ones(3, requires_grad=True) for _ in range(3))
    losses = {"a": ((w1 + w2) ** 2).sum() + w3.sum(), "b": 2.0 * w3.sum() + w1.sum()}
    one, other = backward_by_set(losses, (("a",), ("b",)), (w1, w2, w3))
    one[0].add_(1.0)
    one[2][0] = 5.0
    assert one[1].tolist() == [4.0, 4.0, 4.0]
    assert one[2].tolist() == [5.0, 1.0, 1.0]
    assert other[0].tolist() == [1.0, 1.0, 1.0]
    assert other[2].tolist() == [2.0, 2.0, 2.0]
