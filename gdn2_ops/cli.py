"""The command line `gdn2`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gdn2_ops import commands

DEFAULT_MODEL = Path("examples/models/tiny")
Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]  # name, function, help


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 when results disagree or numbers run away, 2 when the input
    is at fault."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, TypeError, FileNotFoundError, ImportError, NotImplementedError) as error:
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gdn2", description="Gated DeltaNet-2: export, run and compare.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    command("info", commands.info, "versions, devices and installed parts")

    demo = command(
        "demo", commands.demo, "eager, compiled, ONNX Runtime, a server on real text: do they agree, how fast are they"
    )
    demo.add_argument("--model", type=Path, default=DEFAULT_MODEL, help=f"model folder (default {DEFAULT_MODEL})")
    demo.add_argument("-o", "--output", type=Path, help="keep the ONNX file here")
    demo.add_argument(
        "--server", type=Path, help="environment with Triton Inference Server (make serve-env: .venv-serve)"
    )
    _add_exports(command)
    _add_checks(command)
    _add_servers(command)
    return parser


def _add_exports(command: Command) -> None:
    """What writes files for others, and what reads those of others."""
    export = command("export", commands.export, "write a model for another runtime")
    export.add_argument("model", type=Path, help="model folder")
    targets = ["onnx", "aoti", "tensorrt", "genai", "triton-repository"]
    export.add_argument("--to", choices=targets, required=True, help="aoti: a .pt2 package; tensorrt: a plan")
    export.add_argument("-o", "--output", type=Path, required=True, help="file, or for the last two folder, to write")
    export.add_argument(
        "--body", default="chunk", help="of the ONNX node: chunk (default), scan, linear_attention or none"
    )
    export.add_argument("--opset", type=int, help="onnx: of the standard operators (default 21)")
    export.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="onnx, tensorrt: of the weights")
    export.add_argument("--quantize", choices=["int8"], help="onnx: 8 bits for weights")
    export.add_argument("--library", action="store_true", help="genai: put our ONNX Runtime kernels into the folder")
    export.add_argument("--tokenizer", type=Path, help="genai: folder of the tokenizer (default: tokens are bytes)")
    export.add_argument("--batch", type=int, help="tensorrt: most sequences in a call (default 8)")
    export.add_argument("--tokens", type=int, help="... most tokens of a prompt in a call (default 1024)")
    export.add_argument("--plugin", help="... its library, '' for none (default: of gdn2 build-plugin)")
    export.add_argument("--timing-cache", type=Path, help="... file that makes the next build faster")
    export.add_argument(
        "--dry-run", action="store_true", help="... only write the ONNX file, and print the lines that build the plan"
    )
    export.add_argument("--backend", help="triton-repository: python (default), onnxruntime or tensorrt")
    export.add_argument("--slots", type=int, help="... sequences decoded at a time (default 64)")
    export.add_argument("--threads", type=int, help="... threads of ONNX Runtime (default: its own choice)")
    export.add_argument("--server-library", help="... path of our library on the server's machine, '' for none")

    kernels = command(
        "build-kernels", commands.build_kernels, "compile the GPU kernels to cubins and a manifest; needs no GPU"
    )
    kernels.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    kernels.add_argument("--kernel", action="append", help="a name of the table; again for more (default: all)")
    _add_selection(kernels)

    plugin = command(
        "build-plugin", commands.build_plugin, "compile the GPU kernels of TensorRT or ONNX Runtime; needs no GPU"
    )
    plugin.add_argument(
        "--for",
        dest="target",
        choices=["tensorrt", "onnxruntime"],
        default="tensorrt",
        help="the plugin of TensorRT (default), or what our ONNX Runtime library loads on CUDA",
    )
    plugin.add_argument("-o", "--output", type=Path, help="folder to write (default: the package's own)")
    _add_selection(plugin)

    convert = command("convert", commands.convert, "write a published checkpoint as a model folder")
    convert.add_argument("checkpoint", type=Path, help=".safetensors, or what torch.save wrote")
    convert.add_argument("--config", required=True, help="its sizes: gdn2-1.3b, gdn2-1.3b-hybrid, or a model folder")
    convert.add_argument("--output-gate", choices=["silu", "sigmoid"], help="of its layers (default: of the config)")
    convert.add_argument("-o", "--output", type=Path, required=True, help="folder to write")


def _add_checks(command: Command) -> None:
    """What runs a file."""
    check = command(
        "check", commands.check, "run an exported file in every backend found here, or look through a repository"
    )
    check.add_argument(
        "file",
        type=Path,
        help=".onnx file with gdn2::GatedDeltaNet2 nodes, .plan of TensorRT, or folder of a repository",
    )
    check.add_argument("--model", type=Path, help="model folder it was exported from: PyTorch is compared too")
    check.add_argument("--plugin", type=Path, help="plan: its plugin's library (default: of gdn2 build-plugin)")
    check.add_argument("--in-place", action="store_true", help="plan: states in one buffer, as our plugin allows")
    check.add_argument("--body", action="append", default=[], help="compare this body too; may be given again")

    generate = command("generate", commands.generate, "continue a prompt with the most probable bytes")
    generate.add_argument("model", type=Path, help="model folder, .onnx file, .pt2 package or .plan of TensorRT")
    generate.add_argument("--prompt", help="text to continue; without it, standard input")
    generate.add_argument("--count", type=int, default=128, help="bytes to write (default 128)")
    generate.add_argument("--library", action="store_true", help="run an .onnx file with our ONNX Runtime kernels")
    generate.add_argument("--cuda", action="store_true", help="run an .onnx file on the GPU (onnxruntime-gpu)")


def _add_servers(command: Command) -> None:
    """Triton Inference Server and its client."""
    serve = command("serve", commands.serve, "serve a model repository on the loopback with Triton Inference Server")
    serve.add_argument("repository", type=Path, help="folder that gdn2 export --to triton-repository wrote")
    serve.add_argument("--env", type=Path, default=Path(".venv-serve"), help="of make serve-env (default .venv-serve)")
    serve.add_argument("--ports", default="8000,8001,8002", help="of HTTP, gRPC and metrics; 0 is any free one")
    serve.add_argument("--log", type=Path, help="file of the server's output (default: one in the temporary folder)")
    serve.add_argument("--canary-seconds", type=float, default=10, help="between two canary requests (default 10)")

    client = command("client", commands.client, "continue a prompt on a server, as a stream, or ask whether it answers")
    client.add_argument("--prompt", help="text to continue; without it, standard input")
    client.add_argument("--count", type=int, default=128, help="bytes to write (default 128)")
    client.add_argument("--seconds", type=float, help="deadline of the generation")
    client.add_argument("--name", default="gdn2", help="prefix of the models (default gdn2)")
    client.add_argument("--http", default="127.0.0.1:8000", help="address (default 127.0.0.1:8000)")
    client.add_argument("--grpc", help="address; then the stream goes over gRPC")
    client.add_argument("--canary", action="store_true", help="only ask every model for an answer: a liveness probe")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, action="append", help="80, 90, 100 or 120; again for more (default: all)")
    parser.add_argument("--head-size", action="append", help="128, or 128x256 for K and V; again for more")
    parser.add_argument("--dtype", action="append", help="fp32, bf16 or fp16; again for more (default: all)")
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")


if __name__ == "__main__":
    sys.exit(main())
