"""Where items come from: folders, lists, shards, videos."""
