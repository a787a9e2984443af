"""Models of which each rank has a part, on two and three processes, beside one process and plain Hugging Face.

Two ranks train, are interrupted and write; three ranks read what they and one process wrote, and go on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from components.core.model import checkpoint, stored_weights
from components.core.model.checkpoint import load_model, save_model
from components.core.model.vocabulary import NewTokens, grow_vocabulary
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.runtime.devices import mesh_of
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume, Write
from components.core.training import sharding, step_memory
from components.core.training.checkpoints import load_point, save_point
from components.core.training.loop import prepare, train
from components.core.training.losses import gathered, hidden_states, next_norms
from components.core.training.sharding import (
    layer_policy,
    load_student,
    load_teacher,
    rows_of_rank,
    save_trained,
    shard,
)
from tests.components.core import tiny_models
from tests.components.core.training.test_loop import CONFIG, Stopping, next_token, stream, tiny_model
from tests.waiting import PATIENCE_S

TOKENS = NewTokens(70, {64: [3, 4], 65: [5], 7: [9, 10]})
SMALL_FILES = "40KB"
IN_8_BITS = CONFIG.model_copy(update={"optimizer": "adamw_8bit"})
ON_GPUS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def context_in(folder: Path, rank: int = 0, **changes: Any) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(NullReporter(), Resume(folder / "resume"), folder, Placement(threads=1), rank)
    return replace(context, **changes)


class DueAfter(Resume):
    """Is due after some steps, and remembers after which one it saved."""

    def __init__(self, folder: Path, steps: set[int]) -> None:
        super().__init__(folder)
        self.steps, self.asked, self.saved = steps, 0, list[int]()

    def due(self) -> bool:
        self.asked += 1
        return self.asked in self.steps

    def save_in_background(self, step: int, copy: Callable[[], Write], *, completes: bool = True) -> None:
        self.saved.append(step)
        super().save_in_background(step, copy, completes=completes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models, and of all that two and then three ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_models.tokenizer().save_pretrained(folder / "tokenizer")
    for name, tied in (("untied", False), ("tied", True)):
        tiny_models.llama(0, tie_word_embeddings=tied).bfloat16().save_pretrained(folder / name)
    save_model(tiny_model(), folder / "tiny", tokenizer=folder / "tokenizer")
    save_model(tiny_model(tied=True), folder / "tiny-tied", tokenizer=folder / "tokenizer")
    stopping = Stopping(3)
    with pytest.raises(Interrupted):
        train(
            tiny_model(),
            stream(),
            next_token,
            CONFIG,
            context_in(folder / "alone", reporter=stopping, stopping=stopping),
        )
    for ranks in (2, 3):
        run_ranks(ranks, folder)
    return folder


def run_ranks(ranks: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, timeout=PATIENCE_S, text=True
    )
    assert ended.returncode == 0, ended.stderr


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    two_ranks(folder, rank) if ranks == 2 else three_ranks(folder, rank)
    dist.destroy_process_group()


def record(folder: Path, name: str, value: object) -> None:
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(value))


def recorded(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_small_pieces() -> None:
    step_memory.OWN_GROUP_PARAMETERS = 1  # each layer, the embedding and the head are gathered by themselves
    stored_weights.PIECE_VALUES = sharding.REDUCED_VALUES = 100
    checkpoint.MAX_SHARD_SIZE = SMALL_FILES


def two_ranks(folder: Path, rank: int) -> None:
    in_small_pieces()
    model = load_student(folder / "tiny", CONFIG, context_in(folder / "trained"))
    record(folder, "losses-2", train(model, stream(), next_token, CONFIG, context_in(folder / "trained", rank)))
    save_trained(model, folder / "trained-2", tokenizer=folder / "tokenizer", dtype=torch.float32)
    record(folder, "reductions", [count_reductions(folder, rank, memory_gib) for memory_gib in (8.0, 1e-6)])

    for name, written in (("tiny", "stopped"), ("tiny-tied", "stopped-tied")):
        stopping = Stopping(3)
        context = context_in(folder / written, rank, reporter=stopping, stopping=stopping)
        with pytest.raises(Interrupted):
            train(load_student(folder / name, CONFIG, context), stream(), next_token, CONFIG, context)
        context.resume.wait()

    stopping = Stopping(3)
    context = context_in(folder / "8bit", rank, reporter=stopping, stopping=stopping)
    with pytest.raises(Interrupted):
        train(load_student(folder / "tiny", IN_8_BITS, context), stream(), next_token, IN_8_BITS, context)
    context.resume.wait()

    model = tiny_model()
    shard(model, mesh_of(torch.device("cpu")), offload=True)
    record(folder, "losses-offload", train(model, stream(), next_token, CONFIG, context_in(folder / "offload", rank)))

    resume = DueAfter(folder / "agreed" / "resume", ({1, 3, 4}, {2, 3, 4, 6})[rank])
    context = context_in(folder / "agreed", rank, resume=resume)
    train(load_student(folder / "tiny", CONFIG, context), stream(), next_token, CONFIG, context)
    (folder / f"saved-{rank}.json").write_text(json.dumps(resume.saved))

    apart = context_in(folder / f"machine-{rank}", rank)
    model = load_student(folder / "tiny", CONFIG, apart)
    step = prepare(model, next_token, CONFIG, apart.placement)
    save_point(apart, 5, model, step.optimizer, {"losses": [1.0]})
    apart.resume.wait()

    sharding.layer_policy = lambda *_: ON_GPUS
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    model = load_student(folder / "tiny", config, apart)
    record(folder, "losses-policy", train(model, stream(), next_token, config, context_in(folder / "policy", rank)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def count_reductions(folder: Path, rank: int, memory_gib: float) -> int:
    """Collective operations that add up gradients, in a step of two micro batches."""
    placement = Placement(threads=1, memory_gib=memory_gib)
    model = load_student(folder / "tiny", CONFIG, context_in(folder / "counted", rank))
    step = prepare(model, next_token, CONFIG, placement)
    batches = [stream().batch(number, 1) for number in (rank, 2 + rank)]
    with Operations() as operations:
        step.run(batches, num_targets=32, learning_rate=1e-3)
    return sum("reduce_scatter" in name for name in operations.names)


class Operations(TorchDispatchMode):
    """Names of the operations in a block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def three_ranks(folder: Path, rank: int) -> None:
    in_small_pieces()
    for name in ("untied", "tied"):
        context = context_in(folder / "read", rank)
        model = load_student(folder / name, CONFIG, context)
        assert isinstance(model, FSDPModule)
        plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).state_dict()
        for key, weight in cast("Any", model).named_parameters():
            first, stop = rows_of_rank(len(plain[key]), rank, 3)
            assert torch.equal(weight.to_local(), plain[key][first:stop]), key
        for written, by_block in (("again", False), ("blocks", True)):
            save_trained(
                model,
                folder / f"{name}-{written}",
                tokenizer=folder / "tokenizer",
                dtype=torch.bfloat16,
                by_block=by_block,
            )
        grown = load_student(folder / name, CONFIG, context, TOKENS)
        save_trained(grown, folder / f"{name}-grown", tokenizer=folder / "tokenizer", dtype=torch.float32)
        teacher = load_teacher(folder / name, context)
        assert {weight.dtype for weight in teacher.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            states = teacher.forward_with(hidden_states, stream().batch(0, 2))
            assert isinstance(teacher.lm_head.weight, DTensor)  # sharded again
            with gathered(teacher.lm_head):
                logits = teacher.lm_head.forward(states[-1])
        (norm,) = next_norms(teacher, [(1, 1)])
        assert norm is not None
        if rank == 0:
            torch.save([logits, norm(states[1])], folder / f"{name}-taught.pt")

    for written in ("stopped", "stopped-tied", "machine-0", "alone"):
        context = context_in(folder / written, rank, resume=Resume(folder / written / "resume"))
        model = load_student(folder / ("tiny-tied" if written == "stopped-tied" else "tiny"), CONFIG, context)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # what is not read stays zero
        if written == "machine-0":
            step = prepare(model, next_token, CONFIG, context.placement)
            point = load_point(context, model, step.optimizer)
            record(folder, "losses-machine-0", [point and point[0], point and point[1]["losses"]])
        else:
            record(folder, f"losses-{written}-3", train(model, stream(), next_token, CONFIG, context))
        save_trained(model, folder / f"{written}-3", tokenizer=folder / "tokenizer", dtype=torch.float32)

    context = context_in(folder / "8bit", rank, resume=Resume(folder / "8bit" / "resume"))
    model = load_student(folder / "tiny", IN_8_BITS, context)
    record(folder, "losses-8bit-3", train(model, stream(), next_token, IN_8_BITS, context))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", SMALL_FILES)


Trained = tuple[list[float], dict[str, torch.Tensor]]
"""Losses and weights of a training."""


def trained_alone(folder: Path, *, tied: bool = False) -> Trained:
    """The same training in one process."""
    model = tiny_model(tied=tied)
    losses = train(model, stream(), next_token, CONFIG, quiet_context(folder))
    return losses, model.state_dict()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_alone(tmp_path_factory.mktemp("one"))


def assert_close(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.usefixtures("small_files")
def test_ranks_write_the_files_of_one_process_byte_for_byte(done: Path, tmp_path: Path, name: str) -> None:
    model = load_model(done / name)
    for written, by_block in (("again", False), ("blocks", True)):
        out = tmp_path / written
        save_model(model, out, tokenizer=done / "tokenizer", dtype=torch.bfloat16, by_block=by_block)
        assert files(done / f"{name}-{written}") == files(out)
    assert "model.safetensors.index.json" in files(done / f"{name}-again")
    plain = AutoModelForCausalLM.from_pretrained(done / f"{name}-again").state_dict()
    for key, weight in AutoModelForCausalLM.from_pretrained(done / name).state_dict().items():
        assert torch.equal(plain[key], weight), key


def test_a_model_of_one_file_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    mixed = {"b": torch.rand(3, 5), "a": torch.rand(7).bfloat16(), "c": torch.rand(2, 2), "d": torch.rand(4).half()}
    stored_weights.write_weights(tmp_path, mixed, lambda name: iter(mixed[name].split(2)), "5GB")
    (file,) = tmp_path.iterdir()

    found = load_file(file)
    assert file.name == "model.safetensors"
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in mixed.items()}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_new_tokens_have_the_rows_that_one_process_gives_them(done: Path, name: str) -> None:
    model = load_model(done / name)
    grow_vocabulary(model, TOKENS)
    found = load_model(done / f"{name}-grown")

    assert found.config.vocab_size == 128
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], weight)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_sharded_teacher_computes_what_a_whole_one_computes(done: Path, tmp_path: Path, name: str) -> None:
    teacher = load_teacher(done / name, context_in(tmp_path))
    with torch.no_grad():
        states = hidden_states(teacher, stream().batch(0, 2))
        whole = [teacher.lm_head(states[-1]), teacher.model.layers[1].input_layernorm(states[1])]
    torch.testing.assert_close(torch.load(done / f"{name}-taught.pt"), whole)


def test_two_ranks_train_the_weights_of_one_process(done: Path, one_process: Trained) -> None:
    losses, weights = one_process
    assert recorded(done, "losses-2") == pytest.approx(losses, abs=1e-5)
    assert_close(done / "trained-2", weights)


@pytest.mark.parametrize("stopped", ["stopped", "alone"])
def test_three_ranks_go_on_from_two_and_from_one(done: Path, one_process: Trained, stopped: str) -> None:
    losses, weights = one_process
    assert recorded(done, f"losses-{stopped}-3") == pytest.approx(losses, abs=1e-5)
    assert_close(done / f"{stopped}-3", weights)


def test_a_matrix_of_embedding_and_head_is_trained_as_in_one_process(done: Path, tmp_path: Path) -> None:
    losses, weights = trained_alone(tmp_path, tied=True)
    assert recorded(done, "losses-stopped-tied-3") == pytest.approx(losses, abs=1e-5)
    assert_close(done / "stopped-tied-3", weights)


def test_three_ranks_go_on_from_two_with_moments_of_8_bits(done: Path, tmp_path: Path) -> None:
    losses = train(tiny_model(), stream(), next_token, IN_8_BITS, context_in(tmp_path))
    assert recorded(done, "losses-8bit-3") == pytest.approx(losses, abs=1e-3)
    (point,) = (path for path in (done / "8bit" / "resume").iterdir() if path.is_dir())
    written = load_file(next(path for path in point.iterdir() if path.name.startswith("shard-00001")))
    assert written["model.embed_tokens.weight/exp_avg"].dtype == torch.uint8


def test_one_process_goes_on_from_two_ranks(done: Path, one_process: Trained) -> None:
    losses, weights = one_process
    model = tiny_model(seed=5)
    assert train(model, stream(), next_token, CONFIG, context_in(done / "stopped")) == pytest.approx(losses, abs=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-4)


def test_each_rank_writes_its_part_of_a_resume_point_and_nobody_pickles(done: Path) -> None:
    (point,) = (path for path in (done / "stopped" / "resume").iterdir() if path.is_dir())
    written = sorted(path.name for path in point.iterdir())
    assert [name.split("-model")[0] for name in written] == ["shard-00001", "shard-00002", "state.json"]
    first, second = (load_file(point / name)["model.embed_tokens.weight"] for name in written[:2])
    assert len(first) == len(second) == 20


def test_ranks_save_after_the_same_steps_those_after_which_each_of_them_is_due(done: Path) -> None:
    assert recorded(done, "saved-0") == recorded(done, "saved-1") == [3, 4]


def test_parts_of_ranks_on_another_machine_are_sent_to_the_first(done: Path) -> None:
    assert recorded(done, "losses-machine-0") == [5, [1.0]]
    assert_close(done / "machine-0-3", tiny_model().state_dict())
    assert [path for path in (done / "machine-1" / "resume").rglob("*") if path.is_file()] == []


def test_ranks_that_offload_train_as_those_that_do_not(done: Path) -> None:
    assert recorded(done, "losses-offload") == recorded(done, "losses-2")


def test_one_rank_offloads_goes_on_and_writes_its_model(done: Path, tmp_path: Path, one_process: Trained) -> None:
    """Its parameters are on the CPU beside a mesh of CPUs, so this shows what becomes of them, not the transfers."""
    losses, weights = one_process
    stopping = Stopping(3)
    stopped = context_in(tmp_path, reporter=stopping, stopping=stopping)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for context in (stopped, context_in(tmp_path)):
            model = tiny_model()
            shard(model, mesh_of(torch.device("cpu")), offload=True)
            with pytest.raises(Interrupted) if context is stopped else nullcontext():
                assert train(model, stream(), next_token, CONFIG, context) == pytest.approx(losses, abs=1e-5)
            context.resume.wait()
        save_trained(model, tmp_path / "model", tokenizer=done / "tokenizer", dtype=torch.float32)
    finally:
        dist.destroy_process_group()
    assert_close(tmp_path / "model", weights)


def test_gradients_are_reduced_once_a_step_where_there_is_memory_for_them(done: Path) -> None:
    once, each = recorded(done, "reductions")
    assert once > 0
    assert each == 2 * once


def test_layers_on_gpus_are_gathered_in_bfloat16_and_reduced_in_float32(done: Path, tmp_path: Path) -> None:
    assert layer_policy("cuda", torch.bfloat16) == ON_GPUS
    for device, products in (("cuda", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
        assert layer_policy(device, products) == MixedPrecisionPolicy()
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    losses = train(tiny_model(), stream(), next_token, config, context_in(tmp_path))
    assert recorded(done, "losses-policy") == pytest.approx(losses, abs=2e-2)


def test_rows_are_cut_as_fsdp_cuts_them() -> None:
    for num_rows in (1, 2, 7, 40):
        for ranks in (1, 2, 3, 8):
            parts = torch.arange(num_rows).chunk(ranks)
            spans = [rows_of_rank(num_rows, rank, ranks) for rank in range(ranks)]
            assert [list(range(*span)) for span in spans if span[0] < span[1]] == [part.tolist() for part in parts]
            assert all(first == stop == num_rows for first, stop in spans[len(parts) :])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
