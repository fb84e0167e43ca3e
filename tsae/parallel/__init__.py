"""One run on several processes: shards of the batch, and shards of the dictionary."""
