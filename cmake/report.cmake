# What the program's HTML page is made of, beside the program: cli/report/, and plotly's bundle from the Python package.
execute_process(
  COMMAND "${_turnout_python_path}" -c
    "import importlib.util as u; print(u.find_spec('plotly').submodule_search_locations[0], end='')"
  RESULT_VARIABLE status OUTPUT_VARIABLE plotly ERROR_QUIET)
set(plotly_bundle "${plotly}/package_data/plotly.min.js")
if(NOT status EQUAL 0 OR NOT EXISTS "${plotly_bundle}")
  message(FATAL_ERROR "The program's report needs the Python package plotly: "
    "${_turnout_python_path} -m pip install -r requirements/build.txt, or -DTURNOUT_PROGRAM=OFF to do without the program.")
endif()

set(report_folder "${PROJECT_BINARY_DIR}/share/turnout/report")
file(GLOB report_parts CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cli/report/*")
foreach(part IN LISTS report_parts plotly_bundle)
  cmake_path(GET part FILENAME name)
  configure_file("${part}" "${report_folder}/${name}" COPYONLY)
endforeach()
install(DIRECTORY "${report_folder}" DESTINATION "${CMAKE_INSTALL_DATADIR}/turnout")
