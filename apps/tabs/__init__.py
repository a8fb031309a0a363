"""The tabs of the page: each module has `tab(app)`, which builds one inside the open `gr.Blocks`."""
