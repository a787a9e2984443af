"""What the recipe says about mistakes, and what it makes of right values."""

import json
from pathlib import Path

import pytest
import yaml

from components.core.base.errors import RecipeError
from components.distill.config import DistillConfig
from components.search.config import SearchConfig
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import (
    SCHEMA_FILE,
    Recipe,
    fill_left_out,
    filled_as_recorded,
    load_recipe,
    recipe_schema,
    without_placements,
)

RECIPES = sorted(SCHEMA_FILE.parent.glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_loads_and_names_its_schema(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json\n")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("serch: null", "unknown key 'serch'", "did you mean 'search'?"),
        ("rl: {lerning_rate: 1}", "unknown key 'rl.lerning_rate'", "did you mean 'learning_rate'?"),
        ("sft: {seq_len: 1}", "sft.seq_len=1: Input should be greater than 1", None),
        ("search: {limits: {latency_ms: fast}}", "search.limits.latency_ms='fast': ", None),
        ("distill: {placement: {gpu: 1}}", "unknown key 'distill.placement.gpu'", "did you mean 'gpus'?"),
        (
            "parent_pretrain: {shape: {hidden_size: 100, num_attention_heads: 3}}",
            "parent_pretrain.shape: hidden_size=100 does not divide by num_attention_heads=3",
            None,
        ),
        ("search: {limits: {parameters: 0}}", "search.limits.parameters=0: a limit is a positive number", None),
        ("name: My Recipe", "name='My Recipe': String should match pattern", None),
        ("- a\n- b", "holds list, not a mapping of keys to values", None),
        ("a: [", "is not valid YAML", None),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_nearest_right_key(
    tmp_path: Path, text: str, message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in caught.value.message
    assert caught.value.hint == hint
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_paths_are_relative_to_the_recipe_and_on_the_command_line_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(tmp_path, "parent: model\ncorpus: [a.txt, /b.txt]\nsft: chats.jsonl\nsearch: {costs: costs.json}")
    recipe = load_recipe(path, ["rl=problems.jsonl"])
    assert recipe.parent == str(tmp_path / "model")
    assert recipe.corpus == (tmp_path / "a.txt", Path("/b.txt"))
    assert recipe.sft is not None
    assert recipe.sft.data == (tmp_path / "chats.jsonl",)
    assert recipe.search is not None
    assert recipe.search.costs == str(tmp_path / "costs.json")
    assert recipe.rl is not None
    assert recipe.rl.data == (tmp_path / "elsewhere" / "problems.jsonl",)


@pytest.mark.parametrize(
    "name", ["a #b.txt", "a: b", "[x].txt", "[x]", "%a", "~", "~x.txt", "#a", "'a", "- a", "&a", "*.txt", "{a}.txt"]
)
def test_a_path_on_the_command_line_is_taken_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    recipe = load_recipe(write(tmp_path, "sft: {num_steps: 7}"), [f"corpus={name}", f"sft={name}", f"rl.data={name}"])
    expected = (tmp_path if name == "~" else tmp_path / name,)
    assert recipe.sft is not None
    assert recipe.rl is not None
    assert recipe.corpus == recipe.sft.data == recipe.rl.data == expected
    assert recipe.sft.num_steps == 7


def test_lists_quotes_sections_and_switches_on_the_command_line_are_yaml_still(tmp_path: Path) -> None:
    changes = ["corpus=[a.txt, 'b: c.txt']", 'parent="model #1"', "sft={num_steps: 3}", "rl=false", "search.costs=null"]
    recipe = load_recipe(write(tmp_path, "{}"), changes)
    assert recipe.corpus == (Path.cwd() / "a.txt", Path.cwd() / "b: c.txt")
    assert recipe.parent == str(Path.cwd() / "model #1")
    assert recipe.sft is not None
    assert recipe.sft.num_steps == 3
    assert recipe.rl is None
    assert recipe.search is not None
    assert recipe.search.costs is None


def test_an_address_of_an_artifact_is_no_path(tmp_path: Path) -> None:
    digest = "0" * 64
    for address in (digest, f"s3://bucket/prefix#{digest}", "run://latest/child"):
        assert load_recipe(write(tmp_path, f"parent: '{address}'")).parent == address
        search = load_recipe(write(tmp_path, f"search: {{costs: '{address}', libraries: [lib, '{address}']}}")).search
        assert search is not None
        assert (search.costs, search.libraries) == (address, (str(tmp_path / "lib"), address))


def test_null_and_false_leave_a_stage_out_and_true_takes_its_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "search: null\ndistill: false\nrl: true"))
    assert recipe.search is None
    assert recipe.distill is None
    assert recipe.rl == Recipe(name="x").rl


def test_an_override_goes_into_what_the_recipe_says(tmp_path: Path) -> None:
    path = write(tmp_path, "search: {limits: {latency_ms: 60%, parameters: 1000}}\nsft: {num_steps: 7, data: a.jsonl}")
    recipe = load_recipe(path, ["search.limits.latency_ms=55%", "sft=b.jsonl", "seed=3", "rl=null"])
    assert recipe.search is not None
    assert (recipe.search.limits.latency_ms, recipe.search.limits.parameters) == ("55%", 1000)
    assert recipe.sft is not None
    assert recipe.sft.num_steps == 7
    assert [path.name for path in recipe.sft.data] == ["b.jsonl"]
    assert recipe.seed == 3
    assert recipe.rl is None


@pytest.mark.parametrize("text", ["seed", "=1", "a..b=1"])
def test_an_override_without_key_and_value_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="is not of the form key=value"):
        load_recipe(write(tmp_path, "{}"), [text])


def test_the_seed_of_the_recipe_reaches_stages_that_set_none() -> None:
    recipe = Recipe.parse({"name": "x", "seed": 5, "distill": {"seed": 9}})
    assert recipe.search is not None
    assert recipe.config(recipe.search, SearchConfig).seed == 5
    assert recipe.distill is not None
    assert recipe.config(recipe.distill, DistillConfig).seed == 9


def test_a_stage_overrides_single_settings_of_the_placement() -> None:
    recipe = Recipe.parse({"name": "x", "placement": {"threads": 3, "gpus": 1}, "rl": {"placement": {"gpus": 4}}})
    assert recipe.rl is not None
    assert (recipe.place(recipe.rl).threads, recipe.place(recipe.rl).gpus) == (3, 4)


def test_golden_schema_is_fresh(renew_golden: bool) -> None:
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if renew_golden:
        SCHEMA_FILE.write_text(text, encoding="utf-8")
    assert SCHEMA_FILE.read_text(encoding="utf-8") == text, "make golden"


def test_the_schema_documents_every_field_and_allows_the_short_forms() -> None:
    schema = recipe_schema()
    assert all("description" in field for field in schema["properties"].values())
    assert {"type": "boolean"} in schema["properties"]["search"]["anyOf"]
    assert {"type": "string"} in schema["properties"]["sft"]["anyOf"]
    json.dumps(yaml.safe_load(RECIPES[0].read_text()))


PARENT = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "intermediate_size": 1538,
    "tie_word_embeddings": True,
}
"""A model of 135 M parameters, whose FFNs have no quarter."""


@pytest.fixture
def with_parent(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PARENT))
    text = "parent: ./model\ndistill: {learning_rate: 7.0e-4, seq_len: 512}\nsft: a.jsonl\npretrain: null"
    return write(tmp_path, text)


def test_keys_that_are_left_out_follow_from_the_parent_and_those_that_are_set_stay(with_parent: Path) -> None:
    recipe = load_recipe(with_parent)
    assert recipe.search is not None
    assert recipe.distill is not None
    assert recipe.sft is not None
    assert recipe.pretrain is None
    assert recipe.search.ffn_fractions == (1.0, 0.5)
    assert (recipe.distill.learning_rate, recipe.distill.global_batch_size) == (7e-4, 8)
    assert recipe.sft.learning_rate == pytest.approx(5e-4, rel=0.1)  # 1e-4 for 8 B
    assert [path.name for path in recipe.sft.data] == ["a.jsonl"]
    assert recipe.sft.num_steps == 200  # of a file that is not there nothing is known
    assert (recipe.sft.dtype, recipe.search.dtype) == ("float32", "float32")  # no GPU is asked for
    assert llama_nemotron(recipe)["sft"].config.canonical()["learning_rate"] == recipe.sft.learning_rate
    overridden = load_recipe(with_parent, ["sft.learning_rate=1.0e-5"]).sft
    assert overridden is not None
    assert overridden.learning_rate == 1e-5


def test_to_fill_twice_is_to_fill_once_and_threads_and_memory_change_nothing(with_parent: Path) -> None:
    recipe = load_recipe(with_parent)
    assert fill_left_out(recipe) == recipe
    assert fill_left_out(Recipe.parse(recipe.canonical())) == recipe  # as a run has recorded it
    placed = load_recipe(with_parent, ["placement={processes: 8, threads: 64, memory_gib: 900}"])
    assert placed.model_copy(update={"placement": recipe.placement}) == recipe


def test_a_run_that_moves_to_gpus_goes_on_with_what_was_filled_when_it_began(with_parent: Path) -> None:
    began = load_recipe(with_parent)
    moved = load_recipe(with_parent, ["placement={gpus: 8, processes: 8}"])
    assert moved.sft is not None
    assert moved.sft.dtype == "bfloat16"
    goes_on = filled_as_recorded(moved, began.canonical())
    assert goes_on.placement.gpus == 8
    assert without_placements(goes_on.canonical()) == without_placements(began.canonical())
    own = load_recipe(with_parent, ["placement={gpus: 8, processes: 8}", "sft.dtype=bfloat16"])
    assert without_placements(filled_as_recorded(own, began.canonical()).canonical()) != without_placements(
        began.canonical()
    )


def test_text_decides_how_long_rows_are_and_how_many_steps_there_are(with_parent: Path) -> None:
    (with_parent.parent / "text.txt").write_text("word " * 200)
    recipe = load_recipe(with_parent, [f"corpus={with_parent.parent / 'text.txt'}", "search.batch_size=3"])
    assert recipe.distill is not None
    assert recipe.search is not None
    assert recipe.eval is not None
    assert (recipe.distill.seq_len, recipe.search.seq_len, recipe.eval.held_out.seq_len) == (512, 256, 256)
    assert recipe.distill.num_steps == 1  # four times 250 tokens, in rows of 512 of which a step has four
    assert (recipe.search.batch_size, recipe.search.distillation.num_steps) == (3, 10)
    assert "distillation" not in recipe.search.model_fields_set
    assert fill_left_out(recipe) == recipe


def answer_lengths(recipe: Recipe) -> list[int]:
    """Longest answers, tokens."""
    assert recipe.rl is not None
    assert recipe.eval is not None
    assert recipe.deploy is not None
    return [recipe.rl.max_tokens, recipe.eval.max_tokens, recipe.deploy.max_tokens]


def test_chats_decide_how_long_answers_are_and_a_run_that_began_before_goes_on(with_parent: Path) -> None:
    before = load_recipe(with_parent)
    assert answer_lengths(before) == [96, 128, 128]  # the file of the chats is not there
    (with_parent.parent / "a.jsonl").write_text('{"text": "%s"}\n' % ("x" * 587))
    own = ["serving.max_model_len=200", "eval.serving.max_model_len=256", "rl.max_tokens=40"]
    assert answer_lengths(load_recipe(with_parent)) == [224] * 3  # a third of 600 bytes, in 32s
    recipe = load_recipe(with_parent, own)
    assert answer_lengths(recipe) == [40, 256 - 128, 200 - 100]
    assert recipe.rl is not None
    assert recipe.rl.micro_batch_size == 2048 // (128 + 40)
    assert llama_nemotron(recipe)["eval"].config.canonical()["max_tokens"] == 128
    assert fill_left_out(recipe) == recipe
    assert filled_as_recorded(load_recipe(with_parent), before.canonical()).canonical() == before.canonical()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_is_filled_where_the_parent_is_new_or_in_a_store_or_not_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.digest == Recipe.parse(recipe.model_dump(exclude_unset=True)).digest


def test_the_length_of_chats_follows_from_their_rows(with_parent: Path) -> None:
    rows = [json.dumps({"input": "x" * 1000, "output": ""}), *[json.dumps({"input": "", "output": ""})] * 9]
    (with_parent.parent / "a.jsonl").write_text("\n".join(rows))
    sft = load_recipe(with_parent).sft
    assert sft is not None
    assert sft.seq_len == 384  # a thousand bytes and the names of the keys, a third of that, in 64s
    overridden = load_recipe(with_parent, ["sft.seq_len=96"]).sft
    assert overridden is not None
    assert overridden.seq_len == 96
