#!/bin/sh
# What the authors could not do: build engines with the plugin, run them on a GPU, compare them with eager PyTorch.
#
#   sh examples/tensorrt/verify.sh              in the repository, after make install and pip install tensorrt-cu13
#   sh examples/tensorrt/verify.sh --dry-run    prints the commands
#
# For each type and kind (the plugin, the plugin with states in one buffer, the function body) a plan of the model
# `tiny` is built, generates text and predicts text; its logits, bits per byte and bytes are compared with eager's, its
# tokens per second are printed. The last line is the verdict.
#
# Environment: PYTHON (default .venv/bin/python), WORK (folder for what is built), DTYPES, KINDS, PLUGIN (a library that
# is built already).
# Exit status: 0 verified, 1 something differs or fails, 2 tensorrt is missing, 3 no GPU.
set -u
cd "$(dirname "$0")/../.." || exit 1

python=${PYTHON:-.venv/bin/python}
work=${WORK:-build/verify-tensorrt}
dtypes=${DTYPES:-float32 float16 bfloat16}
kinds=${KINDS:-plugin in-place body}
model=examples/models/tiny
dry=
[ "${1:-}" = --dry-run ] && dry=yes

gdn2() {
    if [ -n "$dry" ]; then
        echo "$python -m gdn2_ops.cli $*"
    else
        "$python" -m gdn2_ops.cli "$@"
    fi
}

ask() { # what a line of Python prints
    "$python" -c "$1" 2>"$work/asked"
}

why() { # it printed nothing
    tail -n 1 "$work/asked"
}

verdict() {
    echo "verdict: $1"
    exit "$2"
}

mkdir -p "$work" || exit 1
arch=90
if [ -z "$dry" ]; then
    arch=$(ask '
import sys
from gdn2_ops.kernels.tiles import table_arch
from gdn2_ops.runtime.cuda_driver import Driver
try:
    driver = Driver()
except RuntimeError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
print(table_arch(*driver.compute_capability()))')
    case $? in
    0) ;;
    3) verdict "not verified: no GPU found ($(why))" 3 ;;
    *) verdict "failed: $python runs no gdn2_ops ($(why)): make install" 1 ;;
    esac
    version=$(ask 'import tensorrt; print(tensorrt.__version__)') ||
        verdict "not verified: no tensorrt ($(why)): $python -m pip install tensorrt-cu13" 2
    echo "TensorRT $version, kernels for sm_$arch"
fi

plugin=${PLUGIN:-$work/plugin/libgdn2_tensorrt.so}
if [ -z "${PLUGIN:-}" ]; then
    gdn2 build-plugin -o "$work/plugin" --arch "$arch" --head-size 32 || verdict "failed: the plugin was not built" 1
fi

passed=0
failed=
have=
check() { # name, then options of gdn2 check
    name=$1
    shift
    if gdn2 check "$@"; then
        passed=$((passed + 1))
    else
        failed="$failed $name"
    fi
}

for dtype in $dtypes; do
    for kind in $kinds; do
        library=$plugin
        [ "$kind" = body ] && library=
        plan=$work/$dtype-$([ "$kind" = body ] && echo body || echo plugin).plan
        [ -z "$dry" ] && printf '\n%s, %s\n' "$dtype" "$kind"
        if [ "$plan" != "$have" ]; then
            gdn2 export $model --to tensorrt -o "$plan" --dtype "$dtype" "--plugin=$library" \
                --timing-cache "$work/timing.cache" || {
                failed="$failed $dtype-$kind"
                continue
            }
            have=$plan
        fi
        case $kind in
        plugin) check "$dtype-$kind" "$plan" --model $model --plugin "$plugin" ;;
        in-place) check "$dtype-$kind" "$plan" --model $model --plugin "$plugin" --in-place ;;
        *) check "$dtype-$kind" "$plan" --model $model ;;
        esac
    done
done

[ -n "$dry" ] && exit 0
echo
[ -z "$failed" ] || verdict "failed:$failed; $passed agree with eager" 1
verdict "verified: $passed plans agree with eager, TensorRT $version, sm_$arch" 0
