"""The fuzzer: random conv networks as source code, and what must hold for each of them (docs/fuzz.md)."""
