"""Discovery: swarm keys, provider records, the peer book, the announcement schedule. Sans-IO."""
