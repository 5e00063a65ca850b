"""Run in a process under TRITON_INTERPRET=0: builds the plugin that the tests of this folder load.

Every kernel for sm_90, head sizes 64 and 128 and all dtypes; the masked ones of one dtype; another architecture, for
the choice between two.
"""

import sys
from pathlib import Path

from gdn2_ops.export import cubins, plugin

HEADS = ((64, 64), (128, 128))


def main(folder: Path) -> None:
    exact = [build for build in cubins.embedded([90], HEADS) if ("MASKED", 0) in build.options]
    masked = [build for build in cubins.embedded([90], HEADS[:1], ["bf16"]) if ("MASKED", 1) in build.options]
    other = [build for build in cubins.embedded([80], HEADS[:1], ["bf16"]) if ("MASKED", 0) in build.options]
    print(plugin.build(folder, exact + masked + other))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
