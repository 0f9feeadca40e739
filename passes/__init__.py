"""Graph and tensor algebra of lmfx: torch, numpy and the standard library, and nothing of the outside world."""
