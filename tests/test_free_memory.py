import subprocess
import sys

import pytest

CODE = """
import psutil
from echovlm_ray.free_memory import return_free_memory
blocks = [bytearray(100_000) for _ in range(500)]
last = bytearray(100_000)
del blocks
before = psutil.Process().memory_info().rss
return_free_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_what_was_freed_goes_back_to_the_system() -> None:
    # What is at the end of the heap malloc gives back itself; these blocks lie before one that is still there.
    environment = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "268435456"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000_000
