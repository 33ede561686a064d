"""Model families: configurations, parameter names and shards."""
