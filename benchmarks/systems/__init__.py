"""The compared systems, each in separate processes that get workloads and return times."""
