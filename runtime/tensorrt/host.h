// The TensorRT that is in this process, called without linking it: its logger and its registry of plugins.
#pragma once

#include <string>

#include "abi.h"

namespace gdn2::tensorrt {

// The finder that TensorRT hands to libraries it loads itself (setLoggerFinder); may be null.
void use_logger_finder(void* finder);

// As an error, to TensorRT's logger; to stderr where there is none yet.
void report(const std::string& text);

// Registration with the TensorRT that is loaded already, for libraries that were loaded by dlopen alone. false: there
// is none, or it has such a creator.
bool register_creator(nvinfer1::IPluginCreatorInterface* creator, const char* of_namespace);
void deregister_creator(nvinfer1::IPluginCreatorInterface* creator);

}  // namespace gdn2::tensorrt
