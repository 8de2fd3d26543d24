"""The contracts between all parts, and the code generated from them."""
