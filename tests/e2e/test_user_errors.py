"""What a user does wrong ends as one message with a way out, exit code 2, and nothing half-written."""

import errno
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.core.base.errors import InputError
from components.core.store.store import open_store
from pipelines.cli import run_command
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.records.runs import begin_run, end_run
from pipelines.run.local_runner import run_recipe

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
EOS = "<eos>"
WEIGHTS = "model.safetensors"

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its message."""

    def run(*arguments: object) -> str:
        assert run_command(list(map(str, arguments))) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.count("Error: ") + message.count("InfeasibleBudget: ") + message.count("MissingPackage: ") == 1
        assert "\n  hint: " in message
        return message

    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def only_data(tmp_path: Path) -> Path:
    """A recipe that ends after its first stage."""
    rest = ("parent_pretrain", "search", "distill", "pretrain", "sft", "rl", "eval", "deploy")
    path = tmp_path / "only-data.yaml"
    path.write_text("".join(f"{stage}: null\n" for stage in rest))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama folder as transformers writes it."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=0)).save_pretrained(folder)  # type: ignore[no-untyped-call]
    words = models.WordLevel({token: number for number, token in enumerate((EOS, *"abcdefg "))}, unk_token=EOS)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token=EOS).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"text": "a"}\n' * 8)
    return folder


def test_a_misspelt_key_is_told_the_nearest_right_one(refused: Refused, store: Path) -> None:
    message = refused("run", RECIPES / "demo.yaml", "--set", "distill.lerning_rate=1", "--store", store)
    assert "unknown key 'distill.lerning_rate'\n  hint: did you mean 'learning_rate'?" in message
    assert not store.exists()


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "latest", "x" * 300, "My run ü 1"])
def test_a_name_that_no_run_can_have_is_refused_at_every_door(
    refused: Refused, store: Path, only_data: Path, tmp_path: Path, name: str
) -> None:
    commands = [
        ("run", only_data, "--run", name),
        ("compile", only_data, "--run", name, "-o", tmp_path / "pipeline.yaml"),
    ]
    if name != "latest":  # which these take as the last run
        commands += [("report", name), ("serve", name), ("export", name, "tokenizer", tmp_path / "out")]
    for command in commands:
        assert "no run can be called" in refused(*command, "--store", store)
    with pytest.raises(InputError, match="no run can be called"):
        run_recipe(load_recipe(only_data), store_uri=str(store), name=name, console=Console())
    assert not store.exists()
    assert sorted(tmp_path.iterdir()) == [only_data]


def test_a_key_twice_in_a_recipe_or_in_a_setting(refused: Refused, store: Path, only_data: Path) -> None:
    twice = "arithmetic: {num_train: 1,\n num_train: 2}"
    (only_data.parent / "twice.yaml").write_text("seed: 1\nrl: null\nseed: 2\n")
    message = refused("run", only_data.parent / "twice.yaml", "--store", store)
    assert "twice.yaml: the key 'seed' is on line 1 and again on line 3\n  hint: remove one of them" in message
    (only_data.parent / "settings.yaml").write_text(twice)
    message = refused("stage", "data", "--config", only_data.parent / "settings.yaml", "--store", store)
    assert "settings.yaml: the key 'num_train' is on line 1 and again on line 2" in message
    message = refused("run", only_data, "--set", "data={skip_bad: true, skip_bad: false}", "--store", store)
    assert "the key 'skip_bad' is on line 1 and again on line 1" in message
    assert not store.exists()


def test_a_width_that_does_not_divide_is_told_the_nearest_that_does(refused: Refused, store: Path) -> None:
    message = refused("run", RECIPES / "demo.yaml", "--set", "search.ffn_fractions=[0.3]", "--store", store)
    assert "search.ffn_fractions=0.3 of intermediate_size=256 is 76.8 channels, not a whole number" in message
    assert "hint: use 77/256" in message
    assert not store.exists()


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ("{parameters: '1%'}", r"no choice of blocks fits parameters=[\d.]+; the smallest reachable is \d+"),
        ("{kv_bytes_per_token: 10}", r"no choice of blocks fits kv_bytes_per_token=10; the smallest reachable is 128"),
    ],
)
def test_limits_that_sizes_alone_rule_out_are_refused_before_any_work(
    refused: Refused, store: Path, limits: str, told: str
) -> None:
    message = refused("run", RECIPES / "demo.yaml", "--set", f"search.limits={limits}", "--store", store)
    assert re.search(told, message)
    assert "raise search.limits." in message
    assert not store.exists()


def test_limits_out_of_reach_name_the_limit_and_the_best(refused: Refused, store: Path, model: Path) -> None:
    costs = {
        "fixed": {"parameters": (2 * 32 + 1) * 32, "latency_ms": 1.0},  # embeddings, head and norm
        "blocks": {
            "attention-2": {"parameters": 4 * 64 * 32 + 32, "latency_ms": 1.0},
            "attention-1": {"parameters": 3 * 64 * 32 + 32, "latency_ms": 0.5},
            "attention-0": {},
            "ffn-48": {"parameters": 3 * 48 * 32 + 32, "latency_ms": 1.0},
            "ffn-0": {},
        },
        "machine": {"device": "elsewhere", "threads": 1, "versions": {}},
        "measurement": {},
        "models": [],
    }
    (model.parent / "costs.json").write_text(json.dumps(costs))
    settings = (
        "ffn_fractions=[1.0]",
        "seq_len=8",
        "batch_size=1",
        "importance_batches=1",
        "scoring_batches=1",
        "distillation={num_steps: 0}",
        "limits={latency_ms: 1.2}",
    )
    message = refused(
        *("stage", "search", "--store", store, "--output", f"child={model.parent / 'child'}"),
        *("--input", f"parent={model}", "--input", f"corpus={write_corpus(model.parent / 'corpus')}"),
        *("--input", f"costs={model.parent / 'costs.json'}"),
        *(part for setting in settings for part in ("--set", setting)),
    )
    assert "no choice of blocks fits latency_ms=1.2; the smallest reachable is 1.5" in message
    assert "raise search.limits.latency_ms" in message
    assert not (model.parent / "child").exists()
    assert not list(store.glob("stages/**/*.json"))


def pickled(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def code_of_its_own(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (model / "modeling_mine.py").write_text("raise SystemExit('this must never run')")


def truncated(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def tampered(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content.replace(b"[32,32]", b"[99,99]", 1))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (pickled, "are pickled (pytorch_model.bin), and reading a pickle can run any code"),
        (code_of_its_own, "code from a model folder is never run"),
        (truncated, "model.safetensors is damaged"),
        (tampered, "model.safetensors is damaged"),
    ],
)
def test_a_checkpoint_that_must_not_be_read_is_refused_before_any_work(
    spoil: Callable[[Path], None], told: str, refused: Refused, store: Path, model: Path
) -> None:
    spoil(model)
    corpus = write_corpus(model.parent / "corpus")
    named = {"parent": model, "corpus": corpus, "sft": corpus, "rl": corpus}
    overrides = (part for key, value in named.items() for part in ("--set", f"{key}={value}"))
    assert told in refused("run", RECIPES / "own-model.yaml", *overrides, "--store", store)
    assert not store.exists()


def no_end_token(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None)


def no_settings(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_end_token, "has no eos_token, which ends every answer"),
        (no_settings, "has no tokenizer_config.json, which the toggle needs"),
    ],
)
def test_a_tokenizer_without_what_the_toggle_needs(
    spoil: Callable[[Path], None], told: str, refused: Refused, store: Path, model: Path
) -> None:
    spoil(model)
    out = model.parent / "tokenizer"
    assert told in refused(
        *("stage", "data", "--input", f"parent={model}", "--set", "arithmetic={num_train: 10, num_test: 10}"),
        *("--output", f"tokenizer={out}", "--store", store),
    )
    assert not out.exists()
    assert not list(store.glob("stages/**/*.json"))


def test_malformed_lines_are_counted_and_can_be_skipped(
    refused: Refused, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n\nno json\n{"text": "two"}\n{"txt": 3}\n')
    command = ("stage", "data", "--input", f"own_corpus={tmp_path / 'bad.jsonl'}", "--store", str(store))
    message = refused(*command)
    assert "3 malformed lines: " in message
    assert "line 2: empty line; " in message
    assert "line 3: not JSON" in message
    assert "line 5: no 'text'" in message
    assert "--skip-bad" in message
    assert not list(store.glob("stages/**/*.json"))
    assert run_command([*command, "--skip-bad"]) == 0
    assert "skipped: 3" in capsys.readouterr().out


def test_a_whole_recipe_skips_malformed_lines_too(
    only_data: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Recipe] = []
    monkeypatch.setattr("pipelines.run.local_runner.run_recipe", lambda recipe, **_: ran.append(recipe))
    monkeypatch.setattr("pipelines.run.finish_run.deliver_run", lambda *_: None)
    for options in ([], ["--skip-bad"]):
        assert run_command(["run", str(only_data), "--store", str(store), *options]) == 0
    assert [recipe.data is not None and recipe.data.skip_bad for recipe in ran] == [False, True]


def test_no_space_says_how_much_is_missing(
    refused: Refused, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "corpus.txt").write_text("a text " * 100)
    monkeypatch.setattr("components.core.store.folder_store.os.fsync", full)
    command = ("stage", "data", "--input", f"own_corpus={tmp_path / 'corpus.txt'}", "--store", store)
    message = refused(*command)
    assert f"no space left at {store}: " in message
    assert "700 bytes are needed" in message
    assert "tessera store gc" in message
    assert [path for path in store.rglob("*") if path.is_file()] == []


@pytest.fixture
def finished_run(store: Path, model: Path) -> str:
    """A run that has a model to serve."""
    opened = open_store(str(store))
    digest = opened.put_folder(model, "model").digest
    run = begin_run(opened, Recipe(name="mine", parent=digest), {"parent": digest})
    end_run(opened, run, "succeeded")
    return run


def test_a_port_that_is_taken(refused: Refused, store: Path, finished_run: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("serve", finished_run, "--port", port, "--store", store)
    assert f"port {port} cannot be used: Address already in use" in message
    assert "choose another" in message


def test_vllm_is_not_installed(
    refused: Refused, store: Path, finished_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.core.serving.settings.find_spec", lambda name: None)
    message = refused("serve", finished_run, "--port", 0, "--store", store)
    assert "this needs vLLM, which is not installed" in message
    assert "make install" in message


def test_wrong_credentials(
    refused: Refused, s3_uri: str, only_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")
    message = refused("run", only_data, "--store", s3_uri)
    assert "the S3 server refuses these credentials for bucket 'tessera'" in message
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert "not-the-one" not in message
    assert not (tmp_path / ".tessera").exists()


def test_a_bucket_that_does_not_exist(
    refused: Refused, s3_uri: str, only_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("run", only_data, "--store", "s3://nowhere/prefix")
    assert "there is no bucket 'nowhere'" in message
    assert "create it with `tessera store init s3://nowhere/prefix`, or check --store" in message
    assert not (tmp_path / ".tessera").exists()
