"""The online deployment on Ray Serve.

`app.py` is what `serve deploy` and `r4b serve` run, `replica.py` what a replica is made of. The engine, and vLLM's HTTP
app over it, are `pipeline.engine`'s.
"""
