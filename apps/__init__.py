"""Applications on top of the library. `postgen.apps.demo` is the Gradio app; import the package as `postgen.apps`."""
