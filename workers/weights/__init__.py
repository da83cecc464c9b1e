"""Where a model's files come from: a local directory, the local Hub cache, the Hub."""
