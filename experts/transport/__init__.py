"""Tensor transport between processes.

Copies of the hidden states from the router's tensor to the kernel, and of the kernel's output to the router's sum:

- In shared memory 1 each way. Gathering the rows writes them where the kernel reads them, and the kernel's output is
  written where the router reads it.
- In gRPC messages 1 each way in our code: joining a message's head with the data. The kernel and the router read the
  received bytes. gRPC and the operating system make four more each way: into gRPC's buffer, into the socket, out of it,
  and into a bytes object (for which grpcio may make one or two more).

The chosen experts and their weights are a few bytes per token, and not counted.
"""
