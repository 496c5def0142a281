"""Read an offline ``.wandb`` file back, without network and without W&B's own reader.

Layout: the header ``:W&B``, then blocks of 32,768 bytes of records (crc 4 bytes, length 2, kind 1), each a protobuf.
Kind 1 is a whole record; 2, 3 and 4 are the first, middle and last part of one that crosses blocks.
"""

import json
import struct
from pathlib import Path

BLOCK = 32768


def records(path):
    from wandb.proto.wandb_internal_pb2 import Record

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_wandb(path):
    """Return {config, history (last value by name), artifacts, used (artifacts), metrics, group} of a run."""
    found = {"config": {}, "history": {}, "artifacts": [], "used": [], "metrics": [], "group": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "config":
            items = record.config.update
        elif kind == "run":
            items, found["group"] = record.run.config.update, record.run.run_group or found["group"]
        else:
            items = []
        for item in items:
            found["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if kind == "history":
            for item in record.history.item:
                found["history"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "artifact":
            found["used" if record.artifact.use_after_commit else "artifacts"].append(record.artifact.name)
        elif kind == "metric":
            found["metrics"].append(record.metric.name or record.metric.glob_name)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"].append(record.request.log_artifact.artifact.name)
    return found
