"""The runtimes on which latencies are measured, one file each, and what is known of a GPU while it is timed.

In: workloads (`lmfx.latency.workload`). Out: measurements. Each file imports its runtime where it is used, so a backend
costs nothing until it is asked for; `lmfx.latency.get_backend` makes one by its name.
"""
