"""Texts that are put together equal those that OmegaConf writes."""

import pytest
from hydra_plugins.bn_optuna._yaml_texts import YamlTexts
from omegaconf import OmegaConf

NODES = {
    "numbers": {"a": 1, "b": -0.0, "c": 0.0, "d": 1e-05, "e": float("inf"), "f": True, "g": 1.0},
    "texts": {"a": "1", "b": "yes", "c": "1e3", "d": "a: b", "e": " x", "f": "", "g": "# c"},
    "marks": {
        "a": "it's",
        "b": "- x",
        "c": "2020-01-01",
        "d": "null",
        "e": '"',
        "f": "@a",
        "g": "~",
    },
    "keys": {"on": None, "1": "a", "a b": "c", "${x}": "${y}", "k" * 100: 1},
    "nested": {"a": {"b": [1, "two", None]}, "c": {}, "d": [], "e": {"f": {"g": "h"}}},
    "long_word": {"a": "x=" * 200},
    "paths": {"a": "/", "b": "a/b-1.0", "c": "12/3", "d": "./a", "e": "//", "f": "/a:b", "g": "/#"},
    "overrides": {"a": "a=1", "b": "a.b=", "c": "=a", "d": "+a=1", "e": "a=1e3", "f": "~a=b"},
    "quoted": {
        "a": "a='0'",
        "b": "++a.b='1,2'",
        "c": "a=-1,b=+2",
        "d": "'a=1",
        "e": ",a=1",
        "f": "+==",
    },
    "integers": {"a": 10**30, "b": -1, "c": 0},
    "digits": {"a": "12", "b": "0", "c": "010", "d": "9" * 30, "e": "1_000", "f": "-1", "g": "08"},
}
REFUSED = {
    "long_line": {"a": "many words " * 10},
    "line_break": {"a": "one\ntwo"},
    "letters": {"a": "größer"},
    "long_key": {"k" * 200: 1},
    "list_in_list": {"a": [[1]]},
    "bytes": {"a": b"x"},
}


@pytest.mark.parametrize("content", NODES.values(), ids=NODES.keys())
def test_a_node_has_the_text_of_omegaconf(content):
    texts = YamlTexts()
    whole = OmegaConf.to_yaml({"first": {"second": content}})
    for _ in range(2):  # the second time from what is kept
        assert texts.node("first", {"second": content}, indent=0) == whole
    for value in content.values():
        if not isinstance(value, dict | list):
            assert texts.item(value, indent=0) == OmegaConf.to_yaml([value])


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_a_node_that_may_be_written_in_another_way_is_refused(content):
    assert YamlTexts().node("first", content, indent=0) is None
