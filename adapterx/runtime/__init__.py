"""Models that were extracted, run with adapters: fit (does it belong?), ports (what is fed), sessions."""
