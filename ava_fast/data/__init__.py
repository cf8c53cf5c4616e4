"""From text to batches: `corpus` → `tokenizer` → `shards` (all three by `prepare`) → `loader`."""
