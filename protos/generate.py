"""Generates the Python code of the contracts beside them: `python -m protos.generate [TARGET]`.

Generated code runs with the protobuf and gRPC of its compiler and with newer ones, up to protobuf's next major version
(https://protobuf.dev/support/cross-version-runtime-guarantee). The compiler is therefore an old one: the first of
protobuf 6, so that the package fits into services with protobuf 6 and 7. The client's own distribution uses descriptors
instead (echovlm_ray/client/distribution/contracts.py).
"""

import argparse
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

# Its metadata asks for protobuf 6, which its compiler does not use: install it without dependencies.
COMPILER = "grpcio-tools==1.72.2"
ROOT = Path(__file__).resolve().parent.parent


def generate(target: Path = ROOT) -> None:
    """Writes `protos/*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `target`.

    Raises:
        RuntimeError: the compiler refused a contract; it has printed why.
    """
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    google_apis = next(path for path in _google_api_roots())
    contracts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    arguments = [f"-I{ROOT}", f"-I{well_known}", f"-I{google_apis}"]
    arguments += [f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}"]
    status = protoc.main(["protoc", *arguments, *contracts])
    if status:
        raise RuntimeError(f"protoc ended with status {status}")


def _google_api_roots() -> list[Path]:
    import google.rpc

    return [Path(path).parent.parent for path in google.rpc.__path__ if (Path(path) / "status.proto").is_file()]


def main() -> None:
    """Generates beside the contracts, or below a folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", default=ROOT, help="the folder of protos/ (default: here)")
    target = parser.parse_args().target
    if find_spec("grpc_tools") is None:
        sys.exit(f"the compiler is missing: run `make protos`, or pip install --no-deps {COMPILER}")
    generate(target)


if __name__ == "__main__":
    main()
