"""The tabs of the page. Each module has a function `tab(app)` that builds one tab in the open `gr.Blocks`."""
