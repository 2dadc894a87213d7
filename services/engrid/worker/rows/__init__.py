"""The shards' rows as the model's row source."""
