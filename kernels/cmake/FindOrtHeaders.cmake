# ORT_HEADERS: the folder with onnxruntime_cxx_api.h. ORT_API_VERSION: their age, and so the oldest ONNX Runtime that
# will load the library (API 21 is 1.21).
#
# Looked for, in this order: ONNXRUNTIME_ROOT (a CMake or environment variable), CONDA_PREFIX, what fetch_headers.sh
# has put into .cache of a clone, the system, a CMake package, and with -DADAPTERX_FETCH_ORT=ON the release's archive.
set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}" CACHE PATH "the folder that holds ONNX Runtime's include/")
option(ADAPTERX_FETCH_ORT "get ONNX Runtime's headers from its release on GitHub" OFF)
set(_release 1.21.1)

set(_folders include include/onnxruntime include/onnxruntime/core/session onnxruntime)
if(ONNXRUNTIME_ROOT)
  # Asked for by name: if it is not there, nothing else will do.
  find_path(ORT_HEADERS onnxruntime_cxx_api.h PATHS "${ONNXRUNTIME_ROOT}" PATH_SUFFIXES ${_folders} NO_DEFAULT_PATH)
  if(NOT ORT_HEADERS)
    message(FATAL_ERROR "ONNXRUNTIME_ROOT is ${ONNXRUNTIME_ROOT}, and there is no include/onnxruntime_cxx_api.h in it")
  endif()
else()
  find_path(ORT_HEADERS onnxruntime_cxx_api.h
    HINTS "$ENV{CONDA_PREFIX}" "${CMAKE_CURRENT_LIST_DIR}/../../.cache/ort-headers/usr" PATH_SUFFIXES ${_folders})
endif()
if(NOT ORT_HEADERS)
  find_package(onnxruntime CONFIG QUIET)
  if(TARGET onnxruntime::onnxruntime)
    get_target_property(_include onnxruntime::onnxruntime INTERFACE_INCLUDE_DIRECTORIES)
    find_path(ORT_HEADERS onnxruntime_cxx_api.h PATHS ${_include} PATH_SUFFIXES onnxruntime NO_DEFAULT_PATH)
  endif()
endif()
if(NOT ORT_HEADERS AND ADAPTERX_FETCH_ORT)
  include(FetchContent)
  # The headers are the same in the archive of every system.
  FetchContent_Declare(ort_release TIMEOUT 60 DOWNLOAD_EXTRACT_TIMESTAMP ON
    URL "https://github.com/microsoft/onnxruntime/releases/download/v${_release}/onnxruntime-linux-x64-${_release}.tgz")
  FetchContent_MakeAvailable(ort_release)
  find_path(ORT_HEADERS onnxruntime_cxx_api.h PATHS "${ort_release_SOURCE_DIR}/include" NO_DEFAULT_PATH)
endif()
if(NOT ORT_HEADERS)
  message(FATAL_ERROR
    "No headers of ONNX Runtime (onnxruntime_cxx_api.h); its Python wheels carry none. Get them in one of these ways:\n"
    "  Debian 12, a clone     kernels/fetch_headers.sh .cache/ort-headers\n"
    "  Debian 13 or newer     apt install libonnxruntime-dev\n"
    "  conda                  conda install -c conda-forge onnxruntime-cpp\n"
    "  anywhere               unpack a release of github.com/microsoft/onnxruntime, set ONNXRUNTIME_ROOT to its folder,\n"
    "                         or configure with -DADAPTERX_FETCH_ORT=ON to have that done\n")
endif()

file(STRINGS "${ORT_HEADERS}/onnxruntime_c_api.h" _line REGEX "^#define ORT_API_VERSION [0-9]+")
string(REGEX MATCH "[0-9]+$" ORT_API_VERSION "${_line}")
message(STATUS "headers of ONNX Runtime: API ${ORT_API_VERSION} in ${ORT_HEADERS}; "
  "the library will need onnxruntime>=1.${ORT_API_VERSION}")
