"""A small text folder, the same on every machine, and a configuration that trains on it in a second."""

import random
from pathlib import Path
from typing import Any

import yaml


def write_corpus(folder: Path, documents: int = 12, words: int = 600) -> Path:
    """Documents of made-up words, frequent ones more often, each line repeating a little of the last."""
    generator = random.Random(0)
    syllables = ["ba", "ko", "ri", "tu", "ne", "la", "mo", "shi", "da", "fe"]
    vocabulary = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(120)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        chosen = generator.choices(vocabulary, weights, k=words)
        lines = [" ".join(chosen[start : start + 8]) for start in range(0, words, 6)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_config(path: Path, corpus: Path, **changes: dict[str, Any]) -> Path:
    """A configuration over `corpus` that keeps everything it makes beside `path`; `changes` are sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        "moe": {"num_experts": 4, "intermediate_size": 16, "jitter": 0.01},
        "data": {"data_dir": str(corpus), "cache_dir": str(path.parent / "data"), "max_length": 32},
        "training": {"max_steps": 20, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01},
        "checkpoint": {"save_steps": 10},
        "evaluation": {"eval_steps": 10, "max_sequences": 7, "prompt": "ba", "max_new_tokens": 8},
        "logging": {"output_dir": str(path.parent / "outputs"), "log_steps": 5},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path
