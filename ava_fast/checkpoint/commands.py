"""`ava-fast checkpoint <action>`: what there is, whether it is whole, what is in it, and what may go.

A source is a run, its `checkpoints` folder or one step_N in it; where one checkpoint is meant, the latest of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ava_fast.checkpoint import store
from ava_fast.checkpoint.shards import MASTER, MOMENTS, Shards
from ava_fast.errors import UserError

SHOWN = 10  # parameters that differ most


def add_checkpoint_commands(commands: Any) -> None:
    """Adds them to the subparsers of `ava-fast`; each gets `command`, the function that runs it."""
    command = commands.add_parser("checkpoint", help="list, verify, show, compare, try, prune checkpoints")
    actions = command.add_subparsers(required=True, metavar="action")

    action = actions.add_parser("list", help="a run's checkpoints; hashes of weights are not looked at")
    action.add_argument("source", help="a run or its checkpoints folder")
    action.set_defaults(command=_list)
    action = actions.add_parser("verify", help="read every byte and compare it with what was written")
    action.add_argument("source", help="a checkpoint, or a run: all of its checkpoints")
    action.set_defaults(command=_verify)
    action = actions.add_parser("show", help="what a checkpoint holds")
    action.add_argument("source", help="a checkpoint or a run")
    action.set_defaults(command=_show)
    action = actions.add_parser("diff", help="in which settings, weights and moments two checkpoints differ")
    action.add_argument("first", help="a checkpoint or a run")
    action.add_argument("second", help="a checkpoint or a run")
    action.set_defaults(command=_diff)
    action = actions.add_parser("smoke", help="load the weights into a fresh model and compare its loss with the saved")
    action.add_argument("source", help="a checkpoint or a run")
    action.set_defaults(command=_smoke)
    action = actions.add_parser("prune", help="delete all but those that are named to be kept")
    action.add_argument("source", help="a run or its checkpoints folder")
    action.add_argument("--keep", type=_positive, required=True, metavar="N", help="the newest N")
    action.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="those at multiples of it too")
    action.add_argument("--keep-best", type=int, default=1, metavar="N", help="the N with the lowest held-out loss too")
    action.add_argument("--dry-run", action="store_true", help="only say what would go")
    action.set_defaults(command=_prune)
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="the same as JSON")

    action = actions.add_parser("prove", help="N steps, and N/2 + SIGKILL + resume: are they the same to the bit?")
    action.add_argument("--config", required=True)
    action.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE", help="repeatable")
    action.add_argument("--steps", type=_positive, default=20)
    action.add_argument("--ranks", type=_positive, default=1, help="processes of each run")
    action.add_argument("--keep-runs", metavar="FOLDER", help="leave both runs there")
    action.add_argument("--json", action="store_true", help="the result as JSON")
    action.set_defaults(command=_prove)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _list(options: argparse.Namespace) -> int:
    folder = _folder(Path(options.source))
    found = [_entry(path, folder) for path in store.list_checkpoints(folder)]
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'step':>8}  {'saved':<16}  {'size':>9}  {'ranks':>5}  {'held-out loss':>13}  remarks")
    for entry in found:
        if "damage" in entry:
            print(f"{entry['step']:>8}  {entry['damage']}")
            continue
        loss = "" if entry["heldout_loss"] is None else f"{entry['heldout_loss']:.4f}"
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["saved_at"]))
        print(
            f"{entry['step']:>8}  {saved:<16}  {_size(entry['bytes']):>9}  {entry['world_size']:>5}  {loss:>13}  "
            f"{', '.join(entry['remarks'])}"
        )
    print(f"{len(found)} checkpoints in {folder}; `ava-fast checkpoint verify {options.source}` reads them whole")
    return 0


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": int(path.name.removeprefix("step_")), "path": str(path)}
    try:
        manifest = store.peek(path)
        for name, written in manifest["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != written["bytes"]:
                raise UserError(f"{path / name}: is missing or not as long as it was written")
    except UserError as error:
        return entry | {"damage": str(error)}
    remarks = [name for name in (store.LATEST, store.BEST) if store.pointed(folder, name) == path]
    if not manifest["stability"]["calm"]:
        remarks.append("in trouble")
    fresh = manifest["heldout_step"] == manifest["step"]
    return entry | {
        "saved_at": manifest["saved_at"],
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "world_size": manifest["world_size"],
        "heldout_loss": manifest["heldout_loss"] if fresh else None,
        "remarks": remarks,
    }


def _verify(options: argparse.Namespace) -> int:
    source = Path(options.source)
    found = store.candidates(source)
    one = len(found) == 1 and found[0] == source
    checkpoints = found if one else store.list_checkpoints(_folder(source))
    results: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        started_at = time.perf_counter()
        try:
            manifest = store.peek(checkpoint)
            total = sum(file["bytes"] for file in manifest["files"].values())
            with _bar(total, checkpoint.name, options.json) as bar:
                for name, written in manifest["files"].items():
                    store.verify(checkpoint, {name: written})
                    bar.update(written["bytes"])
        except UserError as error:
            results.append({"path": str(checkpoint), "whole": False, "damage": str(error)})
        else:
            seconds = time.perf_counter() - started_at
            results.append({"path": str(checkpoint), "whole": True, "bytes": total, "seconds": round(seconds, 3)})
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        for result in results:
            print(f"{result['path']}: whole, {_size(result['bytes'])}" if result["whole"] else result["damage"])
    return 0 if all(result["whole"] for result in results) else UserError.exit_code


def _show(options: argparse.Namespace) -> int:
    checkpoint = store.find_checkpoint(Path(options.source))
    manifest = store.peek(checkpoint)
    if options.json:
        print(json.dumps(manifest, indent=1))
        return 0
    shards = Shards(checkpoint / "engine")
    engine, heldout, probe = shards.description, manifest["heldout_loss"], manifest["probe"]["loss"]
    tokens, trained = len(manifest["probe"]["tokens"]) - 1, sum(math.prod(shape) for shape in shards.shapes.values())
    moe = manifest["config"]["moe"]["num_experts"]
    rows = {
        "checkpoint": checkpoint,
        "step": f"{manifest['step']:,} of {manifest['config']['training']['max_steps']:,}",
        "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["saved_at"])),
        "size": f"{_size(sum(file['bytes'] for file in manifest['files'].values()))} in {len(manifest['files'])} files",
        "parameters": f"{trained:,} in {len(shards.shapes)} tensors, {moe or 'no'} experts",
        "written by": f"{manifest['world_size']} rank(s), ZeRO-{engine['zero_stage']}, {engine['precision']}",
        "optimizer": f"AdamW after {engine['adam_step']:,} steps" if engine["adam_step"] else "AdamW, fresh",
        "data": f"sequence {manifest['data']['position']:,} of the order",
        "held-out loss": "not taken yet" if heldout is None else f"{heldout:.4f} at step {manifest['heldout_step']}",
        "probe loss": "not finite" if probe is None else f"{probe:.6f} on {tokens} tokens",
        "state": "calm" if manifest["stability"]["calm"] else "in trouble: not rolled back to while there is another",
        "format": f"version {manifest['format_version']}",
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    paths = [store.find_checkpoint(Path(source)) for source in (options.first, options.second)]
    manifests, shards = [store.peek(path) for path in paths], [Shards(path / "engine") for path in paths]
    settings = [
        {"setting": f"{section}.{key}", "first": value, "second": manifests[1]["config"].get(section, {}).get(key)}
        for section, body in manifests[0]["config"].items()
        for key, value in body.items()
        if manifests[1]["config"].get(section, {}).get(key) != value
    ]
    only = sorted(shards[0].shapes.keys() ^ shards[1].shapes.keys())
    both = [name for name, shape in shards[0].shapes.items() if shards[1].shapes.get(name) == shape]
    only += [name for name in shards[0].shapes if name in shards[1].shapes and name not in both]
    kinds = [MASTER, *(MOMENTS if all(each.description["adam_step"] for each in shards) else ())]
    tensors = []
    for name in tqdm(both, unit="tensor", disable=None, leave=False):
        entry: dict[str, Any] = {"name": name}
        for kind in kinds:
            count = math.prod(shards[0].shapes[name])
            first, second = (each.read(kind, name, 0, count).double() for each in shards)
            entry[kind] = {
                "different": int((first != second).sum()),
                "largest": float((first - second).abs().max()) if count else 0.0,
                "relative": float((first - second).norm() / first.norm().clamp_min(1e-30)),
            }
        tensors.append(entry)
    same = [entry for entry in tensors if not any(entry[kind]["different"] for kind in kinds)]
    if options.json:
        print(json.dumps({"settings": settings, "only_in_one": only, "tensors": tensors}, indent=1))
        return 0
    print(f"steps {manifests[0]['step']} and {manifests[1]['step']}, {paths[0]} and {paths[1]}")
    for each in settings:
        print(f"  {each['setting']}: {each['first']} | {each['second']}")
    if only:
        print(f"not comparable: {', '.join(only)}")
    print(f"{len(same)} of {len(tensors)} tensors are the same to the bit, in weights and moments")
    changed = sorted((t for t in tensors if t not in same), key=lambda t: -t[MASTER]["relative"])
    if changed:
        print(f"{'weights':<44} {'differ':>10} {'largest':>10} {'relative':>10}")
    for entry in changed[:SHOWN]:
        count, largest, relative = entry[MASTER].values()
        print(f"{entry['name']:<44} {count:>10,} {largest:>10.2e} {relative:>10.2e}")
    if len(changed) > SHOWN:
        print(f"… and {len(changed) - SHOWN} more; --json shows all")
    return 0


def _smoke(options: argparse.Namespace) -> int:
    from ava_fast.config import for_host, saved_config
    from ava_fast.evaluate.heldout import probe_loss
    from ava_fast.model.transformer import Transformer

    checkpoint = store.find_checkpoint(Path(options.source))
    manifest = store.read_manifest(checkpoint)
    config = saved_config(manifest["config"])
    model = Transformer(for_host(config))
    model.load_state_dict(Shards(checkpoint / "engine").weights())
    bf16 = config.training.precision == "bf16"
    for parameter in model.parameters() if bf16 else ():
        parameter.data = parameter.data.bfloat16()
    recorded = math.nan if manifest["probe"]["loss"] is None else manifest["probe"]["loss"]
    found = probe_loss(model, manifest["probe"]["tokens"], torch.device("cpu"))
    tolerance = 2e-2 if bf16 else 1e-4
    well = math.isclose(found, recorded, rel_tol=tolerance)
    result = {"path": str(checkpoint), "recorded": recorded, "found": found, "tolerance": tolerance, "well": well}
    said = "well" if well else f"NOT THE SAME: more than {tolerance:g} apart"
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{checkpoint}: loss {found:.6f}, {recorded:.6f} when it was saved: {said}")
    return 0 if well else UserError.exit_code


def _prune(options: argparse.Namespace) -> int:
    folder = _folder(Path(options.source))
    sizes = {
        path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in store.list_checkpoints(folder)
    }
    gone = store.rotate(
        folder,
        newest=options.keep,
        every=options.keep_every,
        best=options.keep_best,
        dry_run=options.dry_run,
    )
    freed = sum(sizes[path] for path in gone)
    if options.json:
        print(
            json.dumps({"deleted": [str(path) for path in gone], "bytes": freed, "dry_run": options.dry_run}, indent=1)
        )
        return 0
    for path in gone:
        print(f"{path}  {_size(sizes[path])}")
    word = "would go" if options.dry_run else "deleted"
    print(f"{len(gone)} of {len(sizes)} {word}, {_size(freed)}")
    return 0


def _prove(options: argparse.Namespace) -> int:
    from ava_fast.checkpoint.prove import prove

    result = prove(options.config, options.override, options.steps, options.ranks, options.keep_runs)
    print(json.dumps(result, indent=1) if options.json else result["verdict"])
    return 0 if result["same"] else UserError.exit_code


def _folder(source: Path) -> Path:
    """The checkpoints folder that is meant. Raises UserError if there is none."""
    for folder in (source / "checkpoints", source):
        if store.list_checkpoints(folder):
            return folder
    return store.candidates(source)[0].parent


def _bar(total: int, name: str, quiet: bool) -> Any:
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=True if quiet else None)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
