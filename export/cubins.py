"""Cubins and their manifest -> what a C++ library holds: the table of runtime/cuda/kernels.h, and the images.

Only the kernels of inference over whole batches are taken: no packed sequences, no slots, no backward pass, a state
always. They are told apart by the names that `Build` gives them, without the architecture: runtime/cuda spells the
same names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from gdn2_ops.export.kernels import FORMAT, MANIFEST, Build, plan
from gdn2_ops.kernels import tiles

EMBEDDED = {  # kernel: the options that a launcher of runtime/cuda chooses
    "step": {"SLOTS": 0},
    "prepare": {"PACKED": 0},
    "recur": {"STATE": 1, "PACKED": 0, "BACKWARD": 0},
    "recur_masked": {"STATE": 1, "PACKED": 0, "BACKWARD": 0},
    "summarise": {"PACKED": 0},
    "chain": {"STATE": 1, "PACKED": 0},
}
TABLE, IMAGES = "table.cpp", "cubins.S"
_TILE = ("K", "V", "BK", "BV")  # constexprs of an image that grids are made of
_HEADER = "// Written by gdn2_ops.export.cubins from {manifest}.\n"


def embedded(
    archs: Iterable[int] = tiles.ARCHS,
    head_sizes: Iterable[tuple[int, int]] = tuple(zip(tiles.HEAD_SIZES, tiles.HEAD_SIZES)),
    dtypes: Iterable[str] = tiles.ANY_DTYPE,
) -> list[Build]:
    """Every cubin that a library for such architectures, head sizes and dtypes needs.

    Raises: ValueError: as `export.kernels.plan`.
    """
    head_sizes = tuple(head_sizes)
    builds = plan(archs, head_sizes, dtypes, tuple(name for name in EMBEDDED if name != "prepare"))
    builds += plan(archs, dict.fromkeys((K, K) for K, _ in head_sizes), dtypes, ("prepare",))  # it knows no V
    return [build for build in builds if _is_launched(build)]


def _is_launched(build: Build) -> bool:
    options = dict(build.options)
    chosen = EMBEDDED[build.kernel] | ({"EXACT": int(build.dtype == "fp32")} if "EXACT" in options else {})
    return all(options[name] == value for name, value in chosen.items())


def write_table(folder: str | Path) -> tuple[Path, Path]:
    """Writes table.cpp and cubins.S beside the manifest in `folder`. Returns their paths.

    Raises: FileNotFoundError: there is no manifest. ValueError: it has another format, or a kernel that a library
        does not launch.
    """
    folder = Path(folder).resolve()
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"gdn2_ops.export.cubins: expected {MANIFEST} in {str(folder)!r}, got none")
    text = (folder / MANIFEST).read_text()
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise ValueError(f"gdn2_ops.export.cubins: expected a manifest of format {FORMAT}, got {manifest['format']}")
    entries = manifest["kernels"]
    wrong = sorted({entry["kernel"] for entry in entries} - EMBEDDED.keys())
    if wrong:
        raise ValueError(f"gdn2_ops.export.cubins: expected kernels among {tuple(EMBEDDED)}, got {tuple(wrong)}")
    kernels = {entry["kernel"]: entry for entry in entries}
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    parts = [
        _HEADER.format(manifest=MANIFEST),
        '#include "kernels.h"\n',
        'extern "C" {',
        *(f"extern const unsigned char gdn2_cubin_{i}[];" for i in range(len(entries))),
        "}\n",
        "namespace gdn2::cuda {\nnamespace {\n",
        *(_parameters(name, entry["parameters"]) for name, entry in kernels.items()),
        *(_grid(name, grid) for name, grid in sorted({(entry["kernel"], entry["grid"]) for entry in entries})),
        "\nconst Image IMAGES[] = {",
        *(_image(i, entry) for i, entry in enumerate(entries)),
        "};\n",
        f"const int64_t HEAD_SIZES[] = {{{_list(manifest['head_sizes'])}}};",
        f"const SegmentRow SEGMENTS[] = {{{', '.join('{' + _list(row) + '}' for row in manifest['segments'])}}};\n",
        f"const Table TABLE = {{TABLE_FORMAT, IMAGES, {len(entries)}, HEAD_SIZES, {len(manifest['head_sizes'])},",
        f"                     SEGMENTS, {len(manifest['segments'])}, {_chunk(entries)},",
        f'                     {len(manifest["hidden_parameters"])}, {manifest["pointer_alignment"]}, "{digest}"}};\n',
        "}  // namespace\n",
        "const Table& table() { return TABLE; }\n",
        "}  // namespace gdn2::cuda\n",
        'extern "C" __attribute__((visibility("default"))) const gdn2::cuda::Table* gdn2_cubins() {',
        "  return &gdn2::cuda::table();\n}\n",
    ]
    table, images = folder / TABLE, folder / IMAGES
    table.write_text("\n".join(parts))
    lines = [_HEADER.format(manifest=MANIFEST), '  .section .rodata, "a"']
    for i, entry in enumerate(entries):
        lines += ["  .balign 64", f"  .globl gdn2_cubin_{i}", f"  .hidden gdn2_cubin_{i}", f"gdn2_cubin_{i}:"]
        lines += [f'  .incbin "{folder / entry["file"]}"']
    images.write_text("\n".join([*lines, '  .section .note.GNU-stack, "", @progbits\n']))
    return table, images


def _parameters(kernel: str, parameters: list[dict]) -> str:
    """Names and kinds: which dtype a pointer has is the image's and its launcher's to agree on."""
    kinds = [("pointer" if p["type"].startswith("*") else p["type"], p["name"]) for p in parameters]
    listed = ", ".join(f'{{"{name}", Kind::{kind}}}' for kind, name in kinds)
    return f"const Parameter {kernel}[] = {{{listed}}};"


def _grid(kernel: str, grid: str) -> str:
    """The rule of the manifest as a function: its names are sizes of the call, or constexprs of the image."""
    rule = re.fullmatch(r"\((.+), 1, 1\)", grid)
    if rule is None or re.search(r"[^\w\s()+*/-]", rule[1]):
        raise ValueError(f"gdn2_ops.export.cubins: {kernel}: expected a grid like '(N * H, 1, 1)', got {grid!r}")
    names = sorted(set(re.findall(r"[A-Za-z_]\w*", rule[1])))
    bound = [f"  const int64_t {name} = {'image' if name in _TILE else 'call'}.{name};" for name in names]
    head = f"int64_t {kernel}_grid([[maybe_unused]] const Image& image, const Sizes& call) {{"
    return "\n".join([head, *bound, f"  return {rule[1]};", "}"])


def _image(i: int, entry: dict) -> str:
    key = entry["name"].removesuffix(f"-sm{entry['arch']}")
    tile = [entry["constexprs"].get(name, 0) for name in _TILE]
    exact = "true" if entry["target"].endswith("a") else "false"
    numbers = _list([entry["arch"], exact, entry["threads"], entry["shared_memory"], len(entry["parameters"]), *tile])
    kernel = entry["kernel"]
    return f'    {{"{key}", "{entry["symbol"]}", gdn2_cubin_{i}, {kernel}, {kernel}_grid, {numbers}}},'


def _chunk(entries: list[dict]) -> int:
    """Tokens of a chunk: one number, since the workspace is sized before the architecture is known."""
    (C,) = {entry["constexprs"]["C"] for entry in entries if "C" in entry["constexprs"]} or {64}
    return C


def _list(numbers) -> str:
    return ", ".join(map(str, numbers))
