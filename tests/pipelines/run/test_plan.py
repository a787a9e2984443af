"""A plan tells what is cached and what is wrong, quickly and without the heavy libraries."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from components.core.base.errors import RecipeError
from components.core.model.accelerators import DEVICES
from components.core.runtime.code_digest import code_digest
from components.core.runtime.runner import stage_key
from components.core.store.manifest import Manifest
from components.core.store.store import StageRecord, Store, open_store
from pipelines.cli import run_command
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import load_recipe
from pipelines.run.plan import make_plan
from pipelines.sizing.machine import Machine, named_machine
from tests.components.core import tiny_models
from tests.pipelines.made_up_run import make_run

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"
PROBE = """
import sys
from pipelines.cli import run_command
code = run_command(["plan", sys.argv[1], "--store", sys.argv[2], "--json"])
heavy = {"torch", "transformers", "vllm", "kfp", "mlflow"}.intersection(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_a_plan_of_the_demo_takes_neither_torch_nor_kfp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(RECIPES / "demo.yaml"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["faults"] == []
    assert [stage["label"] for stage in plan["stages"]][:2] == ["data", "parent"]
    assert [stage["cached"] for stage in plan["stages"]] == [False, *[None] * 14]


def test_a_second_step_is_planned_from_what_the_first_made(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    make_run(store, "demo-1")
    plan = make_plan(load_recipe(RECIPES / "two-step.yaml"), store)
    assert plan.faults == []
    after = {stage.label: stage.after for stage in plan.stages}
    library = ["your parent", "data", "search/importance", "your search.libraries"]
    assert after["search/library-0"] == after["search/library-1"] == library
    first = plan.stages[0]
    assert (first.label, first.after) == ("data", ["your parent"])
    assert first.key is not None  # so the digest of the parent is known


def finish(store: Store, recipe: Path, folder: Path) -> Manifest:
    """Put a result of the data stage into the store, as a run would."""
    task = llama_nemotron(load_recipe(recipe))["data"]
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "train.jsonl").write_text("{}\n")
    made = store.put_folder(folder / "rows", "data")
    code, libraries = code_digest(task.stage.entry)
    store.put_stage_record(
        StageRecord(
            key=stage_key(task.stage, task.config, {}),
            stage="data",
            config=task.config.canonical(),
            code=code,
            libraries=libraries,
            inputs={},
            outputs=dict.fromkeys(task.stage.outputs, made.digest),
            result={},
            seconds=1.0,
        )
    )
    return made


def test_a_finished_stage_is_cached_and_the_next_one_has_its_key(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    store = open_store(str(tmp_path / "store"))
    finish(store, recipe, tmp_path)
    stages = {stage.label: stage for stage in make_plan(load_recipe(recipe), store).stages}
    assert stages["data"].cached is True
    assert stages["parent"].cached is False
    assert stages["parent"].key is not None
    assert stages["search"].cached is None


def test_a_plan_says_what_vllm_keeps_out_of_the_space(tmp_path: Path) -> None:
    recipe, store = tmp_path / "mine.yaml", open_store(str(tmp_path / "store"))
    recipe.write_text("parent_pretrain: {shape: {num_hidden_layers: 3}}\n")
    (note,) = make_plan(load_recipe(recipe), store).notes
    assert "attention-0 in layer 0, attention-linear in every layer" in note
    assert make_plan(load_recipe(recipe, ["search.allow_plugin_only_blocks=true"]), store).notes == []


def test_rules_of_layers_are_checked_before_any_work(tmp_path: Path) -> None:
    recipe, store = tmp_path / "mine.yaml", open_store(str(tmp_path / "store"))
    recipe.write_text(
        "parent_pretrain: {shape: {num_hidden_layers: 3}}\nsearch: {layers: {0-1: {ffn: own}, 3: {ffn: own}}}\n"
    )
    (fault,) = make_plan(load_recipe(recipe), store).faults
    assert fault["message"] == "search.layers.3: the parent has 3 layers"
    with pytest.raises(RecipeError, match="did you mean 'no_op_ffn'"):
        load_recipe(recipe, ["search.layers={0: {no_op_fnn: false}}"])


def test_a_bundle_for_servers_without_tessera_allows_nothing_that_only_tessera_runs(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search: {allow_plugin_only_blocks: true}\ndeploy: {add_configuration_file: true}\n")
    (fault,) = make_plan(load_recipe(recipe), open_store(str(tmp_path / "store"))).faults
    assert "servers without it" in str(fault["message"])


def test_another_seed_is_another_result(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    store = open_store(str(tmp_path / "store"))
    finish(store, recipe, tmp_path)
    plan = make_plan(load_recipe(recipe, ["seed=1"]), store)
    assert plan.stages[0].cached is False


def test_a_training_stage_says_how_many_tokens_it_takes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("distill: {num_steps: 100, global_batch_size: 10, seq_len: 1000}\n")
    plan = make_plan(load_recipe(recipe), open_store(str(tmp_path / "store")))
    assert "1.00 M tokens" in next(stage.needs for stage in plan.stages if stage.label == "distill")


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A recipe with a parent of one's own."""
    tiny_models.write(tiny_models.llama(0), tmp_path / "model")
    (tmp_path / "text.txt").write_text("a text")
    recipe = tmp_path / "own.yaml"
    left_out = "".join(f"{stage}: null\n" for stage in ("search", "distill", "sft", "rl", "eval"))
    recipe.write_text(f"parent: ./model\ncorpus: ./text.txt\n{left_out}")
    return recipe


def test_a_plan_tells_what_was_filled_in_and_what_was_not(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(own_model), "--store", str(own_model.parent / "store"), "--device", "CPU:2"]
    assert run_command([*arguments, "--set", "deploy=null"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain.learning_rate is 0.00033: a sixth of the 2.0e-03" in shown
    assert "pretrain.seq_len is 128: 99 % of your documents have at most 2 tokens by their bytes" in shown
    assert "pretrain.num_steps is 1: 512 tokens: 4 times your text (1 tokens)" in shown
    assert "pretrain.dtype is float32: a processor without instructions for bfloat16 multiplies at" in shown
    assert "not set" not in shown
    (own_model.parent / "text.txt").rename(own_model.parent / "text.json")
    assert run_command([*arguments, "--set", "deploy=null", "--set", f"corpus={own_model.parent / 'text.json'}"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain.global_batch_size is 32: rows of 128 tokens" in shown
    assert "pretrain.seq_len, pretrain.num_steps: not set" in shown


def test_a_plan_tells_how_long_answers_may_be_and_why(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = own_model.parent / "chats.jsonl"
    chats.write_text('{"prompt": "2+2=", "completion": "4"}\n')
    arguments = ["plan", str(own_model), "--store", str(own_model.parent / "store"), "--device", "CPU:2"]
    assert run_command([*arguments, "--set", f"sft={chats}"]) == 0
    assert (
        "deploy.max_tokens is 32: 99 % of the rows of your chats have at most 37 bytes, taken as 13 tokens, and an "
        "answer with its thinking has no more; tessera init counts the answers"
    ) in capsys.readouterr().out
    chats = chats.rename(own_model.parent / "chats.json")
    assert run_command([*arguments, "--set", f"sft={chats}"]) == 0
    assert "deploy.max_tokens: not set" in capsys.readouterr().out


SETTINGS, VOCABULARY = "tokenizer_config.json", "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "content", "told", "hint"),
    [
        (SETTINGS, "{}", "of model has no eos_token, which ends every answer", "set eos_token in"),
        (SETTINGS, '{"eos_token": "</s>"}', "'</s>', which is not in its vocabulary", "set eos_token in"),
        (SETTINGS, None, "of model has no tokenizer_config.json, which the toggle needs", "fast tokenizer"),
        (VOCABULARY, "{", "the tokenizer.json of model is not JSON", "copy or download it again"),
        (VOCABULARY, None, "model has no tokenizer.json", "save its tokenizer there"),
    ],
)
def test_a_parent_whose_tokenizer_lacks_what_the_toggle_needs_is_said_once(
    own_model: Path, name: str, content: str | None, told: str, hint: str
) -> None:
    file = own_model.parent / "model" / name
    file.unlink() if content is None else file.write_text(content)
    (fault,) = make_plan(load_recipe(own_model), open_store(str(own_model.parent / "store"))).faults
    assert told in str(fault["message"])
    assert hint in str(fault["hint"])


def test_a_parents_tokenizer_is_looked_at_without_torch(own_model: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(own_model), str(own_model.parent / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["faults"] == []


def test_without_the_data_stage_nobody_needs_a_tokenizer(own_model: Path) -> None:
    (own_model.parent / "model" / SETTINGS).unlink()
    alone = load_recipe(own_model, ["data=null", "corpus=[]", "pretrain=null", "deploy=null"])
    assert make_plan(alone, open_store(str(own_model.parent / "store"))).faults == []


def test_a_plan_predicts_what_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(RECIPES / "demo.yaml"), "--store", str(tmp_path / "store"), "--device", "CPU:2"]
    assert run_command([*arguments, "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert prediction["device"] == "CPU"
    assert prediction["work"]["distill"]["tokens"] == 400 * 8 * 128
    assert prediction["misfits"] == []
    assert run_command(arguments) == 0
    shown = capsys.readouterr().out
    assert "predicted for CPU" in shown
    assert "the child is counted as 6 of the parent's 12 layers" in shown


def test_a_plan_doubts_a_speed_that_was_measured_beside_much_other_work(
    own_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = Machine(DEVICES["CPU"], None, 0, 2, 8 << 30, load=0.5)
    arguments = ["plan", str(own_model), "--store", str(own_model.parent / "store"), "--json", "--set", "deploy=null"]
    doubt = "the speed was measured on a busy machine, with 5.5 processes to run"
    for load, warnings in ((0.5, []), (5.5, [doubt])):
        monkeypatch.setattr("pipelines.sizing.machine.this_machine", partial(replace, idle, load=load))
        assert run_command(arguments) == 0
        shown = capsys.readouterr()
        told = json.loads(shown.out)["prediction"]["warnings"]
        assert shown.err == "".join(f"warning: {one}\n" for one in told)
        assert [one[: len(doubt)] for one in told] == warnings


def test_a_plan_advises_float32_where_a_processor_is_slow_in_the_precision_of_the_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float32": 80e9, "bfloat16": 1e8, "float16": 1e8}  # so slow that it shows with a small model
    old = DEVICES["CPU"].model_copy(update={"name": "an old processor", "flops": rates})
    monkeypatch.setattr("pipelines.sizing.machine.this_machine", lambda: Machine(old, None, 0, 2, 8 << 30))
    recipe, told = ["plan", str(RECIPES / "demo.yaml"), "--store", str(tmp_path / "store"), "--json"], {}
    for dtype in ("bfloat16", "float32"):
        assert run_command([*recipe, "--set", f"serving.dtype={dtype}"]) == 0
        told[dtype] = json.loads(capsys.readouterr().out)["prediction"]["warnings"]
    assert told["float32"] == []
    (warning,) = told["bfloat16"]
    assert warning.startswith("vLLM in rl, eval, deploy: an old processor takes about")
    assert warning.endswith("set serving.dtype to float32")


def test_what_is_cached_takes_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    store = open_store(str(tmp_path / "store"))
    finish(store, recipe, tmp_path)
    plan = make_plan(load_recipe(recipe), store, lambda: named_machine("CPU:2"))
    assert plan.prediction is not None
    assert "data" not in plan.prediction.work
    assert "parent" in plan.prediction.work


def test_a_recipe_with_faults_is_not_predicted(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("parent: ./absent\n")

    def machine() -> Machine:
        raise AssertionError("nobody asks")

    assert make_plan(load_recipe(recipe), open_store(str(tmp_path / "store")), machine).prediction is None


def test_what_does_not_fit_is_shown_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(RECIPES / "demo.yaml"), "--store", str(tmp_path / "store"), "--device", "L40S:1"]
    large = "parent_pretrain.shape={hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32, "
    large += "num_key_value_heads: 8, intermediate_size: 16384}"
    assert run_command([*arguments, "--set", large]) == 0
    shown = capsys.readouterr().out
    assert "does not fit: parent needs" in shown
    assert "on each device, and L40S has 45.60 GiB" in shown
