"""Compile this folder for the server and for the client; run by ``make proto``, and by a test that compares.

    python protos/generate.py [OUTPUT_DIR]

`retrieval.proto` becomes ordinary Python modules (`retrieval_pb2`, `retrieval_pb2_grpc`) importable as
`nann.service.pb.…`. The TensorFlow Serving declarations become one FileDescriptorSet instead: modules
would register them in the process-wide descriptor pool, where TensorFlow's own copies live. The client
gets all it speaks as one such set, for the same reason: the server's modules may live beside it.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

PROTOS = Path(__file__).resolve().parent
PACKAGE = "nann/service/pb"
CLIENT_PACKAGE = "client/nann_client/pb"
TF_SERVING_PROTOS = ("error_codes.proto", "framework.proto", "serving.proto")


def generate(output_root: Path) -> None:
    """Write the generated files under `output_root`, as they lie here; raises SystemExit if protoc fails."""
    package_dir, client_dir = output_root / PACKAGE, output_root / CLIENT_PACKAGE
    for directory in (package_dir, client_dir):
        directory.mkdir(parents=True, exist_ok=True)
    well_known = str(files("grpc_tools") / "_proto")
    # The mapping VIRTUAL=DISK makes protoc believe that retrieval.proto lies in the package, so that
    # the generated modules import each other by their full names.
    _run(
        f"-I{PACKAGE}={PROTOS}",
        f"--python_out={output_root}",
        f"--pyi_out={output_root}",
        f"--grpc_python_out={output_root}",
        f"{PACKAGE}/retrieval.proto",
    )
    _run(
        f"-I{PROTOS}",
        f"-I{well_known}",
        "--include_imports",
        f"--descriptor_set_out={package_dir / 'tensorflow_serving.binpb'}",
        *(f"tensorflow_serving/{name}" for name in TF_SERVING_PROTOS),
    )
    _run(
        f"-I{PROTOS}",
        f"-I{well_known}",
        "--include_imports",
        f"--descriptor_set_out={client_dir / 'service.binpb'}",
        "retrieval.proto",
        "tensorflow_serving/serving.proto",
    )


def _run(*arguments: str) -> None:
    status = protoc.main(["protoc", *arguments])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status} on: {' '.join(arguments)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
