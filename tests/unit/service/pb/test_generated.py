"""The generated package is what the protos say, and lives beside TensorFlow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = ("nann/service/pb", "client/nann_client/pb")


def test_committed_files_are_the_generated_ones(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    # In a process of its own: protoc's C++ does not live beside TensorFlow's.
    subprocess.run([sys.executable, str(ROOT / "protos" / "generate.py"), str(tmp_path)], check=True)
    fresh, committed = (
        {
            f"{package}/{path.name}": path.read_bytes()
            for package in PACKAGES
            for path in (root / package).iterdir()
            if path.is_file() and path.name != "__init__.py"
        }
        for root in (tmp_path, ROOT)
    )
    assert fresh.keys() == committed.keys()
    different = [name for name, content in fresh.items() if committed[name] != content]
    assert not different, f"run `make proto`: {different} differ"


OURS = "from nann.service.wire import tf_messages; from nann.service.pb import retrieval_pb2_grpc"
THEIRS = "from tensorflow_serving.apis import predict_pb2, get_model_status_pb2, prediction_service_pb2_grpc"
USE_BOTH = """
ours = tf_messages.PredictRequest(output_filter=["top_k"])
ours.model_spec.name = "nann"
ours.model_spec.version.value = 3
ours.inputs["x"].float_val.append(1.5)
theirs = predict_pb2.PredictRequest.FromString(ours.SerializeToString())
assert theirs.model_spec.version.value == 3 and theirs.inputs["x"].float_val[0] == 1.5
assert tf_messages.PredictRequest.FromString(theirs.SerializeToString()) == ours
print("both")
"""


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("imports", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours first", "theirs first"])
def test_lives_beside_tensorflow_in_either_order(imports: tuple[str, str]) -> None:
    pytest.importorskip("tensorflow_serving")
    assert run("\n".join(imports) + USE_BOTH).strip() == "both"


def test_imports_no_tensorflow() -> None:
    program = (
        OURS
        + "; import nann.service.grpc_api.server, nann.service.http_api.app, sys; "
        + "print([name for name in sys.modules if name.partition('.')[0] == 'tensorflow'])"
    )
    assert run(program).strip() == "[]"


@pytest.mark.slow
def test_our_field_numbers_are_tensorflows() -> None:
    """Every message and field we declare has the same number, type and label in TensorFlow's descriptors."""
    pytest.importorskip("tensorflow_serving")
    program = """
from tensorflow_serving.apis import predict_pb2, get_model_status_pb2, get_model_metadata_pb2
from tensorflow_serving.apis import model_management_pb2, prediction_log_pb2
from google.protobuf import descriptor_pool
from nann.service.wire.tf_messages import POOL
theirs = descriptor_pool.Default()
def check(message):
    other = theirs.FindMessageTypeByName(message.full_name)
    for field in message.fields:
        twin = other.fields_by_name[field.name]
        same = (twin.number, twin.type, twin.is_repeated) == (field.number, field.type, field.is_repeated)
        assert same, field.full_name
    for nested in message.nested_types:
        check(nested)
    for enum in message.enum_types:
        check_enum(enum)
def check_enum(enum):
    other = theirs.FindEnumTypeByName(enum.full_name)
    for value in enum.values:
        assert other.values_by_name[value.name].number == value.number, value.name
checked = 0
for name in ("error_codes", "framework", "serving"):
    file = POOL.FindFileByName(f"tensorflow_serving/{name}.proto")
    for message in file.message_types_by_name.values():
        check(message); checked += 1
    for enum in file.enum_types_by_name.values():
        check_enum(enum); checked += 1
print(checked)
"""
    assert int(run(program)) >= 15
