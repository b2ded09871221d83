"""Sources: raw data that `jmvae-dist shards write` turns into shards."""
