"""The core: tokens, scopes, tasks and what they stand on. Standard library only; the lock-order proofs live here."""
