"""Run in a process of its own, with polygraphy on the path: what its command line understands, as JSON."""

import argparse
import json
import sys

from polygraphy.tools import args
from polygraphy.tools.registry import TOOL_REGISTRY


def main(words: list[str]) -> dict:
    parser = argparse.ArgumentParser()
    tools = parser.add_subparsers(dest="tools", required=True)
    for tool in TOOL_REGISTRY:
        tool.setup_parser(tools)
    options = parser.parse_args(words)
    tool = options.subcommand
    tool.parse(options)
    config, model = tool.arg_groups[args.TrtConfigArgs], tool.arg_groups[args.ModelArgs]
    seen = {
        "model": str(model.path),
        "profiles": [{x: list(map(list, y)) for x, y in p.items()} for p in config.profile_dicts],
        "plugins": tool.arg_groups[args.TrtLoadPluginsArgs].plugins,
        "strongly_typed": tool.arg_groups[args.TrtLoadNetworkArgs].strongly_typed,
        "tf32": bool(config.tf32),
    }
    if options.tools == "convert":
        caches = [config.load_timing_cache, tool.arg_groups[args.TrtLoadEngineBytesArgs].save_timing_cache]
        return seen | {"to": options.convert_to, "output": options.output, "caches": caches}
    compare = tool.arg_groups[args.CompareFuncSimpleArgs]
    return seen | {
        "runners": [name for name, _ in tool.arg_groups[args.RunnerSelectArgs].runners],
        "inputs": {name: list(x.shape) for name, x in model.input_shapes.items()},
        "tolerance": [compare.atol[""], compare.rtol[""]],
    }


if __name__ == "__main__":
    program, *words = sys.argv[1:]
    assert program == "polygraphy"
    print(json.dumps(main(words)))
