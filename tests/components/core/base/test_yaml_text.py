"""The reader of YAML."""

import pytest

from components.core.base.errors import RecipeError
from components.core.base.yaml_text import read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is on line 1 and again on line 3"),
        ("a:\n  b: 1\n  c: 2\n  'b': 3\n", "the key 'b' is on line 2 and again on line 4"),
        ('{"a": 1,\n "a": 1}', "the key 'a' is on line 1 and again on line 2"),
        ("- {x: 1, y: {z: 1, z: 2}}", "the key 'z' is on line 1 and again on line 1"),
        ("a: &x\n  b: 1\nc: *x\na: 2", "the key 'a' is on line 1 and again on line 4"),
    ],
)
def test_a_key_twice_in_a_mapping_is_refused_with_both_lines(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe.yaml: {message}"):
        read_yaml(text, "recipe.yaml")


def test_equal_keys_of_different_mappings_and_of_merged_ones_are_fine() -> None:
    text = "base: {inner: {deep: &d {<<: &e {x: 1, y: 1}, x: 2}}}\nown: {<<: *d, y: 3}\nlist: [{x: 1}, {x: 2}]"
    found = read_yaml(text, "recipe.yaml")
    assert found["base"]["inner"]["deep"] == {"x": 2, "y": 1}
    assert found["own"] == {"x": 2, "y": 3}
    assert found["list"] == [{"x": 1}, {"x": 2}]


def test_what_is_no_yaml_and_code_in_yaml_are_refused() -> None:
    for text in ("a: [1", "!!python/object/apply:os.getcwd []"):
        with pytest.raises(RecipeError, match=r"recipe\.yaml is not valid YAML"):
            read_yaml(text, "recipe.yaml")
