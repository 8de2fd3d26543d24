"""Decodes callers' files in separate processes with limits, each of which may crash without harm.

`pool` is the gateway's interface; `decoder` is the handle of one process, `worker` runs in it, `job` and `answer` have
the messages between the two. A file's bytes and its pixels are in shared memory.
"""
