"""`ava-fast <command>`: everything around a training run.

    ava-fast preflight --config configs/demo.yaml
    ava-fast validate texts
    ava-fast tokenizer train --data-dir texts --output tokenizer --vocab-size 65536
    ava-fast prepare --data-dir texts --output shards --tokenizer tokenizer
    ava-fast download --dataset wikipedia --output texts
    ava-fast generate outputs/runs/run_… --prompt 'def main('
    ava-fast export outputs/runs/run_… --output exported
    ava-fast import Mixtral-folder --output imported
    ava-fast memory plan --config configs/demo.yaml --world-size 8
    ava-fast profile --config configs/demo.yaml --steps 5
    ava-fast find-lr --config configs/demo.yaml --write
    ava-fast sweep --config configs/demo.yaml --set training.learning_rate=1e-3,3e-3
    ava-fast checkpoint list outputs/runs/run_…
    ava-fast replay outputs/runs/run_…/bad_batches/step_9_at_80

Exit code 2 and one line where the input cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from ava_fast import find_lr, sweep
from ava_fast.checkpoint import store
from ava_fast.checkpoint.commands import add_checkpoint_commands
from ava_fast.checkpoint.source import read_source
from ava_fast.compatibility import world_size_conflicts
from ava_fast.config import ConfigError, for_host, load_config
from ava_fast.data.commands import add_data_commands
from ava_fast.errors import Interrupted, TrainingError, UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (UserError, TrainingError, Interrupted) as error:
        print(str(error).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        return error.exit_code


def _preflight(options: argparse.Namespace) -> int:
    from ava_fast.distributed.machine import examine_alone
    from ava_fast.preflight import Check, run_checks, table

    config = load_config(options.config, options.override)
    checks = run_checks(config, options.world_size) + [Check(*row) for row in examine_alone(config)]
    print(table(checks))
    return 0 if all(check.ok for check in checks) else UserError.exit_code


def _memory_plan(options: argparse.Namespace) -> int:
    from ava_fast.stability.plan import plan

    config = load_config(options.config, options.override)
    faults = world_size_conflicts(config, options.world_size)
    if faults:
        raise ConfigError(options.config, faults)
    print("\n".join(plan(config, options.world_size)))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from ava_fast.engine import close_distributed, init_distributed
    from ava_fast.profiling import profile

    if options.steps < 1:
        raise UserError(f"--steps: is {options.steps}; give at least 1")
    config = load_config(options.config, options.override)
    init_distributed(config)
    try:
        profile(config, options.steps)
    finally:
        close_distributed()
    return 0


def _generate(options: argparse.Namespace) -> int:
    from ava_fast.data.tokenizer import end_of_text_id, load_tokenizer
    from ava_fast.model.generation import generate
    from ava_fast.model.transformer import Transformer

    weights, config, tokenizer_file = read_source(Path(options.source))
    if tokenizer_file is None:
        raise UserError(f"{options.source}: has no tokenizer.json; put the model's beside its config.yaml")
    tokenizer = load_tokenizer(tokenizer_file)
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    if not prompt:
        raise UserError("--prompt: has no tokens; give at least one character")
    model = Transformer(for_host(config))
    model.load_state_dict(weights)
    tokens = generate(
        model,
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        stop_token=end_of_text_id(tokenizer, tokenizer_file),
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(options.prompt + tokenizer.decode(tokens))
    return 0


def _export(options: argparse.Namespace) -> int:
    from ava_fast.model.huggingface import export

    weights, config, tokenizer_file = read_source(Path(options.source))
    architecture = export(
        weights, config, Path(options.output), architecture=options.architecture, tokenizer=tokenizer_file
    )
    print(f"{options.output}: {architecture}, {sum(w.numel() for w in weights.values()):,} weights")
    return 0


def _import(options: argparse.Namespace) -> int:
    from ava_fast.model.huggingface import import_folder, write_model

    source = Path(options.source)
    weights, sections = import_folder(source)
    tokenizer = source / "tokenizer.json"
    write_model(weights, sections, Path(options.output), tokenizer if tokenizer.is_file() else None)
    print(f"{options.output}: {sum(w.numel() for w in weights.values()):,} weights; start from them with")
    print(f"  --override training.init_from={options.output}   and the settings in {options.output}/config.yaml")
    return 0


def _replay(options: argparse.Namespace) -> int:
    from ava_fast.data.tokenizer import load_tokenizer
    from ava_fast.stability.replay import replay, step_of

    batch = Path(options.batch).resolve()
    step = step_of(batch)
    if options.weights:
        source = Path(options.weights)
    else:
        saved = store.list_checkpoints(batch.parent.parent / "checkpoints")
        earlier = [path for path in saved if int(path.name.removeprefix("step_")) <= step]
        if not earlier:
            raise UserError(f"{batch}: no checkpoint of its run is from step {step} or before; name one with --weights")
        source = earlier[-1]
    weights, config, tokenizer_file = read_source(source)
    print(f"the batch after step {step}, with the weights of {source}")
    for line in replay(batch, weights, config, load_tokenizer(tokenizer_file) if tokenizer_file else None):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ava-fast", description="Everything around a training run.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("preflight", help="check what a run needs, without starting it")
    command.add_argument("--config", required=True)
    command.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    command.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks")
    command.set_defaults(command=_preflight)

    add_data_commands(commands)
    command = commands.add_parser("memory", help="what a configuration needs")
    memory = command.add_subparsers(required=True, metavar="plan")
    command = memory.add_parser("plan", help="memory of a rank, by configuration, and which device has it")
    command.add_argument("--config", required=True)
    command.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    command.add_argument("--world-size", type=int, default=1, help="ranks, default 1")
    command.set_defaults(command=_memory_plan)
    find_lr.add_command(commands, lambda source: read_source(source)[0])
    sweep.add_command(commands)
    add_checkpoint_commands(commands)

    command = commands.add_parser("profile", help="where the time and memory of a training step go")
    command.add_argument("--config", required=True)
    command.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    command.add_argument("--steps", type=int, default=5, help="that are profiled (default: 5)")
    command.set_defaults(command=_profile)

    command = commands.add_parser("generate", help="continue a text")
    command.add_argument("source", help="a run, a checkpoint or an imported folder")
    command.add_argument("--prompt", required=True)
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=_generate)

    command = commands.add_parser("export", help="write weights as a Hugging Face folder")
    command.add_argument("source", help="a run, a checkpoint or an imported folder")
    command.add_argument("--output", required=True)
    command.add_argument("--architecture", choices=["mixtral", "qwen3_moe", "qwen2_moe"], help="the one that fits")
    command.set_defaults(command=_export)

    command = commands.add_parser("replay", help="compute a bad batch again and say what is wrong with it")
    command.add_argument("batch", help="a folder in a run's bad_batches")
    command.add_argument("--weights", help="a checkpoint; the newest of the run from before the batch if left out")
    command.set_defaults(command=_replay)

    command = commands.add_parser("import", help="read a Hugging Face folder")
    command.add_argument("source")
    command.add_argument("--output", required=True)
    command.set_defaults(command=_import)
    return parser


if __name__ == "__main__":
    sys.exit(main())
