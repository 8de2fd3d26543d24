"""The systems that are measured side by side, each in processes of its own that get workloads and give back times."""
