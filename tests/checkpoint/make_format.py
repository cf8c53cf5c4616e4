"""Makes tests/checkpoint/format_N, a checkpoint of the format that this release writes, to be read by all later ones.

    PYTHONPATH=tests python tests/checkpoint/make_format.py

Once a format is released, its folder stays as it is.
"""

import os
import shutil
import tempfile
from pathlib import Path

from corpus import write_config, write_corpus
from launch import only_run

from ava_fast import train
from ava_fast.checkpoint import store

HERE = Path(__file__).resolve().parent


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        config = write_config(
            Path("c.yaml"),
            write_corpus(Path("text")),
            model={"vocab_size": 260, "hidden_size": 4, "num_layers": 1, "num_heads": 1},
            moe={"num_experts": 2, "top_k": 1, "intermediate_size": 4, "expert_bias_rate": 0.01},
            training={"max_steps": 3},
        )
        assert train.main(["--config", str(config)]) == 0
        target = HERE / f"format_{store.FORMAT_VERSION}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(only_run(config) / "checkpoints" / "step_3", target)


if __name__ == "__main__":
    main()
