# Finds the LibTorch inside a Python's torch package and wraps it as the imported target turnout::torch.
#
# The Python asked is -DPython_EXECUTABLE, else .venv of the source tree, else the active environment's, else python3.
# -DTURNOUT_TORCH_DIR names the folder of the torch package itself; then no Python is asked which torch to take.
# Sets TURNOUT_TORCH_DIR and TURNOUT_TORCH_FOUND_VERSION. (Torch's own CMake package insists on a CUDA toolkit.)

if(TARGET turnout::torch)
  return()
endif()

function(_turnout_python result)
  if(Python_EXECUTABLE)
    set(${result} "${Python_EXECUTABLE}" PARENT_SCOPE)
    return()
  endif()
  foreach(prefix IN ITEMS "${CMAKE_SOURCE_DIR}/.venv" "$ENV{VIRTUAL_ENV}" "$ENV{CONDA_PREFIX}")
    if(prefix AND EXISTS "${prefix}/bin/python")
      set(${result} "${prefix}/bin/python" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  find_program(TURNOUT_PYTHON3 NAMES python3 python)
  mark_as_advanced(TURNOUT_PYTHON3)
  if(NOT TURNOUT_PYTHON3)
    message(FATAL_ERROR "Turnout needs a Python with torch: pass -DPython_EXECUTABLE=/path/to/python")
  endif()
  set(${result} "${TURNOUT_PYTHON3}" PARENT_SCOPE)
endfunction()

_turnout_python(_turnout_python_path)
set(_turnout_ask ${CMAKE_COMMAND} -E env)
if(TURNOUT_TORCH_DIR)
  cmake_path(GET TURNOUT_TORCH_DIR PARENT_PATH _turnout_site)
  list(APPEND _turnout_ask "PYTHONPATH=${_turnout_site}")
endif()
execute_process(
  COMMAND ${_turnout_ask} "${_turnout_python_path}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  RESULT_VARIABLE _turnout_status OUTPUT_VARIABLE _turnout_answer ERROR_VARIABLE _turnout_reason
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT _turnout_status EQUAL 0)
  message(FATAL_ERROR "Turnout cannot use this torch: ${_turnout_reason}\n"
    "Pass -DPython_EXECUTABLE=/path/to/python of an environment with a torch that fits.")
endif()
string(REPLACE "\n" ";" _turnout_answer "${_turnout_answer}")
list(GET _turnout_answer 0 TURNOUT_TORCH_DIR)
list(GET _turnout_answer 1 TURNOUT_TORCH_FOUND_VERSION)
message(STATUS "torch ${TURNOUT_TORCH_FOUND_VERSION} in ${TURNOUT_TORCH_DIR}")

set(_turnout_torch_libraries "${TURNOUT_TORCH_DIR}/lib/libtorch_cpu.so" "${TURNOUT_TORCH_DIR}/lib/libc10.so")
if(TURNOUT_CUDA)
  # Nothing of ours names a CUDA symbol: without --no-as-needed the linker may drop what registers the device.
  list(APPEND _turnout_torch_libraries -Wl,--push-state,--no-as-needed
    "${TURNOUT_TORCH_DIR}/lib/libtorch_cuda.so" "${TURNOUT_TORCH_DIR}/lib/libc10_cuda.so" -Wl,--pop-state)
endif()
# at::parallel_for is a header: its callers call OpenMP themselves. They link the very file that torch runs on, so that
# a process never holds two OpenMP runtimes.
file(GLOB _turnout_gomp "${TURNOUT_TORCH_DIR}/lib/libgomp*.so*")
list(APPEND _turnout_torch_libraries ${_turnout_gomp})

add_library(turnout::torch INTERFACE IMPORTED)
set_target_properties(turnout::torch PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES
    "${TURNOUT_TORCH_DIR}/include;${TURNOUT_TORCH_DIR}/include/torch/csrc/api/include"
  INTERFACE_COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:-fopenmp>"
  INTERFACE_COMPILE_FEATURES cxx_std_20
  INTERFACE_LINK_LIBRARIES "${_turnout_torch_libraries}")
