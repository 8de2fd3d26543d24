"""The arithmetic of inference on a CPU as a small C library, which is built when the package is installed.

It is optional: without a C compiler, oneDNN computes the products and torch's operators the rest.
"""
