"""Bytes and seconds of the coders on integer matrices, side by side: lrzip by group, brotli, LZMA, zstd, order-0
entropy and COMPRESSOR=rans. (What rans adds to the packed program: bench_code.py.)

    OMP_NUM_THREADS=1 python tests/bench/bench_compress.py NPZ ... [--coders rans lrzip ...]

NPZ holds int8 matrices, named `<...>.<role>`. The other coders are given one stream of the transposed matrices of each
role, as the published scripts do it. `scaled` is the ratio to lrzip at 36 million symbols: what of a file does not
grow with the model, which are the states of rans's lanes, is counted once. Seconds are processor time of one core, per
36 million symbols. A coder that is not installed says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import bench
import numpy as np

import pack_artifact
import train_gpt

SCALE = 36e6  # symbols of the contest model
Matrices = list[tuple[str, np.ndarray]]


def zstd(*flags: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(["zstd", "-q", "-c", *flags], input=data, capture_output=True, check=True).stdout


def role_streams(matrices: Matrices) -> list[bytes]:
    """The bytes of each role's matrices, column by column."""
    roles: dict[str, list[bytes]] = {}
    for name, matrix in matrices:
        roles.setdefault(name.rpartition(".")[2], []).append(matrix.T.tobytes())
    return [b"".join(parts) for parts in roles.values()]


def rans_streams(matrices: Matrices) -> list[bytes]:
    return [b"".join(train_gpt.rans_frame(matrix, None) for _, matrix in matrices)]


def coder(name: str) -> tuple[Callable, Callable] | None:
    """Encode and decode, if the coder is there."""
    if name == "zstd":
        return (zstd("--ultra", "-22"), zstd("-d")) if shutil.which("zstd") else None
    row = train_gpt.CODERS[name]
    try:
        row.require()
    except train_gpt.UserError:
        return None
    return row.encode, row.decode


def measure(matrices: Matrices, coders: list[str]) -> list[dict[str, object]]:
    """A row for each coder. Stops when decoding does not give back the bytes."""
    symbols = sum(matrix.size for _, matrix in matrices)
    roles = role_streams(matrices)
    bound = sum(pack_artifact.entropy_bits(np.frombuffer(stream, np.uint8)) for stream in roles) / 8
    rows: list[dict[str, object]] = [{"coder": "order-0 entropy", "bytes": round(bound)}]
    for name in coders:
        if (pair := coder(name)) is None:
            rows.append({"coder": name, "bytes": "not installed, not measured"})
            continue
        (encode, decode), streams = pair, rans_streams(matrices) if name == "rans" else roles
        begun = bench.processor_seconds()
        packed = [encode(stream) for stream in streams]
        middle = bench.processor_seconds()
        if [decode(blob) for blob in packed] != streams:
            raise SystemExit(f"{name} does not give back what it was given")
        spent = {"encode s": middle - begun, "decode s": bench.processor_seconds() - middle}
        rows.append({"coder": name, "bytes": sum(map(len, packed))})
        rows[-1] |= {stage: round(seconds * SCALE / symbols, 2) for stage, seconds in spent.items()}
    yardstick = next((row["bytes"] for row in rows if row["coder"] == "lrzip" and "encode s" in row), None)
    lanes = 4 * min(train_gpt.RANS_LANES, max(matrix.shape[1] for _, matrix in matrices))
    for row in rows:
        if yardstick and isinstance(row["bytes"], int):
            once = lanes if row["coder"] == "rans" else 0
            grown = (row["bytes"] - once) * SCALE / symbols + once
            row["ratio"] = round(row["bytes"] / yardstick, 5)
            row["scaled"] = round(grown / yardstick * symbols / SCALE, 5)
    return rows


def main() -> None:
    """Measure each input; a table of each, and all as one JSON line."""
    parser = bench.arguments(__doc__)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--coders", nargs="+", default=["lrzip", "brotli", "lzma", "zstd", "rans"])
    args = parser.parse_args()
    found = {}
    columns = ("coder", "bytes", "ratio", "scaled", "encode s", "decode s")
    for source in args.inputs:
        with np.load(source) as file:
            matrices = [(name, file[name]) for name in file.files]
        found[source.name] = rows = measure(matrices, args.coders)
        title = f"{source.name}: {sum(matrix.size for _, matrix in matrices):,} symbols"
        bench.table(title, columns, ([str(row.get(column, "")) for column in columns] for row in rows))
    print("COMPRESS " + json.dumps(found))


if __name__ == "__main__":
    main()
