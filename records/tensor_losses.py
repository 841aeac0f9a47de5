"""What storing a run's weights lost and costs, tensor by tensor: `python pack_artifact.py inspect --run RUN_DIR`."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt
from train_gpt import Parts, Stored, UserError


def entropy_bits(array: np.ndarray) -> float:
    """Bits of an array at the order-0 entropy of its bytes; each byte of a wider item has a distribution of its own."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane, minlength=1)
        counts = counts[counts > 0]
        total -= float((counts * np.log2(counts / len(plane))).sum()) if len(plane) else 0.0
    return total


class Loss(NamedTuple):
    """What storing weights loses and costs. All are sums, so the losses of several tensors add up.

    error, power: squares of (stored - weight) and of the weights; the weighted ones: squares of the layers' outputs on
    the calibration tokens, 0 without a Hessian. Bytes: of the stored parts as they are, with the integers at their
    order-0 entropy, and in the artifact.
    """

    weights: int
    error: float
    power: float
    weighted_error: float
    weighted_power: float
    raw_bytes: int
    entropy_bytes: int
    bytes: float

    def row(self) -> dict[str, Any]:
        """Columns of a table; an error is None where nothing can be compared."""
        return {
            "weights": self.weights,
            "relative_error": ratio(self.error, self.power),
            "hessian_weighted_error": ratio(self.weighted_error, self.weighted_power),
            "raw_bytes": self.raw_bytes,
            "entropy_bytes": self.entropy_bytes,
            "bytes": round(self.bytes),
        }


def ratio(a: float, b: float) -> float | None:
    """a / b, or None when b is 0."""
    return a / b if b > 0 else None


def output_power(x: Tensor, hessian: Tensor | None) -> float:
    """trace(x H x^T), the summed squares of a layer's outputs; 0 without a Hessian."""
    return 0.0 if hessian is None else ((x.float() @ hessian.float()) * x).double().sum().item()


def entropy_bytes(parts: Parts) -> int:
    """Bytes of a tensor's parts if its integers were coded at their order-0 entropy.

    The state of a trellis ("t") tells the coder the parity of each integer, so the even and the odd ones are coded
    apart.
    """
    size = sum(part.nbytes for key, part in parts.items() if key != "q")
    if "q" not in parts:
        return size
    q = parts["q"].numpy()
    alphabets = [q[q % 2 == 0], q[q % 2 == 1]] if "t" in parts else [q]
    return size + int(sum(map(entropy_bits, alphabets)) / 8)


def lqer_rows(stored: list[Stored]) -> list[dict[str, int]]:
    """Bytes of all LQER corrections as stored here, and with a byte per entry as published; no row without any."""
    corrected = [tensor.parts for tensor in stored if "lqm" in tensor.parts]
    packed = sum(part.nbytes for parts in corrected for key, part in parts.items() if key.startswith("lq"))
    scales = sum(parts[key].nbytes for parts in corrected for key in ("lqas", "lqbs"))
    entries = sum(int(parts["lqm"][0]) * sum(parts["q"].shape) for parts in corrected)  # rank (rows + columns)
    row = {"lqer_tensors": len(corrected), "bytes_bit_packed": packed, "bytes_with_int8_factors": entries + scales}
    return [row] if corrected else []


# A run as its quantiser saw it: configuration, float weights by name, Hessians by name
Calibrated = tuple[train_gpt.Config, dict[str, Tensor], dict[str, Tensor]]


def read_calibrated(run: Path) -> Calibrated:
    """Weights and Hessians of a run, rotated and sorted as they were before quantisation. UserError when missing."""
    device = {"DEVICE": os.environ["DEVICE"]} if os.environ.get("DEVICE") else {}
    cfg = train_gpt.load_config({"PRESET": str(run)} | device)
    weights = train_gpt.load_saved(run / "model.pt", "model")["model"]
    hessians = train_gpt.load_saved(run / "hessians.pt")
    return cfg, *train_gpt.reparametrize(cfg, train_gpt.Runtime.start(cfg, {}), weights, hessians)


def measure_losses(found: Calibrated, stored: list[Stored], shares: dict[tuple[str, str], float]) -> dict[Stored, Loss]:
    """The loss of each stored tensor; `shares` are bytes of the artifact by stored array."""
    (_, weights, hessians), losses = found, {}
    for tensor in stored:
        name, parts, key = tensor.name, tensor.parts, tensor.key()
        if name not in weights:
            raise UserError(f"model.pt has no {name}, which model.bin stores: they are of different runs")
        weight, hessian = weights[name].float(), hessians.get(name)
        error = weight - tensor.decode()
        squares = [t.double().square().sum().item() for t in (error, weight)]
        if "q" in parts and squares[0] > max(squares[1], 1e-12):
            raise UserError(
                f"model.bin decodes {name} to other weights than model.pt has: quantise this run again, or inspect "
                "it on the kind of device that quantised it (DEVICE=cpu or DEVICE=cuda)"
            )
        weighted = [output_power(t, hessian) for t in (error, weight)]
        raw = sum(part.nbytes for part in parts.values())
        size = sum(share for (owner, _), share in shares.items() if owner == key)
        losses[tensor] = Loss(weight.numel(), *squares, *weighted, raw, entropy_bytes(parts), size)
    return losses


def probe_rows(found: Calibrated) -> list[dict[str, Any]]:
    """What AWQ-lite, and the clip search on the largest tensor of each rule, would cost and gain.

    The tensors are quantised again both ways. Bytes are at order-0 entropy; error_ratio is the Hessian-weighted error
    over that of the run's own rule.
    """
    cfg, weights, hessians = found
    plan = train_gpt.quant_plan(cfg)

    def encode(name: str, rule: train_gpt.QuantRule) -> Parts:
        """The tensor as a rule stores it."""
        return train_gpt.SCHEMES[rule.scheme].encode(weights[name].float(), hessians[name], rule, cfg)

    refined = train_gpt.refined_plan(dataclasses.replace(cfg, awq_lite_enabled=True), weights, hessians)
    probes = []
    for name, rule in refined.items():
        if rule.awq_groups:
            what = f"AWQ-lite from columns {','.join(map(str, rule.awq_groups))}"
            probes.append((what, name, encode(name, rule)))
    calibrated = sorted(hessians.keys() & weights.keys(), key=lambda name: (weights[name].numel(), name))
    largest = {plan[name]: name for name in calibrated}  # of each rule, the last one stays
    for rule, name in largest.items():
        probes.append(("clip search", name, encode(name, rule._replace(scheme="gptq_lite"))))
    rows = []
    for what, name, other in probes:
        ours = encode(name, plan[name])
        decoded = [train_gpt.decode_rows(parts) for parts in (other, ours)]
        errors = [output_power(weights[name] - weight, hessians[name]) for weight in decoded]
        row = {"probe": what, "tensor": name, "bytes_at_entropy": entropy_bytes(other) - entropy_bytes(ours)}
        rows.append(row | {"error_ratio": ratio(*errors)})
    return rows


def run_report(run: Path, shares: dict[str, float], probe: bool) -> dict[str, Any]:
    """Errors and bytes by role and by tensor, bytes of the LQER corrections and, if asked, the other quantisers."""
    found = read_calibrated(run)
    # what was fitted after the quantisation is no weight
    stored = [tensor for tensor in train_gpt.read_artifact(run / "model.bin") if tensor.scheme != "byte"]
    losses = measure_losses(found, stored, shares)
    groups: dict[tuple[str, str], list[Loss]] = {}
    tensors = []
    for tensor, loss in losses.items():
        groups.setdefault((tensor.role, tensor.encoding()), []).append(loss)
        tensors.append({"tensor": tensor.name, "role": tensor.role, "stored": tensor.encoding()} | loss.row())
    sums = {group: Loss(*map(sum, zip(*members, strict=True))) for group, members in groups.items()}
    ranked = sorted(sums.items(), key=lambda item: -item[1].bytes)
    return {
        "roles": [{"role": role, "stored": scheme} | loss.row() for (role, scheme), loss in ranked],
        "tensors": tensors,
        "lqer": lqer_rows(stored),
        "probe": probe_rows(found) if probe else [],
    }
