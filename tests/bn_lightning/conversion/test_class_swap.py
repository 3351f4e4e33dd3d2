"""Swapping a module's class: what stays, and that swaps can end in any order."""

import copy
import itertools
import pickle

import pytest
from torch import nn

from bn_lightning import BatchNorm2d
from bn_lightning.conversion.class_swap import (
    is_swapped,
    replace_class,
    restore_class,
    set_swapped_attribute,
    swap_class,
)


class Third(BatchNorm2d):
    pass


@pytest.fixture
def module():
    return nn.BatchNorm2d(3)


def test_only_the_class_changes(module):
    before = dict(module.__dict__)
    weight = module.weight
    swap_class(module, BatchNorm2d, "a")
    assert type(module) is BatchNorm2d and module.weight is weight and is_swapped(module, "a")
    assert restore_class(module, "a")
    assert type(module) is nn.BatchNorm2d and not is_swapped(module, "a")
    assert module.__dict__ == before


@pytest.mark.parametrize("order", list(itertools.permutations("ab")), ids="-".join)
def test_two_swaps_end_in_any_order(module, order):
    swap_class(module, BatchNorm2d, "a")
    swap_class(module, Third, "b")
    restore_class(module, order[0])
    # The latest active swap decides the class.
    assert type(module) is {"a": Third, "b": BatchNorm2d}[order[0]]
    restore_class(module, order[1])
    assert type(module) is nn.BatchNorm2d


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="-".join)
def test_three_swaps_end_in_any_order(module, order):
    for key, new_class in zip("abc", (BatchNorm2d, Third, BatchNorm2d), strict=True):
        swap_class(module, new_class, key)
    for key in order:
        assert restore_class(module, key)
    assert type(module) is nn.BatchNorm2d


def test_restoring_without_a_swap_changes_nothing(module):
    assert not restore_class(module, "a")
    assert type(module) is nn.BatchNorm2d


def test_a_second_swap_under_the_same_key_is_refused(module):
    swap_class(module, BatchNorm2d, "a")
    with pytest.raises(ValueError, match="`module`.*swapped under 'a'"):
        swap_class(module, Third, "a")
    assert type(module) is BatchNorm2d


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_class_is_replaced_below_any_number_of_swaps(module, depth):
    for key in "ab"[:depth]:
        swap_class(module, {"a": BatchNorm2d, "b": Third}[key], key)
    replace_class(module, nn.BatchNorm2d, nn.BatchNorm3d)
    if depth:
        assert type(module) is (BatchNorm2d, Third)[depth - 1]
    for key in "ab"[:depth]:
        restore_class(module, key)
    assert type(module) is nn.BatchNorm3d


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_restored_independently(module, copied):
    swap_class(module, BatchNorm2d, "a")
    twin = copied(module)
    restore_class(twin, "a")
    assert type(twin) is nn.BatchNorm2d and type(module) is BatchNorm2d


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="-".join)
@pytest.mark.parametrize("own", [{}, {"backend": "own"}], ids=["none_before", "one_before"])
def test_attributes_are_restored_in_any_order(module, order, own):
    module.__dict__.update(own)
    before = dict(module.__dict__)
    swap_class(module, BatchNorm2d, "a", backend="native", activation="relu")
    swap_class(module, Third, "b")
    swap_class(module, BatchNorm2d, "c", backend="triton")
    for key in order:
        restore_class(module, key)
        values = {"a": "native", "c": "triton"}
        expected = [values[k] for k in "ac" if is_swapped(module, k)] or list(own.values())
        assert module.__dict__.get("backend") == (expected or [None])[-1]
        assert ("activation" in module.__dict__) == is_swapped(module, "a")
    assert module.__dict__ == before


def test_a_changed_attribute_appears_when_the_later_swap_ends(module):
    swap_class(module, BatchNorm2d, "a", backend="auto")
    swap_class(module, Third, "b", backend="triton")
    set_swapped_attribute(module, "a", "backend", "native")
    assert module.backend == "triton"
    restore_class(module, "b")
    assert module.backend == "native"
    restore_class(module, "a")
    assert "backend" not in module.__dict__
