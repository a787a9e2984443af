import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from components.core.base import fault_injection as faults
from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.text.example import DocumentList, Example
from components.core.text.packing import IGNORE, PackedStream
from components.core.training.loop import adamw, pays_to_compile, rank_batch, train
from components.core.training.losses import counted, cross_entropy_sum
from components.core.training.train_config import TrainConfig, learning_rate
from tests.waiting import PATIENCE_S

CONFIG = TrainConfig(num_steps=8, global_batch_size=4, micro_batch_size=1, seq_len=16, learning_rate=3e-3, seed=1)
BLOCKS = [
    {"attention": {"no_op": False, "n_heads_in_group": 2}, "ffn": {"no_op": False, "intermediate_size": 48}},
    {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": {"no_op": False, "intermediate_size": 24}},
    {"attention": {"no_op": False, "n_heads_in_group": 1}, "ffn": {"no_op": True, "intermediate_size": None}},
]


def tiny_model(seed: int = 0, *, tied: bool = False) -> TesseraForCausalLM:
    torch.manual_seed(seed)
    config = {
        "model_type": "nemotron-nas",
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "block_configs": BLOCKS,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    return TesseraForCausalLM(model_config(config))


def stream() -> PackedStream:
    numbers = torch.randint(1, 40, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return PackedStream(DocumentList([Example(ids, [True] * 9) for ids in numbers]), CONFIG.seq_len, seed=1)


def next_token(model: TesseraForCausalLM, batch):
    output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden, labels = counted(output.last_hidden_state, batch.labels_BT)
    return {"loss": cross_entropy_sum(hidden, labels, model.lm_head)}


def plain_pytorch(steps: int) -> list[float]:
    """The same training written out in plain PyTorch, one batch a step and no machinery."""
    model, data = tiny_model(), stream()
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        batch = data.batch(4 * step, 4)
        logits = model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_equal_plain_pytorch(tmp_path):
    losses = train(tiny_model(), stream(), next_token, CONFIG, quiet_context(tmp_path))

    assert losses == pytest.approx(plain_pytorch(8), abs=1e-5)


SIZES = {
    "divide": {},
    "one row is left": {"global_batch_size": 5, "micro_batch_size": 2},
    "one row for two": {"global_batch_size": 1, "micro_batch_size": 4},
}
"""Batch sizes of trainings on two processes."""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of trainings on two processes, the last of which one process has begun."""
    folder = tmp_path_factory.mktemp("two")
    stopping = Stopping(3)
    resume = Resume(folder / "begun by one" / "resume")
    context = StageContext(stopping, resume, folder, Placement(threads=1), stopping=stopping)
    with pytest.raises(Interrupted):
        train(tiny_model(), stream(), next_token, CONFIG, context)
    run_ranks(2, folder, {**SIZES, "begun by one": {}})
    return folder


@pytest.mark.parametrize("case", SIZES)
def test_two_processes_give_the_losses_of_one_also_where_rows_do_not_divide(case, two_ranks, tmp_path):
    one = train(tiny_model(), stream(), next_token, CONFIG.model_copy(update=SIZES[case]), quiet_context(tmp_path))

    assert json.loads((two_ranks / case / "losses.json").read_text()) == pytest.approx(one, abs=1e-5)


def test_ranks_share_all_rows_and_have_as_many_each():
    batch = stream().batch(0, 5)
    shares = [rank_batch(stream(), 0, 5, rank, 3) for rank in range(3)]

    assert [len(share.input_ids_BT) for share in shares] == [2, 2, 2]
    targets = torch.stack([share.labels_BT for share in shares], dim=1).flatten(0, 1)
    assert torch.equal(targets[:5], batch.labels_BT)
    assert bool((targets[5:] == IGNORE).all())
    assert sum(share.num_targets for share in shares) == batch.num_targets
    tokens = [int((share.segment_ids_BT > 0).sum()) for share in (batch, *shares)]
    assert tokens[0] == sum(tokens[1:])


def test_a_rank_reads_its_own_rows_alone(monkeypatch):
    read = []

    def row(self, index):
        read.append(index)
        return [self.documents[0]]

    monkeypatch.setattr(PackedStream, "row", row)
    rank_batch(stream(), 8, 6, 1, 2)

    assert read == [9, 11, 13]


def test_losses_with_moments_of_8_bits_are_near_those_of_float32(tmp_path):
    config = CONFIG.model_copy(update={"optimizer": "adamw_8bit"})
    losses = train(tiny_model(), stream(), next_token, config, quiet_context(tmp_path))

    assert losses == pytest.approx(plain_pytorch(8), abs=0.01)


@pytest.mark.parametrize(("stop_after", "optimizer"), [(1, "adamw"), (5, "adamw"), (5, "adamw_8bit")])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, stop_after, optimizer):
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    whole = tiny_model()
    losses = train(whole, stream(), next_token, config, quiet_context(tmp_path / "whole"))
    stopping = Stopping(stop_after)
    context = StageContext(stopping, Resume(tmp_path / "resume"), tmp_path, Placement(threads=1), stopping=stopping)
    with pytest.raises(Interrupted):
        train(tiny_model(), stream(), next_token, config, context)
    again = tiny_model(seed=5)
    goes_on = StageContext(NullReporter(), Resume(tmp_path / "resume"), tmp_path, Placement(threads=1))

    assert train(again, stream(), next_token, config, goes_on) == losses
    for (name, first), second in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    whole = tiny_model()
    losses = train(whole, stream(), next_token, CONFIG, quiet_context(tmp_path / "whole"))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_ranks(1, tmp_path, {"killed": {}}, {faults.VARIABLE: "point.named:3=kill"})
    assert b"SIGKILL" in caught.value.stderr
    again = tiny_model(seed=5)
    goes_on = StageContext(NullReporter(), Resume(tmp_path / "killed" / "resume"), tmp_path, Placement(threads=1))
    assert goes_on.resume.latest() == tmp_path / "killed" / "resume" / "000000003"

    assert train(again, stream(), next_token, CONFIG, goes_on) == losses
    for (name, first), second in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_run_goes_on_with_another_number_of_processes(two_ranks, tmp_path):
    one = train(tiny_model(), stream(), next_token, CONFIG, quiet_context(tmp_path))

    assert json.loads((two_ranks / "begun by one" / "losses.json").read_text()) == pytest.approx(one, abs=1e-5)


def test_weight_decay_shrinks_matrices_and_leaves_norms_alone():
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw(model, 0.5, weight_decay=0.1).step()

    for name, parameter in model.named_parameters():
        kept = 1.0 if name.endswith("norm.weight") else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


def test_schedule_climbs_then_falls_as_the_cosine():
    config = TrainConfig(num_steps=110, learning_rate=1.0, final_learning_rate=0.1, warmup_fraction=10 / 110)

    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)


class Stopping:
    """Asks to stop once a number of steps were reported."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def emit(self, event) -> None:
        self.seen += event["type"] == "progress"

    def __call__(self) -> bool:
        return self.seen >= self.after


def run_ranks(
    ranks: int,
    folder: Path,
    trainings: Mapping[str, Mapping[str, int]],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Train on several processes, once with each of the batch sizes, in a folder named after them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, str(folder), json.dumps(trainings)]
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    whole = {**inherited, **(environment or {})}
    subprocess.run(command, check=True, env=whole, capture_output=True, timeout=PATIENCE_S)


def main(folder: Path, trainings: Mapping[str, Mapping[str, int]]) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, sizes in trainings.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        context = StageContext(NullReporter(), Resume(own / "resume"), own, Placement(processes=2, threads=1), rank)
        config = CONFIG.model_copy(update={"resume_interval_s": 1e-9, **sizes})
        losses = train(tiny_model(), stream(), next_token, config, context)
        if rank == 0:
            (own / "losses.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that dynamo looks at
def test_compiled_layers_learn_what_plain_pytorch_learns(tmp_path):
    compiled = CONFIG.model_copy(update={"compile": True})
    losses = train(tiny_model(), stream(), next_token, compiled, quiet_context(tmp_path))

    assert losses == pytest.approx(plain_pytorch(8), abs=1e-5)


def test_only_long_runs_on_a_cpu_with_a_compiler_are_compiled(monkeypatch):
    model, cpu, cuda = tiny_model(), torch.device("cpu"), torch.device("cuda")
    long = CONFIG.model_copy(update={"num_steps": 10**9})
    monkeypatch.setenv("CXX", sys.executable)  # any program
    assert pays_to_compile(model, long, cpu)
    assert not pays_to_compile(model, CONFIG, cpu)
    assert not pays_to_compile(model, long, cuda)
    assert not pays_to_compile(model, long, cpu, num_ranks=2)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not pays_to_compile(model, long, cpu)
