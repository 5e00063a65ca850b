"""Rung 8: the comparison of our declarations with real headers (tests/trt/headers.py) finds every kind of difference.

Here it is given headers of our own, laid out as NVIDIA's are: TensorRT's cannot be had where these tests run.
"""

import re
from pathlib import Path

import pytest
from trt import headers

ABI = headers.HERE.parent.parent / "runtime" / "tensorrt" / "abi.h"
REGISTRY = """
class ILogger {log_base} {{
 public:
  virtual void log(int severity, const char* msg) noexcept = 0;
}};
class ILoggerFinder {log_base} {{
 public:
  virtual ILogger* findLogger() noexcept = 0;
}};
class IPluginCreator;
class IPluginRegistry {{
 public:
{before}
  virtual bool registerCreator(IPluginCreatorInterface& creator, const char* const name_space) noexcept = 0;
  virtual void filler_a() = 0;
  virtual void filler_b() = 0;
  virtual bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept = 0;
}};
}}
"""


def write(folder: Path, major: int, *changes: tuple[str, str]) -> list[str]:
    """Headers that say what ours say, but for the changes, in a version of a namespace as NVIDIA's."""
    text = ABI.read_text().replace("void* stream", "cudaStream_t stream")
    text = text.replace(
        "namespace nvinfer1 {", "#include <cuda_runtime_api.h>\nnamespace nvinfer1 {\ninline namespace v_1_0 {"
    )
    ten = ["virtual bool registerCreator(IPluginCreator& creator, const char* name_space) noexcept = 0;"]
    ten += [f"virtual void filler_{i}() = 0;" for i in range(11)]
    before = "\n".join(ten if major == 10 else [f"virtual void filler_{i}() = 0;" for i in range(8)])
    base = "" if major == 10 else ": public IVersionedInterface"
    text = text.replace("}  // namespace nvinfer1", REGISTRY.format(log_base=base, before=before) + "}")
    for right, wrong in changes:
        assert len(re.findall(re.escape(right), text)) == 1, right
        text = text.replace(right, wrong)
    (folder / "NvInferRuntime.h").write_text(text)
    version = f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR 0\n"
    (folder / "NvInferVersion.h").write_text(version)
    return [str(folder)]


@pytest.mark.parametrize("major", [10, 11])
def test_the_same_headers_are_the_same(major, tmp_path, capfd):
    assert headers.main(write(tmp_path, major)) == 0
    counted = re.fullmatch(rf"TensorRT {major}\.0: (\d+) facts are the same\n", capfd.readouterr().out)
    assert int(counted[1]) > 130


PLANTED = (  # what is changed there, and how it is reported
    ("kBF16 = 7", "kBF16 = 9", "DataType::kBF16: here 7, there 9"),
    ("  float scale;\n", "  int32_t more;\n  float scale;\n", "offset of PluginTensorDesc.scale: here 80, there 84"),
    (
        "  virtual int32_t getNbTactics()",
        "  virtual void before() = 0;\n  virtual int32_t getNbTactics()",
        "slot of IPluginV3OneBuildV2::getAliasedInput: here 15, there 16",
    ),
    (
        "setTactic(int32_t)",
        "setTactic(int64_t)",
        "IPluginV3OneRuntime::setTactic: here int (int) noexcept, there int (long)",
    ),
    (
        "getNbOutputs() const noexcept",
        "getNbOutputs() noexcept",
        "IPluginV3OneBuildV2::getNbOutputs: here int () noexcept",
    ),
    (
        '"PLUGIN_V3ONE_BUILD", 2, 0',
        '"PLUGIN_V3ONE_BUILD", 3, 0',
        "IPluginV3OneBuildV2: here PLUGIN_V3ONE_BUILD 2.0, there",
    ),
    ("virtual void filler_7() = 0;", "", "slot of IPluginRegistry::registerCreator: here 8, there 7"),
)


def test_planted_differences_are_found(tmp_path, capfd):
    assert headers.main(write(tmp_path, 11, *(change[:2] for change in PLANTED))) == 1
    out = capfd.readouterr().out
    assert [line for _, _, line in PLANTED if line not in out] == [], out
    assert "are the same" not in out and "setFields" not in out and "slot of IPluginV3OneRuntime" not in out


def test_a_function_that_is_gone_is_an_error(tmp_path, capfd):
    assert headers.main(write(tmp_path, 11, ("virtual int32_t getNbTactics() noexcept { return 0; }", ""))) == 2
    assert "getNbTactics" in capfd.readouterr().err


def test_a_folder_without_headers_is_refused(tmp_path, capfd):
    assert headers.main([str(tmp_path)]) == 2
    assert "expected a folder with NvInferRuntime.h" in capfd.readouterr().err
