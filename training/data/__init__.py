"""Training images: folders, tar shards, pipes."""
