"""Replicas share the requests, and know all answers afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.runtime.placement import Placement
from components.core.serving.settings import process_environment
from components.eval.replicas import Replicas, gpus_of_replica, merge_shares, share_of

RANK = """
import json
import sys
from pathlib import Path
from components.eval.replicas import Replicas, merge_shares
import torch.distributed as dist
dist.init_process_group("gloo")
replicas = Replicas.of_ranks()
mine = replicas.share([f"é{number}" * number for number in range(7)])
speeds = replicas.exchange({} if replicas.index else {"speed": 0.1})
found = json.dumps([merge_shares(replicas.exchange(mine)), speeds])
Path(sys.argv[1], f"{replicas.index}.json").write_text(found)
dist.destroy_process_group()
"""


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_are_disjoint_of_almost_equal_size_and_merge_to_the_whole(items: list[int], count: int) -> None:
    numbered = list(enumerate(items))
    shares = [share_of(numbered, index, count) for index in range(count)]
    assert sorted(item for share in shares for item in share) == numbered
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert merge_shares(shares) == numbered


def test_one_process_is_the_only_replica() -> None:
    replicas = Replicas.of_ranks()
    assert (replicas.index, replicas.count, replicas.is_first) == (0, 1, True)
    assert replicas.share("abc") == ["a", "b", "c"]
    assert replicas.exchange({"answers": [1.5, None]}) == [{"answers": [1.5, None]}]


def test_every_replica_receives_the_values_of_all(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += [str(program), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(3)]
    items = [f"é{number}" * number for number in range(7)]
    assert found == [[items, [{"speed": 0.1}, {}, {}]]] * 3


def test_a_replica_has_the_gpus_of_its_place_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    four = Placement(processes=4, gpus=8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert gpus_of_replica(four, tensor_parallel=2) == "6,7"
    assert gpus_of_replica(Placement(processes=8, gpus=8), tensor_parallel=1) == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert gpus_of_replica(Placement(processes=4, gpus=4), tensor_parallel=1) == "GPU-d"
    assert gpus_of_replica(Placement(gpus=8), tensor_parallel=8) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_of_replica(Placement(nodes=4, gpus=1), tensor_parallel=1) == "3"  # all nodes on one machine
    assert gpus_of_replica(Placement(processes=2), tensor_parallel=1) is None


def test_a_vllm_process_of_a_rank_sees_nothing_of_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
    for name in (*of_ranks, "TORCHELASTIC_USE_AGENT_STORE", "PET_NNODES", "RANKS_OF_USER"):
        monkeypatch.setenv(name, "1")
    environment = process_environment(threads=3)
    assert environment["RANKS_OF_USER"] == "1"
    assert not environment.keys() & {*of_ranks, "TORCHELASTIC_USE_AGENT_STORE", "PET_NNODES"}
    assert environment["OMP_NUM_THREADS"] == "3"
