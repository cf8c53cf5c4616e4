"""Two machines and the network between them, as far as namespaces can be: their own names, hosts files, addresses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import write_config, write_corpus
from launch import launch, only_run, records

from ava_fast.checkpoint.shards import read_weights

APART = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--node-rank=NODE_RANK"]


def can_be_apart() -> bool:
    try:
        wire = ["ip", "link", "add", "wire", "type", "veth", "peer", "name", "end"]
        return subprocess.run([*APART, *wire], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_be_apart(), reason="this system gives no namespaces, or no wires between them")
def test_nodes_whose_names_are_their_loopbacks_train_as_one_machine_does(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    changes = {"training": {"max_steps": 4}, "checkpoint": {"save_steps": 2}, "evaluation": {"eval_steps": 0}}
    together = write_config(tmp_path / "together" / "c.yaml", corpus, **changes)
    apart = write_config(tmp_path / "apart" / "c.yaml", corpus, **changes)
    assert launch(together, ranks=2).returncode == 0
    train = ["--master-addr=node-0", "--master-port=29400", "-m", "ava_fast.train", "--config", str(apart)]
    nodes = subprocess.run(
        [*APART, "bash", str(Path(__file__).with_name("two_nodes.sh")), str(tmp_path), *TORCHRUN, *train],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    said = "".join((tmp_path / f"node_{node}.log").read_text() for node in (0, 1))
    assert nodes.returncode == 0, said
    runs = only_run(together), only_run(apart)
    assert records(runs[0], "step") == records(runs[1], "step")
    weights = [read_weights(run / "checkpoints" / "step_4" / "engine") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
