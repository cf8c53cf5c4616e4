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
TORCHRUN = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --node-rank=NODE_RANK"
MASTER = "--master-addr=node-0 --master-port=29400"  # on node 0 that name is the loopback's


def can_be_apart() -> bool:
    try:
        wire = ["ip", "link", "add", "wire", "type", "veth", "peer", "name", "end"]
        return subprocess.run([*APART, *wire], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not can_be_apart(), reason="this system gives no namespaces, or no wires between them")


def train(config: Path, before: str = "true") -> list[str]:
    """Runs on both nodes, after a command of bash → what each said."""
    command = f"{before}; exec {TORCHRUN} {MASTER} -m ava_fast.train --config {config}"
    subprocess.run(
        [*APART, "bash", str(Path(__file__).with_name("two_nodes.sh")), str(config.parent), "bash", "-c", command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    return [(config.parent / f"node_{node}.log").read_text() for node in (0, 1)]


def test_nodes_whose_names_are_their_loopbacks_train_as_one_machine_does(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    changes = {"training": {"max_steps": 4}, "checkpoint": {"save_steps": 2}, "evaluation": {"eval_steps": 0}}
    together = write_config(tmp_path / "together" / "c.yaml", corpus, **changes)
    apart = write_config(tmp_path / "apart" / "c.yaml", corpus, **changes)
    assert launch(together, ranks=2).returncode == 0
    said = train(apart)
    assert [text.splitlines()[-1] for text in said] == ["exit code 0"] * 2, "".join(said)
    runs = only_run(together), only_run(apart)
    assert records(runs[0], "step") == records(runs[1], "step")
    weights = [read_weights(run / "checkpoints" / "step_4" / "engine") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_node_that_does_not_see_the_run_ends_it_before_it_has_begun(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    (tmp_path / "outputs").mkdir()
    said = train(config, f"[ NODE_RANK = 0 ] || mount -t tmpfs none {tmp_path / 'outputs'}")
    for text in said:
        assert "is not the same folder on every node: node-1 cannot see what rank 0 writes there" in text
        assert "exitcode  : 2" in text
    assert list((tmp_path / "outputs" / "runs").iterdir()) == []
