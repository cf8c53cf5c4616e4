"""Trains a model: parse, preflight, prepare the data, run, report.

    torchrun --nproc_per_node=2 -m ava_fast.train --config configs/demo.yaml
    python -m ava_fast.train --config configs/demo.yaml          # one process

Exit codes of each process (torchrun turns every failure into 1): 0 done, 2 refused by configuration or preflight,
3 stopped, 75 interrupted but resumable.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ava_fast.checkpoint import remote, store
from ava_fast.compatibility import model_differences, world_size_conflicts
from ava_fast.config import Config, ConfigError, dump_config, load_config
from ava_fast.data.batches import Source
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import is_prepared
from ava_fast.distributed import elastic
from ava_fast.distributed.health import Watch
from ava_fast.distributed.machine import examine
from ava_fast.distributed.rank_0 import on_rank_0, see_the_same, wait_for_all
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import Ended, Interrupted, LostRank, TrainingError, UserError
from ava_fast.model.huggingface import read_model
from ava_fast.observe.run import logging_started, new_run, newest_run, runs_folder, say, start_logging, stop_logging
from ava_fast.preflight import Check, run_checks, table
from ava_fast.summary import finish, finished_lines
from ava_fast.trainer import Trainer

logger = logging.getLogger("ava_fast.train")  # not __name__, which torchrun makes "__main__"
_SPOKEN = "ava_fast/spoken"  # in the ranks' store: rank 0 has said why it leaves


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank; returns its exit code."""
    started_at = psutil.Process().create_time()
    options = _parse(arguments)
    meeting: Any = None  # the store of this start's ranks
    try:
        config = load_config(options.config, _overrides(options))
        faults = world_size_conflicts(config, int(os.environ.get("WORLD_SIZE", "1")))
        if faults:
            raise ConfigError(options.config, faults)
        done = _finished(config, options)
        if done:
            if _rank() == 0:
                say(done)
            return 0
        init_distributed(config)
        meeting = dist.distributed_c10d._get_default_store()
        try:
            _run(config, options, started_at)
        except BaseException:
            close_distributed(alone=True)
            raise
        close_distributed()
    except (UserError, TrainingError, Interrupted, Ended) as error:
        return _leave(error, meeting)
    except OSError as error:  # a log or the metrics, on a disk that filled up
        logger.debug("stopped by", exc_info=True)
        line = f"{error.filename or 'a file'}: {error.strerror or error}; resume with --resume"
        return _leave(TrainingError(line), meeting)
    finally:
        stop_logging()
    return 0


def _run(config: Config, options: argparse.Namespace, started_at: float) -> None:
    agents = elastic.agents()
    past = on_rank_0(lambda: elastic.look_back(config, agents))
    if past and past.ended:
        raise Ended(f"{past.run_folder} has ended for good: {past.ended[1]}", past.ended[0])
    _examine(config)
    if past:
        run_folder, checkpoints = past.run_folder, past.checkpoints
    else:
        on_rank_0(lambda: preflight(config))
        checkpoints = on_rank_0(lambda: _checkpoints(config, options))
        run_folder = on_rank_0(lambda: checkpoints[0].parent.parent if checkpoints else new_run(config))
    try:
        see_the_same(run_folder)
    except UserError:
        if _rank() == 0:
            with contextlib.suppress(OSError):
                run_folder.rmdir()  # a new one, which is empty
        raise
    try:
        if _rank() == 0:
            elastic.begin(run_folder, agents, past, checkpoints)
        _train(config, run_folder, checkpoints, past, options.reset_optimizer and past is None, started_at)
    except (UserError, TrainingError) as error:
        if _rank() == 0 and not isinstance(error, LostRank):
            elastic.end(run_folder, error.exit_code, str(error))
        raise


def _train(
    config: Config,
    run_folder: Path,
    checkpoints: list[Path],
    past: elastic.Past | None,
    reset_optimizer: bool,
    started_at: float,
) -> None:
    start_logging(run_folder if _rank() == 0 else None)
    logger.info(f"run {run_folder}")
    if past:
        _tell_restart(past)
    elif advice := elastic.advice():
        logger.warning(advice)
    ended: TrainingError | Interrupted | None = None
    with Watch(config.distributed, run_folder) as watch:
        watch.enter("prepare")
        shards = prepare_data(config)
        watch.enter("start")
        trainer = _trainer(config, run_folder, shards, checkpoints, past, reset_optimizer)
        tokens = trainer.loader.sequences_per_epoch * config.data.max_length
        logger.info(
            f"{trainer.parameters:,} parameters, {tokens:,} training tokens an epoch, {dist.get_world_size()} rank(s) "
            f"on {trainer.engine.device.type}, ZeRO-{config.deepspeed.zero_stage}, {config.training.precision}; "
            f"ready after {time.time() - started_at:.1f} s"
        )
        try:
            trainer.run(watch)
        except (TrainingError, Interrupted) as error:
            ended = error
    if ended is None:
        finish(trainer, "finished", started_at)
        trainer.keeper.uploaded()
        if _rank() == 0:
            elastic.end(run_folder, 0, "it has finished")
        return
    if isinstance(ended, LostRank) and (attempts := elastic.attempts_left()):
        logger.error(f"torchrun starts the workers anew, {attempts} time(s) at most")
        raise ended  # the report can wait until the run ends, the run need not
    if isinstance(ended, Interrupted):  # by torchrun itself where a node joins
        elastic.lost(run_folder, str(ended))
    try:
        finish(trainer, "interrupted" if isinstance(ended, Interrupted) else "stopped", started_at)
    except OSError as unwritten:  # of a full disk, say: the reason why the run ended matters more
        logger.warning(f"the report could not be written: {unwritten}")
    trainer.keeper.uploaded()
    if not isinstance(ended, LostRank):
        # torchrun ends the others once one rank has left: none does while rank 0 still writes the report.
        with contextlib.suppress(RuntimeError):
            wait_for_all()
    raise ended


def _trainer(
    config: Config,
    run_folder: Path,
    shards: list[Source],
    checkpoints: list[Path],
    past: elastic.Past | None,
    reset_optimizer: bool,
) -> Trainer:
    """At the place in the run from which it goes on."""
    trainer = Trainer(config, run_folder, shards, None if checkpoints else initial_weights(config))
    if checkpoints:
        checkpoint = trainer.load(*checkpoints, optimizer=not reset_optimizer)
        logger.info(f"resuming after step {trainer.step} from {checkpoint}")
    if past:
        if not checkpoints:
            trainer.loader.avoid = store.avoided(trainer.checkpoints)
        trainer.restarted = past.record(trainer.step)
    if _rank() == 0:
        (run_folder / "config.yaml").write_text(dump_config(config))
    return trainer


def _tell_restart(past: elastic.Past) -> None:
    logger.warning(f"started anew after step {past.step}: {past.reason}")
    if not past.checkpoints:
        logger.warning("there is no checkpoint yet: from the beginning")
    if past.world_size != dist.get_world_size():
        logger.warning(f"the run goes on with {dist.get_world_size()} rank(s) instead of {past.world_size}")


def _examine(config: Config) -> None:
    """Every rank's machine. Collective; raises UserError on every rank."""
    with Watch(config.distributed) as watch:  # a GPU that is broken may well hang here
        watch.enter("start")
        rows = [Check(*row) for row in examine(config)]
    failed = [f"{row.name}: {row.detail}" for row in rows if not row.ok]
    if _rank() == 0 and (failed or config.distributed.health_checks == "full"):
        say(table(rows))
    if failed:
        raise UserError("the health checks refused the run: " + "; ".join(failed))


def preflight(config: Config) -> None:
    """Raises UserError, with the table shown, if a check fails."""
    checks = run_checks(config, dist.get_world_size())
    failed = [check for check in checks if not check.ok]
    if failed:
        say(table(checks))
        raise UserError("preflight refused the run: " + "; ".join(check.detail for check in failed))


def _checkpoints(config: Config, options: argparse.Namespace) -> list[Path]:
    """What `--resume` may mean, the best choice first; nothing for a new run."""
    if options.resume is None:
        if options.reset_optimizer:
            raise UserError("--reset-optimizer: needs --resume; a new run has a fresh optimizer anyway")
        return []
    if remote.is_url(options.resume):
        return remote.download(options.resume, runs_folder(config))
    if options.resume != "latest":
        return store.candidates(Path(options.resume))
    run = newest_run(config)
    if run is None:
        say(f"--resume latest: no run named {config.logging.experiment_name or '(none)'} to resume; starting a new one")
        return []
    return store.candidates(run)


def _finished(config: Config, options: argparse.Namespace) -> str | None:
    """The closing lines of the run that `--resume` names, if it has finished with these very settings."""
    if options.resume is None:
        return None
    if remote.is_url(options.resume):
        return None
    run = newest_run(config) if options.resume == "latest" else Path(options.resume)
    return finished_lines(run, config) if run else None


def prepare_data(config: Config) -> list[Source]:
    """Prepares what is not yet, on rank 0. Collective; raises UserError on every rank."""
    return on_rank_0(lambda: _prepare(config))


def _prepare(config: Config) -> list[Source]:
    data, prepared = config.data, []
    tokenizer = data.tokenizer_name
    for folder, weight in config.sources:
        # Shards have a tokenizer already; whether it is the others' too is asked when they are opened.
        has_one = data.tokenizer_name is None and folder is not None and is_prepared(folder)
        shards = prepare(
            folder,
            data.cache_dir,
            vocab_size=config.model.vocab_size,
            tokenizer_name=None if has_one else tokenizer,
            validation_fraction=data.validation_fraction,
            text_column=data.text_column,
            filters=config.filters,
            max_loss=data.max_loss,
            progress=config.logging.progress,
        )
        prepared.append(Source(shards, weight))
        tokenizer = tokenizer or str(shards)
    return prepared


def initial_weights(config: Config) -> dict[str, torch.Tensor] | None:
    """Of `training.init_from`, if it is set. Raises UserError if they are another model's."""
    if config.training.init_from is None:
        return None
    weights, sections = read_model(Path(config.training.init_from))
    differences = model_differences(config, sections)
    if differences:
        raise UserError(f"training.init_from: {config.training.init_from} does not fit: {'; '.join(differences)}")
    return weights


def _leave(error: UserError | TrainingError | Interrupted | Ended, meeting: Any) -> int:
    """Says why, once for all ranks: rank 0 does, and another where rank 0 has nothing to say."""
    message = str(error).encode("utf-8", "backslashreplace").decode()
    if _rank() != 0:
        if isinstance(error, LostRank) or not error.exit_code:
            return error.exit_code  # rank 0 may wait for this one in a collective, until it is gone
        # torchrun ends the other ranks as soon as one has left: rank 0 speaks first.
        time.sleep(3)
        if isinstance(error, (UserError, TrainingError)) and meeting is not None and not _has_spoken(meeting):
            print(f"rank {_rank()} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)
        return error.exit_code
    if logging_started():
        logger.error(message)
    else:
        print(message, file=sys.stderr, flush=True)
    if meeting is not None:
        with contextlib.suppress(RuntimeError):
            meeting.set(_SPOKEN, "")
    return error.exit_code


def _has_spoken(meeting: Any) -> bool:
    """Rank 0, as far as this one can learn."""
    try:
        return bool(meeting.check([_SPOKEN]))
    except RuntimeError:
        return False


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _overrides(options: argparse.Namespace) -> list[str]:
    overrides = list(options.override)
    if options.data_dir is not None:
        overrides.append(f"data.data_dir={_quoted(options.data_dir)}")
    if options.experiment_name is not None:
        overrides.append(f"logging.experiment_name={_quoted(options.experiment_name)}")
    return overrides


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ava_fast.train", description="Trains a model.")
    parser.add_argument("--config", required=True, help="YAML file; docs/configuration.md lists every key")
    parser.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE", help="repeatable")
    parser.add_argument("--resume", metavar="latest|PATH|URL", help="continue the newest run of this name, or this one")
    parser.add_argument("--reset-optimizer", action="store_true", help="with --resume: a fresh AdamW state")
    parser.add_argument("--data-dir", help="same as --override data.data_dir=…")
    parser.add_argument("--experiment-name", help="same as --override logging.experiment_name=…")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of torch's collectives that wants the GIL while the interpreter is torn down ends the
    # process in std::terminate (seen in about one run of thirty), and torchrun then kills the rank that is writing the
    # report.
    os._exit(code)
