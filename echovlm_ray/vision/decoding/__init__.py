"""Decodes callers' files in separate processes with limits, each of which may crash without harm.

`pool` is what the gateway uses; `decoder` is one process as the gateway sees it, `worker` what runs in it, `heads` what
the two say to each other. A file's bytes and its pixels travel through memory that both share.
"""
