"""The arithmetic of inference on a CPU as a small C library, which is built when the package is installed.

It is optional: where there is no C compiler, oneDNN computes the products and torch's operators the rest.
"""
