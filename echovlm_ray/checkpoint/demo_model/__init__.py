"""The demo's weights in bfloat16, made by `make demo-model`; `echovlm_ray.checkpoint.demo` reads them."""
