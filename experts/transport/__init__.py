"""How tensors travel between processes.

Copies of the hidden states from the router's tensor to the kernel, and of the kernel's output to the router's sum:

- In shared memory 1 there and 1 back. Collecting the rows writes them where the kernel reads them, and the kernel's own
  output is written where the router reads it.
- In gRPC's messages 1 there and 1 back of ours: the join of a message's head with the data. The kernel and the router
  read what arrived. gRPC and the operating system make four more each way: into gRPC's buffer, into the socket, out of
  it, and into a bytes object (for which grpcio may make one or two itself).

The chosen experts and their weights are a few bytes a token, and not counted.
"""
