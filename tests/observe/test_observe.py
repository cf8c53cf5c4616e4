"""The numbers a run reports, its folder and its report."""

import json
import logging
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from torch.utils.flop_counter import FlopCounterMode

from ava_fast.config import load_config
from ava_fast.errors import UserError
from ava_fast.model.transformer import Transformer
from ava_fast.observe.console import duration, step_line
from ava_fast.observe.report import write_report
from ava_fast.observe.run import Metrics, new_run, newest_run, read_metrics, start_logging, stop_logging
from ava_fast.observe.throughput import active_parameters, flops_per_token

TINY = ["model.vocab_size=64", "model.hidden_size=16", "model.num_heads=2", "moe.intermediate_size=8"]


@pytest.mark.parametrize(
    "overrides",
    [[], ["moe.num_experts=0"], ["model.num_dense_layers=1", "moe.shared_experts=2", "model.num_kv_heads=1"]],
)
def test_flops_are_those_of_the_matrix_products(overrides: list[str]) -> None:
    config = load_config(None, [*TINY, "data.max_length=32", *overrides])
    model = Transformer(config)
    tokens = torch.randint(64, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).objective.backward()
    # The counter sees neither attention nor the head's third product, which adds to its result.
    unseen = 2 * 32 * 16 * 64
    ops, counts = torch.ops, counter.get_flop_counts()["Global"]
    seen = ops.aten.mm, ops.ava_kernels.moe_mlp, ops.ava_kernels.moe_mlp_backward
    products = sum(counts.get(op, 0) for op in seen)
    causal_attention = 3 * 3 * 2 * (2 * 2 * 8 * 32 * 32) // 2  # forward + 2 × backward, layers, heads, half masked
    assert products + unseen + causal_attention == 32 * flops_per_token(config, config.data.max_length)


def test_active_parameters_leave_out_idle_experts_and_the_look_up() -> None:
    config = load_config(None, [*TINY, "moe.num_experts=4", "moe.top_k=4"])
    model = Transformer(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert active_parameters(config) == matrices - 64 * 16
    halved = load_config(None, [*TINY, "moe.num_experts=4", "moe.top_k=2"])
    assert active_parameters(config) - active_parameters(halved) == 3 * 2 * 3 * 16 * 8


def test_the_step_line_says_what_a_person_asks() -> None:
    record = {"step": 5, "loss": 3.21, "learning_rate": 4e-3, "grad_norm": 0.41, "tokens_per_second": 1e4, "mfu": None}
    line = step_line(record, 10, 75.0)
    assert line == "step 5/10 | loss 3.2100 | lr 4.00e-03 | norm 0.41 | 10,000 tok/s | ETA 1:15"
    assert "MFU 41.2 %" in step_line({**record, "mfu": 0.412}, 10, 75.0)
    routing = {"rerouted": [0.0, 0.1, 0.023], "dropped": [0.0, 0.0, 0.0], "utilisation": [0.5, 0.5, 0.5]}
    line = step_line({**record, "routing": routing}, 10, 75.0)
    assert line == "step 5/10 | loss 3.2100 | lr 4.00e-03 | norm 0.41 | reroute 4.1 % | 10,000 tok/s | ETA 1:15"
    assert " | drop 0.3 % | " in step_line({**record, "routing": {**routing, "dropped": [0.009, 0, 0]}}, 10, 75.0)
    dropless = {**routing, "rerouted": [0.0, 0.0, 0.0]}
    assert step_line({**record, "routing": dropless}, 10, 75.0) == step_line(record, 10, 75.0)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3723.0, "1:02:03"), (float("inf"), "?"), (float("nan"), "?")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_resuming_drops_records_after_the_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    written = [("step", 1), ("verdict", 1), ("step", 2), ("verdict", 2), ("verdict", 2), ("step", 3)]
    for kind, step in written:
        metrics.write({"kind": kind, "step": step})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    metrics = Metrics(path, 2, 2)  # of the two verdicts after step 2, the second came after the checkpoint
    metrics.write({"kind": "step", "step": 3, "again": True})
    metrics.close()
    kept = [{"kind": kind, "step": step} for kind, step in written[:4]]
    assert read_metrics(path) == [*kept, {"kind": "step", "step": 3, "again": True}]
    Metrics(path, 1, 2).close()  # a roll-back: the steps go, the verdicts that led to it stay
    assert read_metrics(path) == [kept[0], kept[1], kept[3]]


def test_runs_are_named_and_the_newest_of_a_name_is_found(tmp_path: Path) -> None:
    def config(name: str | None) -> list[str]:
        return [f"logging.output_dir={tmp_path}", f"logging.experiment_name={name or 'null'}"]

    assert newest_run(load_config(None, config("a"))) is None
    for name in ("a", "a_b", None):
        run = new_run(load_config(None, config(name)))
        assert run.name.startswith("run_")
        (run / "checkpoints" / "step_1").mkdir(parents=True)
        assert newest_run(load_config(None, config(name))) == run
    unfinished = new_run(load_config(None, config("a")))
    assert newest_run(load_config(None, config("a"))) != unfinished


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    config = load_config(None, [f"logging.output_dir={tmp_path}"])
    assert len({new_run(config), new_run(config)}) == 2


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(None, [f"logging.output_dir={tmp_path}/file"])
    with pytest.raises(UserError, match=r"file/runs: .*logging\.output_dir"):
        new_run(config)


def test_the_report_tells_what_metrics_hold(tmp_path: Path) -> None:
    records = [
        {
            "kind": "step",
            "step": s,
            "loss": 4.0 / s,
            "learning_rate": 0.1,
            "grad_norm": 1.0,
            "seconds": 0.5,
            "tokens": 64 * s,
            "tokens_per_second": 128.0,
        }
        for s in (1, 2)
    ]
    records.append({"kind": "evaluation", "step": 2, "loss": 1.5, "seconds": 0.1})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = load_config(None, ["evaluation.prompt=abc"])
    summary = {"status": "finished", "parameters": 1234, "unigram": 5.0, "bigram": 3.25, "continuation": "def"}
    text = write_report(tmp_path, config, summary).read_text()
    assert "| training loss, last step | 2.0000 nats per token |" in text
    assert "| tokens per second, median step | 128 |" in text
    assert "| 2 | 1.5000 | 4.48 |" in text
    assert "| bigram baseline | 3.2500 nats per token on the same tokens |" in text
    assert "abcdef" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "routing.png" not in text
    assert not (tmp_path / "routing.png").exists()


@pytest.mark.parametrize(("rerouted", "panels"), [(0.0, 2), (0.25, 3)])
def test_the_report_shows_how_each_block_routed(
    rerouted: float, panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for step in (1, 2, 3):
        routing = {"utilisation": [0.5, 0.25 * step], "entropy": [1.0, 0.9], "rerouted": [rerouted, 0.0]}
        loss = {"loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 0.5}
        loss |= {"tokens": 64 * step, "tokens_per_second": 128.0}
        steps.append({"kind": "step", "step": step, **loss, "routing": {**routing, "dropped": [0.0, 0.0]}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    config = load_config(None, ["model.num_dense_layers=1"])
    text = write_report(tmp_path, config, {"status": "finished", "parameters": 1}).read_text()
    assert "](routing.png)" in text
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[-1].axes
    assert len(axes) == panels
    assert [line.get_label() for line in axes[0].get_lines()] == ["block 1", "block 2"]
    assert [list(line.get_xdata()) for line in axes[0].get_lines()] == [[1, 2, 3]] * 2
    first, second = (line.get_ydata() for line in axes[0].get_lines())
    assert list(first) == pytest.approx([0.5] * 3)
    assert second[0] == pytest.approx(0.25)
    assert second[0] < second[1] < second[2] < 0.75


def test_a_run_stopped_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path, load_config(None), {"status": "stopped", "parameters": 1}).read_text()
    assert "| status | stopped |" in text
    assert not (tmp_path / "loss.png").exists()


def test_after_a_run_lines_go_where_the_process_sends_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ava_fast.trainer")
    start_logging(tmp_path)
    logger.warning("of the run")
    stop_logging()
    logger.warning("of the process")
    logger.debug("which wants no such lines")
    assert [record.message for record in caplog.records] == ["of the process"]
    assert (tmp_path / "logs" / "training.log").read_text().endswith("of the run\n")
