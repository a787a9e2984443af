from pathlib import Path

import pytest

from components.core.serving.server_log import TAIL_LINES, causes, describe_failure

STAMP = "(EngineCore pid=19648) ERROR 11-29 12:43:02 [core.py:1510] "
ENGINE = [
    "(APIServer pid=19060) WARNING 11-29 12:42:32 [system_utils.py:255] Found ulimit of 20000",
    f"{STAMP}EngineCore failed to start.",
    f"{STAMP}Traceback (most recent call last):",
    f'{STAMP}  File "cpu_attn.py", line 400, in forward',
    f"{STAMP}RuntimeError: Unsupported CPU attention configuration: head_dim=24",
    "Process EngineCore:",
    "RuntimeError: Unsupported CPU attention configuration: head_dim=24",
    "Traceback (most recent call last):",
    *[f'  File "api_server.py", line {number}, in run' for number in range(2 * TAIL_LINES)],
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
]
CONFIGURATION = [
    "(APIServer pid=7) Traceback (most recent call last):",
    '(APIServer pid=7)   File "arg_utils.py", line 1, in create_model_config',
    "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
    "(APIServer pid=7)   Value error, The hidden size (66) is not a multiple of the number of attention heads (4).",
    "(APIServer pid=7) Shutting down",
]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (ENGINE, ["RuntimeError: Unsupported CPU attention configuration: head_dim=24"]),
        (CONFIGURATION, [f"{CONFIGURATION[2][18:]}\n{CONFIGURATION[3][18:]}"]),
        (["INFO: listening", "Error while nothing", "an Error: told of"], []),
        ([], []),
    ],
)
def test_the_cause_is_the_exception_and_what_explains_it(lines: list[str], expected: list[str]) -> None:
    assert causes(lines) == expected


def test_the_cause_far_above_comes_before_the_last_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(ENGINE))
    first, *rest = describe_failure(tmp_path / "log").splitlines()
    assert first == "RuntimeError: Unsupported CPU attention configuration: head_dim=24"
    assert rest == ENGINE[-TAIL_LINES:]
    assert describe_failure(tmp_path / "absent") == ""
