# What a project with the cubins of the folder GDN2_CUBINS starts with; `gdn2 build-plugin` writes the folder. The
# sources of their table are in GDN2_TABLE.
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
if(NOT EXISTS "${GDN2_CUBINS}/table.cpp")
  message(FATAL_ERROR "expected a folder with table.cpp in GDN2_CUBINS, got '${GDN2_CUBINS}': gdn2 build-plugin -o DIR writes one")
endif()
file(GLOB cubins CONFIGURE_DEPENDS ${GDN2_CUBINS}/*.cubin)
set_source_files_properties(${GDN2_CUBINS}/cubins.S PROPERTIES OBJECT_DEPENDS "${cubins}")
set(GDN2_TABLE ${GDN2_CUBINS}/table.cpp ${GDN2_CUBINS}/cubins.S)
