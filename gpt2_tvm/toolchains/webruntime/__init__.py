"""TVM's runtime for browsers, built from the sources that apache-tvm and apache-tvm-ffi carry.

| file | holds |
| --- | --- |
| `sources.py` | one folder with all that the three source files include |
| `headers/` | nine headers that neither package has, for users without a TVM source tree |
| `patches.py` | what is wrong in TVM 0.27's web sources, and its cure |
| `emscripten.py` | finding emcc and calling it |
| `build.py` | the three objects, once a version, in the user's cache folder |

`gpt2_tvm.toolchains.web` links models with them.
"""
