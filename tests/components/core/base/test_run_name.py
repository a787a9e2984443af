"""Names of runs."""

import pytest

from components.core.base.errors import InputError
from components.core.base.run_name import check_run_name

REFUSED = [
    "../../x",
    "a/b",
    "",
    "latest",
    "rebuild",
    "a" * 64,
    "a" * 300,
    "My run ü 1",
    ".",
    "..",
    "-a",
    "a.",
    "a\n",
    "a b",
]


@pytest.mark.parametrize("name", ["demo-1", "a", "0", "My_run.v2", "a..b", "a" * 63])
def test_a_name_that_is_a_label_and_a_folder_everywhere(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^no run can be called .*") as refused:
        check_run_name(name)
    assert refused.value.hint
    assert len(refused.value.message) < 200
