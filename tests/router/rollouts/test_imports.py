import subprocess
import sys
from pathlib import Path

import router.rollouts


def test_rollouts_need_neither_ray_nor_transformers_nor_torch() -> None:
    """Control is a small process; and reading a policy needs nothing heavy."""
    folder = Path(router.rollouts.__file__).parent
    modules = [f"router.rollouts.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    assert len(modules) > 15
    code = (
        f"import sys, {', '.join(modules)}\n"
        "heavy = {'ray', 'torch', 'transformers', 'grpc', 'numpy', 'echovlm_ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parents[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
