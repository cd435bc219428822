"""What two peers must agree on: identity, messages, rounds, codecs, the outer step. Sans-IO."""
