"""What lmfx takes from and leaves in the process and the machine: progress bars, whole files, facts of the host."""
