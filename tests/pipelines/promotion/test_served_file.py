"""The file that names the served model: one value changes, and nothing else."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.base.errors import InputError
from pipelines.promotion.served_file import read_value, replace_value

DIGEST = "ab" * 32
KEY = "serving.model.digest"


def test_comments_order_and_quotes_stay() -> None:
    text = (
        "# who serves what\n"
        "serving:\n"
        "  enabled: yes   # not yet\n"
        "  model:\n"
        "    digest: 'old'  # the bundle\n"
        "    name: nano\n"
        "other: [1,  2]\n"
    )
    assert read_value(text, KEY, "f.yaml") == "old"
    assert replace_value(text, KEY, DIGEST, "f.yaml") == text.replace("'old'", f'"{DIGEST}"')
    assert replace_value(text.replace("'", ""), KEY, DIGEST, "f.yaml") == text.replace("'old'", DIGEST)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("a:\n  digest:\n  b: 1\n", "a.digest", f"a:\n  digest: {DIGEST}\n  b: 1\n"),
        ("a:\n  digest:   # none yet\n", "a.digest", f"a:\n  digest: {DIGEST}   # none yet\n"),
        ("a: {digest: null}\n", "a.digest", f"a: {{digest: {DIGEST}}}\n"),
        ("kind: A\n---\nmodels:\n- x: 1\n- d: old\n", "models.1.d", f"kind: A\n---\nmodels:\n- x: 1\n- d: {DIGEST}\n"),
        ("a: {b: &x 1, c: *x}\nd: é\ne: old\n", "e", f"a: {{b: &x 1, c: *x}}\nd: é\ne: {DIGEST}\n"),
    ],
)
def test_empty_values_lists_and_several_documents(text: str, key: str, expected: str) -> None:
    assert replace_value(text, key, DIGEST, "f.yaml") == expected
    assert read_value(expected, key, "f.yaml") == DIGEST


def test_json_stays_json() -> None:
    assert replace_value('{"a": {"d": null}}', "a.d", DIGEST, "f.json") == f'{{"a": {{"d": "{DIGEST}"}}}}'


def test_a_digest_that_reads_as_a_number_is_quoted() -> None:
    number = "1" * 64
    assert read_value(replace_value("d: old\n", "d", number, "f.yaml"), "d", "f.yaml") == number
    assert yaml.safe_load(replace_value("d: old\n", "d", number, "f.yaml")) == {"d": number}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n", "has no key serving.model.digest"),
        ("serving: {model: {digest: {a: 1}}}\n", "has values below serving.model.digest"),
        ("serving: {model: {digest: a}}\n---\nserving: {model: {digest: b}}\n", "more than once"),
        ("a: {{ .Values }\n", "is not valid YAML"),
        ("x: &d old\nserving: {model: {digest: *d}}\n", "cannot be replaced without changing another"),
        ("serving:\n  model:\n    digest: |\n      old\n", "cannot be replaced"),
    ],
)
def test_what_cannot_be_changed_alone_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace_value(text, KEY, DIGEST, "f.yaml")


NAMES = st.text("abcdefg", min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
)


@settings(max_examples=40)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.booleans())
def test_any_other_values_stay(others: dict[str, object], flow: bool) -> None:
    values = {**others, "serving": {"model": {"digest": "old", **others}}}
    text = yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True)
    expected = yaml.safe_load(text)  # PyYAML does not read every text as it wrote it
    expected["serving"]["model"]["digest"] = DIGEST
    assert yaml.safe_load(replace_value(text, KEY, DIGEST, "f.yaml")) == expected
