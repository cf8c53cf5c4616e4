"""From text to batches: `formats`, `readers` → `filters` → `encoder` → `shards` (all by `prepare`) → `loader`."""
