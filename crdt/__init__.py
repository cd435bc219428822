"""The ledger: signed entries, merge rules, deterministic fold, anti-entropy. Sans-IO."""
