# What `cmake --install` lays down: into a wheel the library alone, elsewhere a prefix that find_package(turnout) finds.
# Torch stays where it is; inside the wheel it is found relative to the package, in a prefix by the path of the build.
file(RELATIVE_PATH program_to_library
  "${CMAKE_INSTALL_FULL_BINDIR}" "${CMAKE_INSTALL_FULL_LIBDIR}")

if(SKBUILD)
  set_target_properties(turnout PROPERTIES INSTALL_RPATH "$ORIGIN/../torch/lib")
  install(TARGETS turnout LIBRARY DESTINATION turnout)
  install(FILES "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/torch_version.txt" DESTINATION turnout)
  return()
endif()

set_target_properties(turnout PROPERTIES INSTALL_RPATH "${TURNOUT_TORCH_DIR}/lib")
install(TARGETS turnout EXPORT turnout)
install(FILES "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/torch_version.txt" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY include/turnout "${PROJECT_BINARY_DIR}/include/turnout"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")
if(TARGET turnout_cli)
  set_target_properties(turnout_cli PROPERTIES
    INSTALL_RPATH "$ORIGIN/${program_to_library};${TURNOUT_TORCH_DIR}/lib")
  install(TARGETS turnout_cli)
  install(DIRECTORY benchmarks/shapes DESTINATION "${CMAKE_INSTALL_DATADIR}/turnout")
endif()

include(CMakePackageConfigHelpers)
set(package "${CMAKE_INSTALL_LIBDIR}/cmake/turnout")
configure_package_config_file(cmake/turnoutConfig.cmake.in turnoutConfig.cmake INSTALL_DESTINATION "${package}")
write_basic_package_version_file(turnoutConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(EXPORT turnout NAMESPACE turnout:: FILE turnoutTargets.cmake DESTINATION "${package}")
install(FILES
  "${PROJECT_BINARY_DIR}/turnoutConfig.cmake" "${PROJECT_BINARY_DIR}/turnoutConfigVersion.cmake"
  cmake/TurnoutTorch.cmake cmake/find_torch.py DESTINATION "${package}")
