"""What is said of a step that went wrong: who saw what, as a record, as lines, and as advice where the run stops."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ava_fast.config import Config
from ava_fast.engine import StepResult
from ava_fast.errors import TrainingError
from ava_fast.observe.run import number
from ava_fast.stability.failures import more_room
from ava_fast.stability.judge import FAILURES, Judge, Ruling, Trouble, Verdict

Culprit = dict[str, Any]
"""What a rank knows of the step: `rank`, `loss`, `parameters`, `documents`, and where there are, `module`, `errors`."""


def culprits(own: Culprit, trouble: Trouble) -> list[Culprit]:
    """Of all ranks, in their order: where something failed, or a loss or gradient is not finite, only those; else
    everyone. Collective."""
    everyone: list[Culprit] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if trouble in FAILURES:
        return [each for each in everyone if "errors" in each]
    return [each for each in everyone if each["loss"] is None or each["parameters"]] or everyone


def record(
    ruling: Ruling, judge: Judge, step: int, loss: float, result: StepResult, position: int, found: list[Culprit]
) -> dict[str, Any]:
    """Of metrics.jsonl. `position`: in the data, after the step's batches."""
    assert ruling.trouble is not None
    return {
        "kind": "verdict",
        "step": step,
        "verdict": ruling.verdict.value,
        "trouble": ruling.trouble.value,
        "reason": ruling.reason,
        "applied": ruling.apply,
        "loss": number(loss),
        "grad_norm": number(result.grad_norm),
        "nonfinite_gradients": result.nonfinite,
        "learning_rate_factor": ruling.factor,
        "position": position,
        "culprits": found,
        "counts": dict(judge.counts),
    }


def lines(ruling: Ruling, step: int, found: list[Culprit], recovery_steps: int) -> list[str]:
    """Of errors.log."""
    said = [f"after step {step}: {ruling.verdict.value}: {ruling.reason}; {_blame(found)}"]
    if ruling.trouble is Trouble.GRADIENT and not any(each["parameters"] for each in found):
        said.append("the same step, computed again, has only finite gradients: suspect this machine's hardware")
    if ruling.verdict is Verdict.CUT:
        said.append(
            f"the learning rate is cut to {ruling.factor:g} of its schedule, and back in {recovery_steps} good steps"
        )
    return said


def stopped(ruling: Ruling, judge: Judge, step: int, config: Config, saved: str) -> TrainingError:
    """What happened, and what to try. `saved`: what became of the emergency checkpoint."""
    counts = ", ".join(f"{judge.counts[t.value]} × {t.value}" for t in Trouble if judge.counts[t.value])
    said = f"stopped after step {step}: {ruling.reason}. In this run: {counts}. {saved}. "
    if ruling.trouble is Trouble.MEMORY:
        return TrainingError(f"{said}{more_room(config)}, then --resume latest")
    training, stability = config.training, config.stability
    return TrainingError(
        f"{said}Try a lower training.learning_rate (now {training.learning_rate:g}), more training.warmup_steps, "
        f"a lower training.max_grad_norm (now {training.max_grad_norm:g}) or other data, then --resume latest; if "
        "the steps were healthy, a higher stability.deviations or stability.max_norm, or more stability.max_skips "
        f"(now {stability.max_skips}). docs/when-training-misbehaves.md says more"
    )


def _blame(found: list[Culprit]) -> str:
    """`rank 1: documents 3, 17; parameters a, b, … (9)`"""

    def some(values: list[Any]) -> str:
        return ", ".join(map(str, values[:5])) + (f", … ({len(values)})" if len(values) > 5 else "")

    return "; ".join(
        f"rank {each['rank']}: documents {some(each['documents'])}"
        + (f", {each['module']}" if "module" in each else "")
        + (f", parameters {some(each['parameters'])}" if each["parameters"] else "")
        + "".join(f", {error}" for error in each.get("errors", []))
        for each in found
    )
