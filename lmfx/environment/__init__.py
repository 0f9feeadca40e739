"""The process and the machine: progress bars, files written whole, the caller's state, facts of the host."""
